"""Reads traces from whatever has written them, and makes the one form of them: see the README of this room.

A file is one JSON value, JSON Lines, or the lines of a stream of server-sent events. What a value is shows in its
fields. Everything else is refused in one line that says what was got and what was expected.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fly_trt.errors import ConfigError
from fly_trt.inspection.document import (
    COUNTS,
    FORMAT,
    acceptance_of,
    check_size,
    new_document,
    read_document,
    read_finish_reason,
    read_metrics,
    read_rounds,
    read_tokens,
)
from fly_trt.inspection.fields import Fields, read_json, shown
from fly_trt.inspection.streams import is_event_stream, merged_chunks

MAX_BYTES = 256 << 20
GROUP = "the same prompt"
EXPECTED = "a document of fly-inspect, fly-generate --json --trace, or an answer of fly-serve with speculation_trace"

Record = dict[str, Any]


def read_traces(path: str | Path) -> Record:
    """The requests of a file as one document. Raises ConfigError for a file that has no trace."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: not readable ({error.strerror}): give the file of a trace") from None
    return parse_traces(content, str(path))


def parse_traces(content: bytes, where: str) -> Record:
    """The document of what was read at `where`. Raises ConfigError as `read_traces` does."""
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{where}: more than {MAX_BYTES >> 20} MiB: give fewer requests")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text ({error}): expected JSON") from None
    requests = [request for at, value in _values(text, where) for request in _read(value, at)]
    check_size(requests, where)
    return new_document(requests)


def _values(text: str, where: str) -> Iterator[tuple[str, Any]]:
    """Each value of a file, and where it is."""
    if is_event_stream(text):
        yield where, merged_chunks(text, where)
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) > 1 and _is_whole(lines[0][1]):
        for number, line in lines:
            yield f"{where}, line {number}", read_json(line, f"{where}, line {number}")
        return
    value = read_json(text, where)
    if not isinstance(value, list):
        yield where, value
        return
    for at, each in enumerate(value):
        yield f"{where}[{at}]", each


def _is_whole(line: str) -> bool:
    """Whether a line is an object by itself, so that the file has one a line."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read(value: Any, where: str) -> list[Record]:
    fields = Fields(value, where)
    if fields.has("format"):
        if fields.raw("format") != FORMAT:
            raise ConfigError(f"{where}.format: got {shown(fields.raw('format'))}, expected {shown(FORMAT)}")
        return read_document(fields)
    if fields.has("choices"):
        return _read_answer(fields)
    if fields.has("token_ids"):
        return _read_generated(fields)
    if fields.has("error"):
        raise ConfigError(f"{where}: the error that a server answered, expected {EXPECTED}")
    raise ConfigError(f"{where}: got an object without format, choices or token_ids, expected {EXPECTED}")


def _read_generated(fields: Fields) -> list[Record]:
    """What fly-generate prints: one completion, and another to compare it with where that was asked for."""
    if not fields.has("compared"):
        return [_read_completion(fields, "fly-generate", None)]
    compared = fields.object("compared")
    prompt = fields.raw("prompt")
    other = _read_completion(compared, "fly-generate, compared", GROUP) | {"prompt": prompt}
    return [_read_completion(fields, "fly-generate", GROUP), other]


def _read_completion(fields: Fields, name: str, group: str | None) -> Record:
    if not fields.has("trace"):
        raise ConfigError(f"{fields.where}: no trace: print it with fly-generate --json --trace")
    rounds = read_rounds(fields, "rounds")
    return {
        "name": name,
        "group": group,
        "source": "fly-generate",
        "acceptance": acceptance_of(rounds),
        "prompt": fields.text("prompt") if fields.has("prompt") else None,
        "text": fields.text("text"),
        "finish_reason": read_finish_reason(fields),
        "metrics": read_metrics(fields.object("metrics")),
        "tokens": read_tokens(fields, "trace"),
        "rounds": rounds,
    }


def _read_answer(fields: Fields) -> list[Record]:
    """What fly-serve answers with, to completions and to chats. Of several choices nobody knows whose the metrics are,
    but for the rule."""
    choices = list(fields.objects("choices"))
    metrics = fields.object("metrics") if fields.has("metrics") else None
    rule = metrics.text("acceptance") if metrics and metrics.has("acceptance") else None
    model = fields.text("model") if fields.has("model") else "fly-serve"
    name = f"{model} {fields.text('id')}" if fields.has("id") else model
    if len(choices) > 1:
        return [_read_choice(choice, f"{name} #{choice.count('index')}", rule) for choice in choices]
    counts = _metrics_of(fields, metrics) if metrics else None
    return [_read_choice(choice, name, rule) | {"metrics": counts} for choice in choices]


def _read_choice(choice: Fields, name: str, rule: str | None) -> Record:
    if not choice.has("speculation_trace"):
        raise ConfigError(f'{choice.where}: no speculation_trace: ask the server for it with "speculation_trace": true')
    rounds = read_rounds(choice, "speculation_rounds")
    return {
        "name": name,
        "group": None,
        "source": "fly-serve",
        "acceptance": rule or acceptance_of(rounds),
        "prompt": None,
        "text": _text_of(choice),
        "finish_reason": read_finish_reason(choice),
        "metrics": None,
        "tokens": read_tokens(choice, "speculation_trace"),
        "rounds": rounds,
    }


def _text_of(choice: Fields) -> str:
    if choice.has("text"):
        return choice.text("text")
    message = choice.object("message")
    return message.text("content") if message.has("content") else ""


def _metrics_of(answer: Fields, metrics: Fields) -> Record | None:
    """vLLM's object by the runtime's names; None where a server does without."""
    if not metrics.has("speculative_decoding"):
        return None
    said = metrics.object("speculative_decoding")
    known = {name: metrics.raw(name) for name in COUNTS if metrics.has(name)}
    known |= {name: said.raw(name) for name in COUNTS if said.has(name)}
    known["num_accepted_tokens"] = said.raw("num_accepted_draft_tokens")
    if answer.has("usage"):
        usage = answer.object("usage")
        known |= {"num_prompt_tokens": usage.raw("prompt_tokens"), "num_output_tokens": usage.raw("completion_tokens")}
    return read_metrics(Fields(known, metrics.where))
