"""Calls of tools in a model's answer, read as the text comes.

A call is a JSON object with a name and an object of arguments, in either order. It is told as soon as it can be nothing
else, which is when both its name and the beginning of its arguments are known; its arguments then follow as they come,
up to the brace that closes them. Their inside is not judged: a model may write JSON that is none, and its caller then
gets what it wrote. What turns out not to be a call is content, every character of it. White space alone before, between
and after calls is neither.

This module knows text and markers, and nothing of requests, tokens or the functions there are.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from fly_trt.serving.openai.requests.tool_calls.deltas import Delta, new_call_id
from fly_trt.serving.openai.requests.tool_calls.stream import Reading, TextStream

ARGUMENTS = ("arguments", "parameters")  # Hermes says the one and Llama 3 the other; models mix them up
IN_STRING = re.compile(r'[^"\\]+')
IN_VALUE = re.compile(r'[^"{}\[\]]+')
SCALAR = re.compile(r'[^ \t\r\n,:"{}\[\]]+')


@dataclass(frozen=True, kw_only=True, slots=True)
class CallFormat:
    """How a model writes calls. begin, end: markers around one, end "" for none. arguments: what it calls them.
    between: what it writes between two.

    is_bare: an answer that begins with a call needs no marker, and calls may follow each other, separated by
    semicolons or white space. begin_is_text: a marker that no call follows is content; else it is a special token,
    which no text shows.
    """

    begin: str
    end: str = ""
    arguments: str
    between: str
    is_bare: bool = False
    begin_is_text: bool = True

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin, self.end) if self.end else (self.begin,)


class CallParser:
    """A ToolParser for one format. max_calls: those that come after so many are left out."""

    def __init__(self, form: CallFormat, *, max_calls: int | None = None) -> None:
        self._form = form
        self._max_calls = max_calls
        self._stream = TextStream()
        self._out: list[Delta] = []
        self._index = -1  # of the last call that was told
        self._is_shown = False
        self._spaces = ""  # white space that content may begin with
        self._has_text = False  # since the beginning or the last call
        self._is_told = False  # the call that is being read
        self._arguments: list[str] = []  # of a call that was not told yet
        self._reading = self._read()

    def feed(self, text: str) -> list[Delta]:
        self._stream.add(text)
        next(self._reading)
        return self._take()

    def finish(self) -> list[Delta]:
        self._stream.end()
        next(self._reading, None)
        if self._spaces and self._index < 0:
            self._emit(Delta(content=self._spaces))
        return self._take()

    def _take(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    def _read(self) -> Reading[None]:
        if self._form.is_bare:
            yield from self._read_calls()
        while True:
            self._say(self._stream.before(self._form.begin))
            if (yield from self._stream.at(self._form.begin)):
                if not (yield from self._read_calls()):
                    marker = self._stream.read(len(self._form.begin))
                    self._say(marker if self._form.begin_is_text else "")
            elif not (yield from self._stream.peek()):
                return

    def _read_calls(self) -> Reading[bool]:
        """Whether there was a call. What follows the last one stays unread."""
        if not (yield from self._read_call(separator="")):
            return False
        if self._form.is_bare:
            while (yield from self._read_call(separator=";")):
                pass
        elif self._form.end:
            self._stream.hold()
            yield from self._stream.spaces()
            if (yield from self._stream.pass_over(self._form.end)):
                self._stream.release()
            else:
                self._stream.put_back()
        return True

    def _read_call(self, *, separator: str) -> Reading[bool]:
        """Whether a call came next; if not, nothing was read."""
        self._is_told = False
        self._arguments.clear()
        self._stream.hold()
        for mark in (separator, self._form.begin):
            yield from self._stream.spaces()
            yield from self._stream.pass_over(mark)
        yield from self._stream.spaces()
        yield from self._read_object()
        if not self._is_told:
            self._stream.put_back()
        return self._is_told

    def _read_object(self) -> Reading[None]:
        """Reads it to its end, or to where it stops being a call."""
        stream = self._stream
        name, has_arguments = "", False
        if not (yield from stream.pass_over("{")):
            return
        while True:
            yield from stream.spaces()
            if (yield from stream.at("}")):
                break
            key = yield from self._read_string()
            yield from stream.spaces()
            if key is None or not (yield from stream.pass_over(":")):
                return
            yield from stream.spaces()
            if key == "name" and not name:
                name = (yield from self._read_string()) or ""
                if not name:
                    return
                if has_arguments:
                    self._tell(name)
            elif key in ARGUMENTS and not has_arguments:
                if not (yield from stream.at("{")):
                    return
                has_arguments = True
                if name:
                    self._tell(name)
                yield from self._read_value(self._argue)
            else:
                yield from self._read_value(_forget)
            yield from stream.spaces()
            if not (yield from stream.pass_over(",")):
                break
        if not (yield from stream.pass_over("}")):
            return
        if name and not has_arguments and not self._form.is_bare:
            self._argue("{}")
            self._tell(name)

    def _read_string(self) -> Reading[str | None]:
        """Its value; None where none comes that is text."""
        raw: list[str] = []
        if not (yield from self._read_raw_string(raw.append)):
            return None
        try:
            value: str = json.loads("".join(raw), strict=False)
            value.encode()
        except ValueError:
            return None
        return value

    def _read_raw_string(self, keep: Callable[[str], None]) -> Reading[bool]:
        """Whether a whole string came."""
        stream = self._stream
        if not (yield from stream.at('"')):
            return False
        keep(stream.read(1))
        while char := (yield from stream.peek()):
            if char == "\\":
                keep(stream.read(1))
                if (yield from stream.peek()):
                    keep(stream.read(1))
            elif char == '"':
                keep(stream.read(1))
                return True
            else:
                keep(stream.run(IN_STRING))
        return False

    def _read_value(self, keep: Callable[[str], None]) -> Reading[None]:
        """Reads a value to where its brackets close, whatever is within them."""
        stream = self._stream
        depth = 0
        while char := (yield from stream.peek()):
            if char == '"':
                yield from self._read_raw_string(keep)
            elif char in "{[":
                depth += 1
                keep(stream.read(1))
            elif char in "}]" and depth:
                depth -= 1
                keep(stream.read(1))
            elif depth:
                keep(stream.run(IN_VALUE))
                continue
            else:
                while (yield from stream.peek()) and stream.run(SCALAR):
                    pass
            if depth == 0:
                return

    def _say(self, text: str) -> None:
        if not self._has_text:
            self._spaces += text
            if not text or self._spaces.isspace():
                return
            text, self._spaces, self._has_text = self._spaces, "", True
        if text:
            self._emit(Delta(content=text))

    def _tell(self, name: str) -> None:
        """The call is one: what comes of it now can no longer be content."""
        self._stream.release()
        self._is_told, self._has_text, self._spaces = True, False, ""
        self._index += 1
        self._is_shown = self._max_calls is None or self._index < self._max_calls
        if self._is_shown:
            self._emit(Delta(index=self._index, id=new_call_id(), name=name))
        self._argue("".join(self._arguments))

    def _argue(self, text: str) -> None:
        if not self._is_told:
            self._arguments.append(text)
        elif self._is_shown and text:
            self._emit(Delta(index=self._index, arguments=text))

    def _emit(self, delta: Delta) -> None:
        """Joined with the piece before it where that is of the same kind."""
        last = self._out[-1] if self._out else None
        if last is None or last.index != delta.index or last.id is not None:
            self._out.append(delta)
        else:
            self._out[-1] = replace(
                last, content=last.content + delta.content, arguments=last.arguments + delta.arguments
            )


def _forget(text: str) -> None:
    """What a call says besides its name and arguments."""
