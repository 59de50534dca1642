"""Tools through the official client: calls that are forced and calls that a text has, whole and streamed."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openai import BadRequestError

from call_texts import HERMES, LLAMA

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Bergen {}", 'Ny "Å"']},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "now": {"type": "object", "maxProperties": 0}}


def tool(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    function = {"name": name, "description": f"The {name}", "strict": True}
    return {"type": "function", "function": function | ({} if parameters is None else {"parameters": parameters})}


TOOLS = [tool("weather", WEATHER), tool("now", None)]
NAMED = {"type": "function", "function": {"name": "weather"}}
ASK = [{"role": "user", "content": "Spell out: 21."}]


@pytest.fixture
def hermes(server: Any, hermes_engine: Path) -> Any:
    return server(hermes_engine)


@pytest.fixture
def llama(server: Any, llama_engine: Path) -> Any:
    return server(llama_engine)


@pytest.fixture(params=["hermes", "llama"])
def either(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def ask(running: Any, **body: Any) -> Any:
    body = {"model": "demo", "messages": ASK, "temperature": 0, "max_tokens": 200, "tools": TOOLS} | body
    return running.client.chat.completions.create(**{name: value for name, value in body.items() if value != "unset"})


def whole(running: Any, **body: Any) -> list[tuple[Any, ...]]:
    """Content, calls and finish reason of each choice."""
    choices = ask(running, **body).choices
    for choice in choices:
        calls = choice.message.tool_calls
        assert calls is None or (calls and len({call.id for call in calls}) == len(calls))
    return [
        (
            choice.message.content,
            [(call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()],
            choice.finish_reason,
        )
        for choice in choices
    ]


def streamed(running: Any, **body: Any) -> list[tuple[Any, ...]]:
    """The same by hand from the chunks of a stream, each of which may bring one piece of one call."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in ask(running, stream=True, **body):
        for choice in chunk.choices:
            one = found.setdefault(choice.index, {"content": "", "calls": [], "reason": None})
            assert one["reason"] is None
            one["content"] += choice.delta.content or ""
            one["reason"] = choice.finish_reason
            for piece in choice.delta.tool_calls or ():
                if piece.index == len(one["calls"]):
                    assert piece.id.startswith("call_")
                    one["calls"].append([piece.type, piece.function.name, ""])
                else:
                    assert (piece.id, piece.type, piece.function.name) == (None, None, None)
                one["calls"][piece.index][2] += piece.function.arguments
    return [
        (one["content"] or (None if one["calls"] else ""), [tuple(call) for call in one["calls"]], one["reason"])
        for _, one in sorted(found.items())
    ]


def same(running: Any, **body: Any) -> list[tuple[Any, ...]]:
    """What the whole answer says, and the stream and the client's own helper, too."""
    answer = whole(running, **body)
    assert streamed(running, **body) == answer
    given = {"model": "demo", "messages": ASK, "temperature": 0, "max_tokens": 200, "tools": TOOLS} | body
    with running.client.chat.completions.stream(**given) as stream:
        choices = stream.get_final_completion().choices
    by_helper = [
        (
            choice.message.content or (None if choice.message.tool_calls else ""),
            [(call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()],
            choice.finish_reason,
        )
        for choice in choices
    ]
    assert by_helper == answer
    return answer


def saying(text: str) -> dict[str, Any]:
    """Has the model say it, with markers as the tokens that they are."""
    parts = [part for part in re.split("(</?tool_call>)", text) if part]
    spelt = [part if part in ("<tool_call>", "</tool_call>") else json.dumps(part) for part in parts]
    return {"extra_body": {"structured_outputs": {"grammar": f"start: {' '.join(spelt)}\n"}}}


def check_calls(calls: list[tuple[str, str, str]]) -> None:
    for kind, name, arguments in calls:
        assert kind == "function"
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7}])
def test_a_named_function_is_called(either: Any, sampling: dict[str, Any]) -> None:
    [(content, calls, reason)] = same(either, tool_choice=NAMED, **sampling)
    assert (content, [name for _, name, _ in calls], reason) == (None, ["weather"], "stop")
    check_calls(calls)


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_comes(either: Any, seed: int) -> None:
    body = {"tool_choice": "required", "temperature": 1.0, "seed": seed, "parallel_tool_calls": False}
    [(content, calls, reason)] = same(either, **body)
    assert (content, len(calls), reason) == (None, 1, "tool_calls")
    check_calls(calls)


def test_several_calls_may_be_required(hermes: Any) -> None:
    found = [whole(hermes, tool_choice="required", temperature=1.5, seed=seed)[0] for seed in range(4)]
    for _, calls, reason in found:
        assert calls
        check_calls(calls if reason == "tool_calls" else calls[:-1])
    assert max(len(calls) for _, calls, _ in found) > 1


