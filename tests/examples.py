"""How many random examples a property is tried with."""

from typing import Any

from hypothesis import settings

LONG_EXAMPLES = 100  # of profile long: what hypothesis tries when nothing is said
FEWEST = 5


def examples(number: int, **options: Any) -> settings:
    """So many in a long run, and otherwise the part of them that the profile has. The options are hypothesis's."""
    return settings(max_examples=max(FEWEST, number * settings.default.max_examples // LONG_EXAMPLES), **options)
