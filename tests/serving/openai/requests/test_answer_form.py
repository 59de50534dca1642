"""What one request asks of the form of its answer."""

import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fly_trt.errors import ConfigError, RequestError
from fly_trt.grammar import GrammarCompiler
from fly_trt.serving.openai.http.errors import ApiError
from fly_trt.serving.openai.requests.answer_form import ToolCalling
from fly_trt.serving.openai.requests.tool_calls import collect

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENIZER = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(ALPHABET)}, merges=[]))
TOKENIZER.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZER.decoder = decoders.ByteLevel()
COMPILER = GrammarCompiler(TOKENIZER, len(ALPHABET))
HERMES = ToolCalling("hermes", "", TOKENIZER)
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
NAMED = {"type": "function", "function": {"name": "g"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}


def test_without_tools_a_text_is_all_content() -> None:
    form = HERMES.read()
    assert [delta.content for delta in form.new_reader().read(CALL, is_last=True)] == [CALL]
    assert form.template_variables == form.sampling == {}


def test_tools_that_are_not_to_be_called_are_not_shown_to_the_model() -> None:
    form = HERMES.read(tools=TOOLS, tool_choice="none")
    assert [delta.content for delta in form.new_reader().read(CALL, is_last=True)] == [CALL]
    assert form.template_variables == form.sampling == {}


def test_the_template_is_told_of_all_tools_also_where_one_is_named() -> None:
    for choice in (None, "auto", "required", NAMED):
        names = [
            tool["function"]["name"]
            for tool in HERMES.read(tools=TOOLS, tool_choice=choice).template_variables["tools"]
        ]
        assert names == ["f", "g"]


def test_what_the_model_decides_is_not_held_to_a_grammar() -> None:
    assert HERMES.read(tools=TOOLS).sampling == {}


def test_a_response_format_is_structured_output() -> None:
    assert HERMES.read(response_format={"type": "text"}).sampling == {}
    any_object = HERMES.read(response_format={"type": "json_object"}).sampling["structured_outputs"]
    assert any_object.kind == "json_object"
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        schema = HERMES.read(response_format=SCHEMA, **more).sampling["structured_outputs"]
        assert (schema.kind, schema.json) == ("json", {"type": "integer"})


def test_without_parallel_calls_only_the_first_one_is_told() -> None:
    for parallel, number in ((None, 2), (True, 2), (False, 1)):
        reader = HERMES.read(tools=TOOLS, parallel_tool_calls=parallel).new_reader()
        _, calls = collect(reader.read(f"{CALL}\n{CALL}", is_last=True))
        assert len(calls) == number


@pytest.mark.parametrize(
    ("choice", "text", "reason", "said"),
    [
        (None, CALL, "stop", "tool_calls"),
        (None, "Hi", "stop", "stop"),
        (None, CALL, "length", "length"),
        (None, CALL, None, None),
        (None, CALL, "abort", "abort"),
        ("required", CALL, "stop", "tool_calls"),
        ("required", CALL[:-40], "length", "length"),
        (NAMED, CALL, "stop", "stop"),
        (NAMED, CALL, "length", "length"),
    ],
)
def test_the_reason_is_openais(choice: Any, text: str, reason: str | None, said: str | None) -> None:
    reader = HERMES.read(tools=TOOLS, tool_choice=choice).new_reader()
    reader.read(text, is_last=True)
    assert reader.finish_reason(reason) == said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"response_format": SCHEMA, "has_structured_outputs": True},
            "response_format: cannot be combined with structured_outputs: an answer has one form",
        ),
        (
            {"response_format": SCHEMA, "tools": TOOLS, "tool_choice": "required"},
            "response_format: cannot be combined with a tool_choice that forces a call",
        ),
        (
            {"has_structured_outputs": True, "tools": TOOLS, "tool_choice": NAMED},
            "structured_outputs: cannot be combined with a tool_choice that forces a call",
        ),
    ],
)
def test_two_forms_at_once_are_refused_by_name(body: Any, message: str) -> None:
    with pytest.raises(ApiError, match=re.escape(message)):
        HERMES.read(**body)


def test_what_says_nothing_of_the_form_can_be_combined() -> None:
    HERMES.read(response_format={"type": "text"}, has_structured_outputs=True)
    HERMES.read(response_format={"type": "text"}, tools=TOOLS, tool_choice="required")
    assert HERMES.read(tools=TOOLS, has_structured_outputs=True).parser == "hermes"


def test_the_template_says_which_parser_it_is_unless_the_operator_does() -> None:
    template = '<tool_call>\n{"name": ...}'
    assert ToolCalling(None, template, TOKENIZER).read(tools=TOOLS).parser == "hermes"
    assert ToolCalling("llama3_json", template, TOKENIZER).read(tools=TOOLS).parser == "llama3_json"
    with pytest.raises(ConfigError, match="expected one of hermes, llama3_json"):
        ToolCalling("mistral", template, TOKENIZER)


def test_a_model_without_a_known_format_takes_no_tools() -> None:
    unknown = ToolCalling(None, "{{ messages }}", TOKENIZER)
    with pytest.raises(ApiError, match=r"^tools: .* start the server with --tool-call-parser hermes or llama3_json"):
        unknown.read(tools=TOOLS)
    assert unknown.read(tools=TOOLS, tool_choice="none").parser is None


def test_a_schema_that_cannot_be_compiled_is_named() -> None:
    bad = {"type": "object", "properties": {"a": {"type": "strng"}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "h", "parameters": bad}}]
    error = RequestError("structured_outputs.grammar: no")
    explained = HERMES.read(tools=tools, tool_choice="required").explain(error, COMPILER.compile)
    assert isinstance(explained, ApiError)
    assert str(explained) == "tools[2].function.parameters of 'h': Invalid type: strng: mend it"
    assert explained.param == "tools[2].function.parameters"
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": bad}}
    for more in ({}, {"tools": TOOLS}):
        explained = HERMES.read(response_format=schema, **more).explain(error, COMPILER.compile)
        assert str(explained) == "response_format.json_schema.schema: Invalid type: strng: mend it"


def test_a_form_that_is_too_large_is_refused_by_its_own_name() -> None:
    large = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["x" * 200_000]}}}
    with pytest.raises(ApiError, match=r"^response_format\.json_schema\.schema: 2000\d\d characters"):
        HERMES.read(response_format=large)


def test_an_error_of_another_cause_stays_what_it_is() -> None:
    error = RequestError("the prompt is too long")
    for form in (HERMES.read(), HERMES.read(tools=TOOLS), HERMES.read(tools=TOOLS, tool_choice="required")):
        assert form.explain(error, COMPILER.compile) is error
    assert HERMES.read(response_format=SCHEMA).explain(error, COMPILER.compile) is error
