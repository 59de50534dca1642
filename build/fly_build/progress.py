"""How far a build is: what its steps tell whoever asked. It needs nothing, so that what compiles before torch is known
to be there can tell it too."""

from collections.abc import Callable

Report = Callable[[str, float], None]
"""Is told the name of a step and which fraction of it is done."""


def quietly(step: str, fraction: float) -> None:
    """A report that nobody asked for."""
