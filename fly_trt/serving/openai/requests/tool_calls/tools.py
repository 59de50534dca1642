"""The functions that a request lets the model call, and which of them it must."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fly_trt.serving.openai.http.errors import ApiError

MAX_TOOLS = 128
MAX_CHARACTERS = 100_000  # of all of them, as JSON
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

Choice = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True, slots=True)
class Tool:
    """One function. parameters: a JSON Schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]
    description: str | None = None

    def as_template_variable(self) -> dict[str, Any]:
        """As chat templates expect it, without what only concerns the server."""
        description = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **description, "parameters": self.parameters}}


def read_tools(given: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """From OpenAI's {"type": "function", "function": {...}}. Raises ApiError."""
    if len(given) > MAX_TOOLS:
        raise invalid("tools", f"{len(given)} functions, at most {MAX_TOOLS}: leave some out")
    tools = [_read_tool(f"tools[{number}].function", tool["function"]) for number, tool in enumerate(given)]
    size = len(json.dumps(list(given)))
    if size > MAX_CHARACTERS:
        raise invalid("tools", f"{size} characters as JSON, at most {MAX_CHARACTERS}: shorten them")
    names: set[str] = set()
    for number, tool in enumerate(tools):
        if tool.name in names:
            raise invalid(f"tools[{number}].function.name", f"{tool.name!r} is there twice: give each its own name")
        names.add(tool.name)
    return tuple(tools)


def _read_tool(where: str, function: Mapping[str, Any]) -> Tool:
    name, parameters = function["name"], function.get("parameters")
    if not NAME.fullmatch(name):
        raise invalid(f"{where}.name", f"{name[:80]!r}: expected 1 to 64 letters, digits, underscores and hyphens")
    if not parameters:
        return Tool(name, NO_PARAMETERS, function.get("description"))
    if (kind := parameters.get("type", "object")) != "object":
        raise invalid(f"{where}.parameters.type", f"{kind!r}: expected 'object', which is what arguments are")
    return Tool(name, parameters, function.get("description"))


def read_choice(given: Any, tools: Sequence[Tool]) -> tuple[Choice, tuple[Tool, ...]]:
    """From OpenAI's tool_choice, and which of the tools may be called. Raises ApiError."""
    if given is None:
        return ("auto", tuple(tools)) if tools else ("none", ())
    if given == "none":
        return "none", ()
    if not tools:
        raise invalid("tool_choice", f"{_said(given)}: there are no tools: give tools, or leave it out")
    if given in ("auto", "required"):
        return given, tuple(tools)
    name = given["function"]["name"] if isinstance(given, Mapping) else given
    named = tuple(tool for tool in tools if tool.name == name)
    if not named:
        names = ", ".join(tool.name for tool in tools[:8]) + (", ..." if len(tools) > 8 else "")
        raise invalid("tool_choice.function.name", f"{str(name)[:80]!r} is none of the tools: expected one of {names}")
    return "named", named


def _said(choice: Any) -> str:
    return repr(choice) if isinstance(choice, str) else "a function"


def invalid(field: str, message: str) -> ApiError:
    """field: where it is in the body, and perhaps whose it is."""
    return ApiError(400, f"{field}: {message}", param=field.split(" ")[0], code="invalid_value")