def test_each_completion_has_calls_of_its_own(hermes: Any) -> None:
    found = whole(hermes, tool_choice=NAMED, n=3, temperature=1.5, seed=1)
    assert len(found) == 3
    for _, calls, _ in found:
        check_calls(calls)
    assert streamed(hermes, tool_choice=NAMED, n=3, temperature=1.5, seed=1) == found


def test_drafts_change_no_call(hermes: Any) -> None:
    exact = {"acceptance": "exact"}
    for choice in (NAMED, "required"):
        body = {"tool_choice": choice, "parallel_tool_calls": False}
        plain = whole(hermes, **body, extra_body=exact | {"num_speculative_tokens": 0})
        assert streamed(hermes, **body, extra_body=exact) == plain


@pytest.mark.parametrize("case", [name for name, (text, *_) in HERMES.items() if text])
def test_calls_in_a_text_of_the_hermes_format(hermes: Any, case: str) -> None:
    text, content, calls = HERMES[case]
    body = saying(text)
    [(said, found, reason)] = whole(hermes, **body)
    assert (said or "", [call[1:] for call in found]) == (content, calls)
    assert reason == ("tool_calls" if calls else "stop")
    assert streamed(hermes, **body) == [(said, found, reason)]


@pytest.mark.parametrize("case", [name for name, (text, *_) in LLAMA.items() if "<|python_tag|>" not in text])
def test_calls_in_a_text_of_llamas_format(llama: Any, case: str) -> None:
    text, content, calls = LLAMA[case]
    body = saying(text)
    [(said, found, reason)] = whole(llama, **body)
    assert (said or "", [call[1:] for call in found]) == (content, calls)
    assert streamed(llama, **body) == [(said, found, reason)]


@pytest.mark.parametrize(
    ("grammar", "content", "calls"),
    [
        (r'<|python_tag|> "{\"name\": \"now\", \"parameters\": {}}"', None, [("function", "now", "{}")]),
        (r'"Hi" <|other|> <|python_tag|> "{\"name\": \"now\", \"parameters\": {}}"', "Hi", [("function", "now", "{}")]),
        (
            r'<|other|> "{\"name\": \"now\", \"parameters\": {\"a\": 1" <|other|> "}}"',
            None,
            [("function", "now", '{"a": 1}')],
        ),
        (r'<|python_tag|> "import os" <|other|>', "import os", []),
    ],
)
def test_a_special_marker_is_seen_and_no_special_token_is_text(
    llama: Any, grammar: str, content: Any, calls: Any
) -> None:
    body = {"extra_body": {"structured_outputs": {"grammar": f"start: {grammar}\n"}}}
    [found] = whole(llama, **body)
    assert found == (content, calls, "tool_calls" if calls else "stop")
    assert streamed(llama, **body) == [found]


def test_a_stop_string_ends_arguments_where_it_ends_a_text(hermes: Any) -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": "one two three"}}</tool_call>'
    body = {"stop": ["two"], **saying(text)}
    [found] = whole(hermes, **body)
    assert found[1] == [("function", "now", '{"a": "one ')]
    assert streamed(hermes, **body) == [found]


def test_an_answer_that_is_cut_off_says_so(hermes: Any) -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": "one two three"}}</tool_call>'
    for length in range(1, 24, 4):
        body = {"max_tokens": length, **saying(text)}
        [found] = whole(hermes, **body)
        said, calls, reason = found
        assert reason == "length"
        assert text.startswith(said or "")
        assert not calls or text[text.index('{"a"') :].startswith(calls[0][2])
        assert streamed(hermes, **body) == [found]
    assert calls


def test_usage_and_logprobs_are_of_all_tokens(hermes: Any) -> None:
    body = {"tool_choice": NAMED, "logprobs": True}
    answer = ask(hermes, **body, extra_body={"return_token_ids": True})
    assert answer.usage.completion_tokens == len(answer.choices[0].token_ids)
    assert len(answer.choices[0].logprobs.content) in (
        len(answer.choices[0].token_ids),
        len(answer.choices[0].token_ids) - 1,
    )
    chunks = list(ask(hermes, **body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    logprobs = [
        each.logprob
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for each in choice.logprobs.content
    ]
    assert logprobs == [each.logprob for each in answer.choices[0].logprobs.content]


def prompt_text(running: Any, **body: Any) -> str:
    answer = ask(running, max_tokens=1, extra_body={"return_token_ids": True}, **body)
    text: str = running.llm.tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=False)
    return text


CALLED = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"days":2, "city":"Oslo"}'}}
ANSWERED = [
    *ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"rain": true}'},
]


