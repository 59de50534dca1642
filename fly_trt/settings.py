"""How a setting is declared once, in Python, for every place where it can be given: as a field of a dataclass with a
`Setting` in its metadata, from which command lines and servers make their flags and request fields.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from fly_trt.checks import check_at_least, check_choice, is_number, is_whole
from fly_trt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Setting:
    """A value that may be given or be None.

    kind: str, int or float; of each item where it `is_list`. choices: the values that there are, where they are names;
    a table, so that it is up to date. least, most: of a number. search: values that fly-tune tries beside the default;
    where there are choices it tries those.
    """

    kind: type
    help: str
    metavar: str | None = None
    choices: Collection[str] | None = None
    least: float = 0
    most: float | None = None
    is_list: bool = False
    search: Sequence[Any] = ()

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError for what the setting cannot be."""
        if self.is_list:
            self._check_list(name, value)
        elif self.choices is not None:
            check_choice(name, value, (None, *self.choices))
        elif value is None:
            return
        elif self.kind is int and self.most is None:
            check_at_least(name, value, int(self.least))
        elif not self._is_number(value):
            kind = "a whole number" if self.kind is int else "a number"
            limit = "" if self.most is None else f" and <= {self.most:g}"
            raise ConfigError(f"{name} {value!r}: expected {kind} >= {self.least:g}{limit}")

    def _is_number(self, value: Any) -> bool:
        is_right_kind = is_whole(value) if self.kind is int else is_number(value)
        return is_right_kind and self.least <= value and (self.most is None or value <= self.most)

    def _check_list(self, name: str, value: Any) -> None:
        if value is None:
            return
        is_item = is_whole if self.kind is int else _is_text
        if isinstance(value, (str, bytes)) or not isinstance(value, Collection) or not all(map(is_item, value)):
            items = "whole numbers" if self.kind is int else "non-empty strings"
            raise ConfigError(f"{name} {value!r}: expected a list of {items}")


def setting(kind: type, text: str, **more: Any) -> Any:
    """A dataclass field that is None unless given."""
    return field(default=None, metadata={"setting": Setting(kind, text, **more)})


def settings_of(cls: Any) -> dict[str, Setting]:
    """The declared settings of a dataclass, by name."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(cls) if "setting" in f.metadata}


def check_settings(values: Any, but: Collection[str] = ()) -> None:
    """Checks the declared settings of a dataclass's instance, `but` for some. Raises ConfigError."""
    for name, declared in settings_of(type(values)).items():
        if name not in but:
            declared.check(name, getattr(values, name))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
