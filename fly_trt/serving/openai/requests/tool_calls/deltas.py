"""What a tool parser makes of a text: pieces of content and pieces of calls, in the order of the text."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of content, or of the call `index`: its first has `id` and `name`, the later ones have only more of
    `arguments`, which is JSON text as the model wrote it."""

    content: str = ""
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolParser(Protocol):
    """Reads one answer as it comes. What all its deltas make together does not depend on where the text was cut."""

    def feed(self, text: str) -> list[Delta]:
        """What can be told now; what may yet become a call or a part of a marker is held back."""

    def finish(self) -> list[Delta]:
        """What was held back, now that the text has ended."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str


def collect(deltas: Iterable[Delta]) -> tuple[str, list[ToolCall]]:
    """The content and the calls of a whole answer."""
    content: list[str] = []
    calls: list[tuple[str, str, list[str]]] = []
    for delta in deltas:
        if delta.index is None:
            content.append(delta.content)
        elif delta.id is not None and delta.name is not None:
            calls.append((delta.id, delta.name, [delta.arguments]))
        else:
            calls[delta.index][2].append(delta.arguments)
    return "".join(content), [ToolCall(id, name, "".join(arguments)) for id, name, arguments in calls]


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
