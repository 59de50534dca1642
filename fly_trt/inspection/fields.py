"""JSON of unknown origin, read field by field: every value has the type that is expected of it, or an error says in one
line where it is, what was got and what was expected.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from fly_trt.errors import ConfigError

MAX_COUNT = 1 << 53  # from there on JavaScript counts in twos
SHOWN = 40  # characters of a wrong value


class Fields:
    """One JSON object, found at `where`. Raises ConfigError for what is no object."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: got {shown(value)}, expected an object")
        self.where = where
        self._values = value

    def has(self, name: str) -> bool:
        """Whether there is something that is not null."""
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def text(self, name: str) -> str:
        value = self._values.get(name)
        return value if isinstance(value, str) else self._refuse(name, "a text")

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        value = self._values.get(name)
        if not isinstance(value, str) or value not in allowed:
            self._refuse(name, f"one of {', '.join(allowed)}")
        return value

    def count(self, name: str, least: int = 0) -> int:
        value = self._values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < MAX_COUNT:
            self._refuse(name, f"a whole number from {least} on")
        return value

    def number(self, name: str) -> float:
        value = self._values.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_COUNT:
            return float(value)
        self._refuse(name, "a number")

    def object(self, name: str) -> "Fields":
        return Fields(self._values.get(name), f"{self.where}.{name}")

    def objects(self, name: str) -> "Iterator[Fields]":
        """Those of a list of objects."""
        for at, value in enumerate(self.items(name)):
            yield Fields(value, f"{self.where}.{name}[{at}]")

    def items(self, name: str) -> list[Any]:
        value = self._values.get(name)
        if not isinstance(value, list):
            self._refuse(name, "a list")
        return value

    def counts(self, name: str, most: int = MAX_COUNT - 1) -> list[int]:
        """A list of whole numbers from 0 on."""
        values = self.items(name)
        if not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most for value in values):
            self._refuse(name, f"a list of whole numbers from 0 to {most}")
        return values

    def counts_by_name(self, name: str) -> dict[str, int]:
        found = self.object(name)
        return {key: found.count(key) for key in found._values}

    def _refuse(self, name: str, expected: str) -> NoReturn:
        got = shown(self._values[name]) if name in self._values else "nothing"
        raise ConfigError(f"{self.where}.{name}: got {got}, expected {expected}")


def shown(value: Any) -> str:
    """A wrong value as it may stand in a line, cut where it is long."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def read_json(text: str, where: str) -> Any:
    """The value that a text is. Raises ConfigError for what is no JSON, also where Python is more lenient."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ConfigError(f"{where}: objects within objects without end: not a trace") from None
    except ValueError as error:
        raise ConfigError(
            f"{where}: not JSON ({error}): expected a trace, as fly_trt/inspection/README.md has it"
        ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