def test_the_template_is_given_tools_calls_and_results(hermes: Any, llama: Any) -> None:
    shown = prompt_text(hermes, messages=ANSWERED)
    assert (
        '{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": {"type": '
        in shown
    )
    assert '"strict"' not in shown
    assert '<tool_call>\n{"name": "weather", "arguments": {"days": 2, "city": "Oslo"}}\n</tool_call>' in shown
    assert '<tool_response>{"rain": true}</tool_response>' in shown
    shown = prompt_text(llama, messages=ANSWERED)
    assert '"name": "weather",\n' in shown
    assert '{"name": "weather", "parameters": {"days": 2, "city": "Oslo"}}' in shown
    assert 'ipython: "{\\"rain\\": true}"' in shown


def test_tokenize_counts_what_a_chat_with_tools_is_given(either: Any) -> None:
    tools = [*TOOLS, {"type": "function", "function": {"name": "bare"}}]
    answer = ask(either, messages=ANSWERED, tools=tools, max_tokens=1, extra_body={"return_token_ids": True})
    found = httpx.post(f"{either.base_url}/tokenize", json={"messages": ANSWERED, "tools": tools}).json()
    assert found["tokens"] == answer.prompt_token_ids
    assert found["count"] == answer.usage.prompt_tokens


def test_a_call_of_an_answer_can_be_sent_back_as_it_came(either: Any) -> None:
    message = ask(either, tool_choice=NAMED).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    history = [*ASK, message.model_dump(exclude_none=True), result]
    again = ask(either, messages=history, tool_choice=NAMED).choices[0].message
    assert again.tool_calls[0].function.name == "weather"


def test_with_none_the_model_is_told_of_no_tools(hermes: Any) -> None:
    assert prompt_text(hermes, tool_choice="none") == prompt_text(hermes, tools="unset")
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    body = {"tool_choice": "none", **saying(text)}
    assert whole(hermes, **body) == [(text, [], "stop")]


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}}, "required": ["n"]}
SCHEMA["additionalProperties"] = False
NUMBER = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA, "strict": True}}


def test_an_answer_has_the_form_that_was_asked_for(hermes: Any) -> None:
    for seed in range(3):
        body = {"response_format": NUMBER, "tools": "unset", "temperature": 1.0, "seed": seed}
        [found] = whole(hermes, **body)
        jsonschema.validate(json.loads(found[0]), SCHEMA)
        assert streamed(hermes, **body) == [found]


def test_an_answer_with_tools_has_the_form_or_is_a_call(hermes: Any) -> None:
    for seed in range(4):
        body = {"response_format": NUMBER, "temperature": 1.5, "seed": seed, "parallel_tool_calls": False}
        [(content, calls, reason)] = whole(hermes, **body)
        check_calls(calls)
        assert bool(content) != bool(calls)
        if content:
            jsonschema.validate(json.loads(content), SCHEMA)
        assert streamed(hermes, **body) == [(content, calls, reason)]


BAD = {"properties": {"a": {"type": "strng"}}}
UNKNOWN = {"type": "function", "function": {"name": "rain"}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": "unset", "tool_choice": "required"}, "tool_choice", "'required': there are no tools"),
    (
        {"tool_choice": UNKNOWN},
        "tool_choice.function.name",
        "'rain' is none of the tools: expected one of weather, now",
    ),
    ({"tool_choice": "always"}, "tool_choice", "tool_choice: input should be 'none', 'auto' or 'required'"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.mode", "unknown field"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]", "tools[0].custom"),
    ({"tools": [tool("a b", None)]}, "tools[0].function.name", "'a b': expected 1 to 64"),
    ({"tools": TOOLS * 2}, "tools[2].function.name", "'weather' is there twice"),
    (
        {"tools": [*TOOLS, tool("bad", BAD)], "tool_choice": "required"},
        "tools[2].function.parameters",
        "parameters of 'bad': Invalid type: strng: mend it",
    ),
    (
        {"response_format": NUMBER, "tool_choice": "required"},
        "response_format",
        "cannot be combined with a tool_choice",
    ),
    (
        {"response_format": NUMBER, "extra_body": {"structured_outputs": {"regex": "a"}}},
        "response_format",
        "cannot be combined with structured_outputs",
    ),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "'structural_tag': not supported"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD}}},
        "response_format.json_schema.schema",
        "Invalid type: strng: mend it",
    ),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_in_one_line_with_its_field(
    hermes: Any, body: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    with pytest.raises(BadRequestError, match=re.escape(message)) as raised:
        ask(hermes, stream=stream, **body)
    assert raised.value.param.startswith(param)
    assert "\n" not in raised.value.body["message"]


def test_a_model_without_a_format_of_calls_refuses_tools_and_can_be_given_one(
    server: Any, demo: Any, demo_engine: Path
) -> None:
    with pytest.raises(BadRequestError, match="start the server with --tool-call-parser hermes or llama3_json"):
        ask(demo)
    chosen = server(demo_engine, tool_call_parser="llama3_json")
    [(content, calls, _)] = whole(chosen, tool_choice=NAMED)
    assert content is None
    check_calls(calls)
