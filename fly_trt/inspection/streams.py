"""A stream of server-sent events, saved as it came, put together to what the same answer is without a stream."""

from collections.abc import Iterator
from typing import Any

from fly_trt.errors import ConfigError
from fly_trt.inspection.fields import Fields, read_json

FIELDS = ("data:", "event:", "id:", "retry:", ":")
DONE = "[DONE]"


def is_event_stream(text: str) -> bool:
    """Whether a file's first line is one of such a stream."""
    return text.lstrip().startswith(FIELDS)


def merged_chunks(text: str, where: str) -> dict[str, Any]:
    """The answer that the chunks make: its text, its trace and what its last chunk says of it as a whole. A stream that
    broke off is what came of it. Raises ConfigError for what is no stream of fly-serve."""
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for number, data in _events(text):
        if data == DONE:
            break
        at = f"{where}, line {number}"
        chunk = Fields(read_json(data, at), at)
        if chunk.has("error"):
            raise ConfigError(f"{at}: the error that a server answered, expected the chunks of an answer")
        answer |= {name: chunk.raw(name) for name in ("id", "model", "usage", "metrics") if chunk.has(name)}
        for choice in chunk.objects("choices"):
            index = choice.count("index")
            _add(choices.setdefault(index, {"index": index, "text": ""}), choice)
    return answer | {"choices": [choices[index] for index in sorted(choices)]}


def _add(whole: dict[str, Any], choice: Fields) -> None:
    if choice.has("text"):
        whole["text"] += choice.text("text")
    elif choice.has("delta"):
        delta = choice.object("delta")
        whole["text"] += delta.text("content") if delta.has("content") else ""
    if choice.has("finish_reason"):
        whole["finish_reason"] = choice.text("finish_reason")
    for name in ("speculation_trace", "speculation_rounds"):
        if choice.has(name):
            whole.setdefault(name, []).extend(choice.items(name))


def _events(text: str) -> Iterator[tuple[int, str]]:
    """The data of each event, and the line that it begins in."""
    data: list[str] = []
    first = 0
    for number, line in enumerate([*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), ""], start=1):
        if line.startswith("data:"):
            first = first if data else number
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield first, "\n".join(data)
            data = []
