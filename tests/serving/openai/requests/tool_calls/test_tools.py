"""Tools and tool_choice as requests give them: what is taken, and what is refused, naming the field."""

import re
from typing import Any

import pytest

from fly_trt.serving.openai.http.errors import ApiError
from fly_trt.serving.openai.requests.tool_calls.tools import MAX_TOOLS, read_choice, read_tools

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def test_the_template_is_told_what_the_caller_said_of_a_function() -> None:
    (read,) = read_tools([tool("weather", description="Of a city", parameters=PARAMETERS, strict=True)])
    assert read.as_template_variable() == tool("weather", description="Of a city", parameters=PARAMETERS)


def test_a_function_without_parameters_takes_none() -> None:
    for function in ({}, {"parameters": None}, {"parameters": {}}):
        (read,) = read_tools([tool(**function)])
        assert read.as_template_variable() == tool(
            parameters={"type": "object", "properties": {}, "additionalProperties": False}
        )


@pytest.mark.parametrize(
    ("tools", "field", "message"),
    [
        ([tool("a b")], "tools[0].function.name", "'a b': expected 1 to 64 letters, digits, underscores and hyphens"),
        ([tool(), tool("")], "tools[1].function.name", "'': expected 1 to 64 letters"),
        ([tool("x" * 65)], "tools[0].function.name", "expected 1 to 64 letters"),
        ([tool("é")], "tools[0].function.name", "expected 1 to 64 letters"),
        ([tool("f\n")], "tools[0].function.name", "expected 1 to 64 letters"),
        ([tool(), tool("g"), tool()], "tools[2].function.name", "'f' is there twice: give each its own name"),
        ([tool(parameters={"type": "array"})], "tools[0].function.parameters.type", "'array': expected 'object'"),
        ([tool(f"f{i}") for i in range(129)], "tools", f"129 functions, at most {MAX_TOOLS}: leave some out"),
        ([tool(description="x" * 100_000)], "tools", "characters as JSON, at most 100000: shorten them"),
    ],
)
def test_what_is_wrong_with_tools_is_said_of_their_field(tools: list[Any], field: str, message: str) -> None:
    with pytest.raises(ApiError, match=f"^{re.escape(field)}: .*{re.escape(message)}") as raised:
        read_tools(tools)
    assert (raised.value.status, raised.value.param, raised.value.code) == (400, field, "invalid_value")


@pytest.mark.parametrize(
    ("given", "choice", "names"),
    [
        (None, "auto", ["f", "g"]),
        ("auto", "auto", ["f", "g"]),
        ("required", "required", ["f", "g"]),
        ("none", "none", []),
        (tool("g"), "named", ["g"]),
    ],
)
def test_a_choice_says_what_may_be_called(given: Any, choice: str, names: list[str]) -> None:
    found, may_be_called = read_choice(given, read_tools([tool("f"), tool("g")]))
    assert (found, [each.name for each in may_be_called]) == (choice, names)


def test_without_tools_nothing_is_called() -> None:
    assert read_choice(None, ()) == read_choice("none", ()) == ("none", ())


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        ("auto", [], "tool_choice: 'auto': there are no tools: give tools, or leave it out"),
        ("required", [], "tool_choice: 'required': there are no tools"),
        (tool("f"), [], "tool_choice: a function: there are no tools"),
        (tool("h"), ["f", "g"], "tool_choice.function.name: 'h' is none of the tools: expected one of f, g"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(given: Any, names: list[str], message: str) -> None:
    with pytest.raises(ApiError, match=re.escape(message)):
        read_choice(given, read_tools([tool(name) for name in names]))
