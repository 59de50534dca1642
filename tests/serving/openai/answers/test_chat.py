"""/v1/chat/completions through the official client: answers are those of LLM.chat, whole and streamed."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from eval_prompts import load_eval_prompts
from fly_trt import LLM, RequestError, SamplingParams
from fly_trt.serving.openai.requests.messages import template_messages
from fly_trt.serving.openai.requests.protocol import Message

QUESTIONS = [
    record["prompt"].removeprefix("### Instruction:\n").removesuffix("\n### Response:\n")
    for record in load_eval_prompts()[:8]
]
TOKENS = {"return_token_ids": True}


def user(text: Any) -> list[Any]:
    return [{"role": "user", "content": text}]


def ask(client: OpenAI, messages: Any, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"max_completion_tokens": 32, "temperature": 0, **fields}
    return client.chat.completions.create(model="demo", messages=messages, extra_body=extra, **fields)


def joined(stream: Any) -> dict[int, dict[str, Any]]:
    """What the chunks of a stream come to, by choice. The first one of each has its role and no text."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            if choice.index not in found:
                assert (choice.delta.role, choice.delta.content) == ("assistant", "")
                found[choice.index] = {"text": "", "tokens": [], "finish_reason": None}
            one = found[choice.index]
            assert one["finish_reason"] is None, "a chunk after the last one"
            one["text"] += choice.delta.content or ""
            one["tokens"] += getattr(choice, "token_ids", [])
            one["finish_reason"] = choice.finish_reason
    return found


def test_answers_of_many_clients_are_those_of_chat(demo: Any, llm: LLM) -> None:
    outputs = llm.chat([user(question) for question in QUESTIONS], SamplingParams(max_tokens=24))
    fields = {"model": "demo", "max_tokens": 24, "temperature": 0, "extra_body": TOKENS}

    async def whole(client: Any, question: str) -> tuple[str, list[int]]:
        found = await client.chat.completions.create(messages=user(question), **fields)
        return found.choices[0].message.content, found.choices[0].token_ids

    async def streamed(client: Any, question: str) -> tuple[str, list[int]]:
        text, tokens = "", []
        async for chunk in await client.chat.completions.create(messages=user(question), stream=True, **fields):
            text += chunk.choices[0].delta.content or ""
            tokens += getattr(chunk.choices[0], "token_ids", [])
        return text, tokens

    async def ask_all() -> list[Any]:
        async with demo.async_client() as client:
            return await asyncio.gather(
                *(whole(client, question) for question in QUESTIONS),
                *(streamed(client, question) for question in QUESTIONS),
            )

    expected = [(output.outputs[0].text, output.outputs[0].token_ids) for output in outputs]
    assert asyncio.run(ask_all()) == expected * 2


def test_choices_are_sampled_as_those_of_chat(client: OpenAI, llm: LLM) -> None:
    sampling = {"n": 3, "temperature": 1.2, "seed": 11, "top_p": 0.9}
    expected = llm.chat(user(QUESTIONS[0]), SamplingParams(max_tokens=32, **sampling))[0].outputs
    texts = [completion.text for completion in expected]
    assert len(set(texts)) > 1
    found = ask(client, user(QUESTIONS[0]), **sampling)
    assert [choice.message.content for choice in found.choices] == texts
    streamed = joined(ask(client, user(QUESTIONS[0]), stream=True, **sampling))
    assert [streamed[index]["text"] for index in range(3)] == texts
    assert [streamed[index]["finish_reason"] for index in range(3)] == [c.finish_reason for c in expected]


def test_text_may_come_in_parts(client: OpenAI) -> None:
    question = QUESTIONS[0]
    parts = [{"type": "text", "text": question[:9]}, {"type": "text", "text": question[9:]}]
    assert ask(client, user(parts)).choices[0].message == ask(client, user(question)).choices[0].message


