"""Tools that a model may call: how its calls are told from its text, and how one is made to come."""

from fly_trt.errors import ConfigError
from fly_trt.serving.openai.requests.tool_calls.deltas import Delta, ToolCall, ToolParser, collect
from fly_trt.serving.openai.requests.tool_calls.parser import CallFormat, CallParser

PARSERS = {
    "hermes": CallFormat(begin="<tool_call>", end="</tool_call>", arguments="arguments", between="\n"),
    "llama3_json": CallFormat(
        begin="<|python_tag|>", arguments="parameters", between="; ", is_bare=True, begin_is_text=False
    ),
}
"""Formats by the name that `--tool-call-parser` takes."""

__all__ = ["PARSERS", "CallFormat", "Delta", "ToolCall", "ToolParser", "collect", "detect", "make_parser"]


def make_parser(name: str, *, max_calls: int | None = None) -> ToolParser:
    """For one answer. Raises ConfigError for an unknown name."""
    check_parser(name)
    return CallParser(PARSERS[name], max_calls=max_calls)


def check_parser(name: str) -> None:
    """Raises ConfigError unless it is one of PARSERS."""
    if name not in PARSERS:
        raise ConfigError(f"tool_call_parser {name!r}: expected one of {', '.join(PARSERS)}")


def detect(template: str) -> str | None:
    """The name of the parser for what a chat template tells a model to write; None where none is known for it."""
    if "<tool_call>" in template and not any(mark in template for mark in ("<function=", "<arg_key>")):
        return "hermes"
    if '"parameters"' in template and any(mark in template for mark in ("<|python_tag|>", "ipython")):
        return "llama3_json"
    return None
