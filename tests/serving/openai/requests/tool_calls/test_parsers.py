"""Which calls are told from a text, and what of it stays content. Texts are fed whole here; test_cuts.py cuts them."""

import json

import pytest

from call_texts import CALL, HERMES, LLAMA, LLAMA_OTHER, OTHER
from fly_trt.errors import ConfigError
from fly_trt.serving.openai.requests.tool_calls import ToolCall, collect, detect, make_parser


def parse(parser: str, text: str, max_calls: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """The content, and the name and arguments of each call."""
    one = make_parser(parser, max_calls=max_calls)
    content, calls = collect(one.feed(text) + one.finish())
    return content, [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("case", HERMES)
def test_the_hermes_format(case: str) -> None:
    text, *expected = HERMES[case]
    assert parse("hermes", text) == tuple(expected)


@pytest.mark.parametrize("case", LLAMA)
def test_the_json_format_of_llama_3(case: str) -> None:
    text, *expected = LLAMA[case]
    assert parse("llama3_json", text) == tuple(expected)


def test_a_call_has_an_id_of_its_own() -> None:
    parser = make_parser("llama3_json")
    _, calls = collect(parser.feed(f"{LLAMA_OTHER};{LLAMA_OTHER}") + parser.finish())
    assert len({call.id for call in calls}) == 2
    assert all(isinstance(call, ToolCall) and call.id.startswith("call_") for call in calls)


def test_calls_beyond_those_that_are_wanted_are_left_out() -> None:
    text = f"a<tool_call>{CALL}</tool_call>b<tool_call>{OTHER}</tool_call>c"
    assert parse("hermes", text, max_calls=1) == ("abc", [("weather", '{"city": "Oslo"}')])


def test_name_and_arguments_are_told_as_soon_as_they_are_known() -> None:
    parser = make_parser("hermes")
    arguments = json.dumps({"a": "x{", "b": [1, {"c": None}], "é": "\\"}, ensure_ascii=False)
    assert parser.feed('Hi<tool_call>{"name": "f", "arguments": ')[0].content == "Hi"
    told = parser.feed(arguments[0])
    assert (told[0].index, told[0].name, told[0].arguments) == (0, "f", "")
    assert told[1].arguments == "{"
    for character in arguments[1:]:
        assert [delta.arguments for delta in parser.feed(character)] == [character]
    assert parser.feed("}") == parser.feed("</tool_call>") == parser.finish() == []


def test_content_is_held_back_only_where_it_may_begin_a_marker() -> None:
    parser = make_parser("hermes")
    said = [
        "".join(delta.content for delta in parser.feed(text)) for text in ("a", " b\n", "<", "t", "able", "<tool_c")
    ]
    assert said == ["a", " b\n", "", "", "<table", ""]
    assert [delta.content for delta in parser.finish()] == ["<tool_c"]


def test_an_unknown_parser_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="tool_call_parser 'pythonic': expected one of hermes, llama3_json"):
        make_parser("pythonic")


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        (
            'return a json object within <tool_call></tool_call> XML tags:\n{"name": <function-name>, "arguments": ..}',
            "hermes",
        ),
        ("<tool_call>\n<function=example>\n<parameter=a>", None),
        ("<tool_call>{name}\n<arg_key>k</arg_key>", None),
        (
            '{"name": function name, "parameters": dictionary of argument name and its value}. {% if ipython %}',
            "llama3_json",
        ),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", None),
        ("", None),
    ],
)
def test_the_format_is_found_in_the_chat_template(template: str, parser: str | None) -> None:
    assert detect(template) == parser
