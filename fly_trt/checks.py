"""Whether a setting is what its field says. What is wrong is a ConfigError in one line."""

import math
from collections.abc import Collection
from typing import Any

from fly_trt.errors import ConfigError


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def check_at_least(name: str, value: Any, least: int) -> None:
    if not (is_whole(value) and value >= least):
        raise ConfigError(f"{name} {value!r}: expected a whole number, at least {least}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} {value!r}: expected True or False")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    choices = tuple(choices)  # a list is in no tuple of names, and cannot be asked of a table
    if value not in choices:
        raise ConfigError(f"{name} {value!r}: expected one of {', '.join(str(choice) for choice in choices)}")
