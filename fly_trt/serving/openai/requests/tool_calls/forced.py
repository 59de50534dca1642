"""Grammars that make a call come, in the syntax that the model was trained on: markers, then one line of JSON as
json.dumps writes it, with arguments that their schema allows. In llguidance's Lark, which has JSON Schemas in it.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fly_trt.serving.openai.requests.tool_calls.parser import CallFormat
from fly_trt.serving.openai.requests.tool_calls.tools import Tool

# Where two parts of a grammar begin alike, llguidance can follow both only if it reads them in the same pieces: one
# form for all JSON, and the pieces of JSON also where a text is known in advance.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def calls_grammar(
    form: CallFormat,
    tools: Sequence[Tool],
    *,
    is_one: bool,
    tokens: Collection[str],
    answer: Mapping[str, Any] | bool | None = None,
) -> str:
    """One call of one of the tools, or, unless `is_one`, several. tokens: markers that are one token of the tokenizer.
    answer: the schema of what may come instead."""
    begin, between = _marker(form.begin, tokens), _text(form.between)
    call = "one" if form.is_bare else f'{begin} "\\n" one "\\n" {_marker(form.end, tokens)}'
    lines = [
        f"start: calls{'' if answer is None else ' | answer'}",
        f"calls: call{'' if is_one else f' ({between} call)*'}",
        f"call: {call}",
        f"one: {' | '.join(f'call_{number}' for number in range(len(tools)))}",
    ]
    for number, tool in enumerate(tools):
        pieces = ("{", '"name"', ": ", f'"{tool.name}"', ", ", f'"{form.arguments}"', ": ")
        head = " ".join(map(_text, pieces))
        lines.append(f'call_{number}: {head} arguments_{number} "}}"')
        lines.append(f"arguments_{number}: %json {_schema_text(arguments_schema(tool))}")
    if answer is not None:
        lines.append(f"answer: %json {_schema_text(answer)}")
    return "\n".join(lines) + "\n"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    return {"type": "object", **tool.parameters}


def _schema_text(schema: Mapping[str, Any] | bool) -> str:
    whole = {} if schema is True else {"not": {}} if schema is False else dict(schema)
    return json.dumps(whole | {"x-guidance": JSON_FORM})


def _marker(marker: str, tokens: Collection[str]) -> str:
    """A token has a syntax of its own."""
    return marker if marker in tokens else _text(marker)


def _text(text: str) -> str:
    return json.dumps(text)
