"""A text that comes in pieces, for a reader that is written as if it were all there.

The reader is a generator: where it needs a character that has not come it yields, and goes on when more was added. It
can hold what it reads, and put it back. Each character is copied a bounded number of times.
"""

import re
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

SPACES = re.compile(r"[ \t\r\n]+")


class TextStream:
    """What of a text has come and was not read yet."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._is_whole = False
        self._held: list[str] | None = None

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """Nothing more will be added."""
        self._is_whole = True

    def hold(self) -> None:
        """What is read from here on can be put back."""
        self._held = []

    def release(self) -> None:
        self._held = None

    def put_back(self) -> None:
        """All that was read since `hold`."""
        self.add("")
        self._text = "".join(self._held or ()) + self._text
        self._held = None

    def peek(self) -> Reading[str]:
        """The next character, "" at the end."""
        while self._at == len(self._text) and not self._is_whole:
            yield
        return self._text[self._at : self._at + 1]

    def at(self, marker: str) -> Reading[bool]:
        """Whether the marker comes next."""
        while True:
            there = self._text[self._at : self._at + len(marker)]
            if there == marker:
                return True
            if self._is_whole or not marker.startswith(there):
                return False
            yield

    def pass_over(self, marker: str) -> Reading[bool]:
        """Whether the marker came next; if so it was read."""
        found = yield from self.at(marker)
        if found:
            self.read(len(marker))
        return found

    def spaces(self) -> Reading[None]:
        """Reads the white space that JSON allows."""
        while (yield from self.peek()) and self.run(SPACES):
            pass

    def read(self, length: int) -> str:
        """The next characters, which are known to be there."""
        text = self._text[self._at : self._at + length]
        self._at += length
        if self._held is not None:
            self._held.append(text)
        return text

    def run(self, pattern: re.Pattern[str]) -> str:
        """As much of what is there as the pattern matches."""
        found = pattern.match(self._text, self._at)
        return self.read(found.end() - self._at) if found else ""

    def before(self, marker: str) -> str:
        """All that is there and can be neither the marker nor its beginning."""
        end = self._text.find(marker, self._at)
        if end < 0:
            end = len(self._text)
            if not self._is_whole:
                longest = min(len(marker) - 1, end - self._at)
                end -= next((n for n in range(longest, 0, -1) if self._text.endswith(marker[:n])), 0)
        return self.read(end - self._at)