def test_an_answer_can_be_a_message_of_the_next_request(client: OpenAI, llm: LLM) -> None:
    first = ask(client, user(QUESTIONS[0])).choices[0].message
    history = [*user(QUESTIONS[0]), first, *user(QUESTIONS[1])]
    plain = [*user(QUESTIONS[0]), {"role": "assistant", "content": first.content}, *user(QUESTIONS[1])]
    expected = llm.chat(plain, SamplingParams(max_tokens=32))[0].outputs[0].text
    assert ask(client, history).choices[0].message.content == expected
    dumped = [*user(QUESTIONS[0]), first.model_dump(), *user(QUESTIONS[1])]
    assert ask(client, dumped).choices[0].message.content == expected


def test_an_answer_may_fill_the_context(server: Any, demo_engine: Path) -> None:
    client = server(demo_engine, llm_settings={"max_seq_len": 96}).client
    found = ask(client, user(QUESTIONS[0]), max_completion_tokens=None, extra={"ignore_eos": True})
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens > 16
    assert found.usage.total_tokens == 96


def test_a_long_conversation_is_read(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="max_seq_len is 2048"):
        ask(client, user("x " * 11_000))


def test_the_template_gets_what_the_body_says(client: OpenAI) -> None:
    asked = {"chat_template_kwargs": {"enable_thinking": False}, "chat_template": "default"}
    assert ask(client, user("Hi"), extra=asked | {"add_generation_prompt": True}).choices


@pytest.mark.parametrize(
    ("messages", "extra", "message"),
    [
        ([], {}, "messages: list should have at least 1 item"),
        (user(None), {}, r"messages\[0\].content: missing for role 'user'"),
        (
            user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
            {},
            r"messages\[0\].content\[1\].type 'image_url': this model reads texts alone",
        ),
        (user([{"type": "text", "text": 5}]), {}, r"messages\[0\].content\[0\]: expected"),
        ([{"role": "poet", "content": "a"}], {}, r"messages\[0\].role"),
        ([{"role": "user", "content": "a", "mood": "b"}], {}, r"unknown field messages\[0\].mood"),
        (user("a"), {"chat_template": "none"}, "chat_template 'none': expected the name of one"),
        (user("a"), {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: 'messages' is a field"),
        (user("a"), {"top_logprobs": 2}, "top_logprobs 2: has no effect without logprobs"),
        (user("a"), {"logprobs": True, "top_logprobs": 21}, "top_logprobs 21: expected 0 to 20"),
        (user("a"), {"max_tokens": 3}, "max_tokens and max_completion_tokens"),
        (user("a"), {"reasoning_effort": "low"}, "reasoning_effort: not supported"),
        (user("a"), {"prompt": "a"}, "unknown field prompt"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    client: OpenAI, messages: Any, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequestError, match=message):
        ask(client, messages, extra=extra)


def test_calls_of_tools_are_objects_for_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}),
        Message.model_validate({"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"}),
    ]
    assert template_messages(messages, "system") == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
    ]


@pytest.mark.parametrize("arguments", ["{", "1" * 5000 + "x", "[" * 100_000])
def test_arguments_that_are_no_json_are_named(arguments: str) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    message = Message.model_validate({"role": "assistant", "tool_calls": [call]})
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls\[0\].function.arguments: not JSON"):
        template_messages([message], "system")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_developers_are_what_the_template_calls_them(role: str) -> None:
    message = Message.model_validate({"role": "developer", "content": [{"type": "text", "text": "Be brief."}]})
    assert template_messages([message], role) == [{"role": role, "content": "Be brief."}]


@pytest.mark.parametrize("name", ["self", "template", "kwargs"])
def test_a_variable_of_the_template_may_have_any_name(demo: Any, client: OpenAI, name: str) -> None:
    given = {"chat_template_kwargs": {name: 1}}
    assert ask(client, user("Hello"), given, max_completion_tokens=1).usage.completion_tokens == 1
    body = {"messages": user("Hello"), **given}
    assert httpx.post(f"{demo.base_url}/tokenize", json=body).status_code == 200
