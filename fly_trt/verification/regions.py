"""Regions of a text, found as it comes: inside code fences, inside JSON, before or after a tag, at digits.

A region reads the output's text piece by piece, one piece a token, and says whether the next piece lies in it. Markers
may be spread over pieces. It knows text alone.

    code            between ``` and the next ```, wherever they are
    json            from a { to the } that closes it, braces in strings aside
    digits          pieces that have a digit
    before:TAG      up to the first TAG: before:</think> is what a reasoning model thinks
    after:TAG       from there on
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Self

from fly_trt.errors import ConfigError

FENCE = "```"


class Region(ABC):
    """Whether the next piece of a text is in it; `read` goes past that piece."""

    def copy(self) -> Self:
        return copy(self)

    @abstractmethod
    def has(self, piece: str) -> bool: ...

    def read(self, piece: str) -> None:  # noqa: B027 - a region may be one that looks at the piece alone
        pass


class _Code(Region):
    def __init__(self) -> None:
        self._is_inside = False
        self._num_ticks = 0

    def has(self, piece: str) -> bool:
        return self._is_inside

    def read(self, piece: str) -> None:
        for character in piece:
            self._num_ticks = self._num_ticks + 1 if character == "`" else 0
            if self._num_ticks == len(FENCE):
                self._is_inside = not self._is_inside
                self._num_ticks = 0


class _Json(Region):
    def __init__(self) -> None:
        self._depth = 0
        self._is_string = self._is_escaped = False

    def has(self, piece: str) -> bool:
        return self._depth > 0

    def read(self, piece: str) -> None:
        for character in piece:
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_string:
                self._is_escaped = character == "\\"
                self._is_string = character != '"'
            elif character == '"':
                self._is_string = self._depth > 0
            elif character == "{":
                self._depth += 1
            elif character == "}":
                self._depth = max(0, self._depth - 1)


class _Digits(Region):
    def has(self, piece: str) -> bool:
        return any(character.isdigit() for character in piece)


class _Tag(Region):
    """Up to where the tag ends, or from there on."""

    def __init__(self, tag: str, *, is_after: bool) -> None:
        self._tag = tag
        self._is_after = is_after
        self._was_met = False
        self._tail = ""

    def has(self, piece: str) -> bool:
        return self._was_met == self._is_after

    def read(self, piece: str) -> None:
        if self._was_met:
            return
        text = self._tail + piece
        self._was_met = self._tag in text
        self._tail = text[-(len(self._tag) - 1) :] if len(self._tag) > 1 else ""


PLAIN: dict[str, Callable[[], Region]] = {"code": _Code, "json": _Json, "digits": _Digits}


def make_region(name: str) -> Region:
    """Raises ConfigError for a name that is none of those above."""
    if name in PLAIN:
        return PLAIN[name]()
    kind, _, tag = name.partition(":")
    if kind in ("before", "after") and tag:
        return _Tag(tag, is_after=kind == "after")
    raise ConfigError(f"exact_within {name!r}: expected {', '.join(PLAIN)}, before:TAG or after:TAG")
