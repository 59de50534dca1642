"""Server-sent events: what is on the wire, what ends a stream in the middle, and clients that go away."""

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai import APIError, BadRequestError, OpenAI

from fly_trt import SamplingParams
from fly_trt.engines.onnxruntime import OnnxRuntimeEngine
from fly_trt.serving.openai.answers import generation
from fly_trt.text.prompts import PromptReader

PROMPT = "### Instruction:\nSpell out: 21.\n### Response:\n"
# A request that runs until somebody ends it: with slow steps for half a minute.
ENDLESS = {"model": "demo", "max_tokens": 1500, "ignore_eos": True, "num_speculative_tokens": 0, "temperature": 0}
Z = 91  # the token of the letter; "zz" is two of them
# The first token can only be Z and the second one cannot be anything, which is found when its turn comes.
ENDS_IN_THE_MIDDLE = {
    "stop_token_ids": [token for token in range(896) if token != Z],
    "min_tokens": 5,
    "bad_words": ["zz"],
    "num_speculative_tokens": 0,
}


@pytest.fixture(scope="module")
def client(demo: Any) -> OpenAI:
    return demo.client


def events(demo: Any, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of each event of a stream, as JSON but the last."""
    with httpx.stream("POST", f"{demo.base_url}{path}", json={"model": "demo", "stream": True} | body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = b"".join(response.iter_raw())
    assert raw.isascii(), "some clients end lines at U+2028"
    *found, end = raw.split(b"\n\n")
    assert end == b""
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in found)
    assert found.pop() == b"data: [DONE]"
    return [json.loads(event.removeprefix(b"data: ")) for event in found]


def wait_until(is_true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "still not true"
        time.sleep(0.005)


def num_running(demo: Any) -> float:
    return demo.llm.metrics()["fly_trt:num_requests_running"]


def test_chunks_of_a_completion(demo: Any) -> None:
    found = events(demo, "/v1/completions", {"prompt": PROMPT, "temperature": 0})
    assert len({chunk["id"] for chunk in found}) == len({chunk["created"] for chunk in found}) == 1
    for chunk in found:
        assert (chunk["object"], chunk["model"]) == ("text_completion", "demo")
        assert chunk["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
        assert "usage" not in chunk
    assert [chunk["choices"][0]["finish_reason"] for chunk in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_chunks_of_a_chat_begin_with_the_role(demo: Any) -> None:
    messages = [{"role": "user", "content": "Spell out: 21."}]
    found = events(demo, "/v1/chat/completions", {"messages": messages, "temperature": 0})
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in found]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert not any("role" in delta for delta in deltas[1:])
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_last_chunk_says_what_was_used(steady: Any, path: str) -> None:
    body = {"temperature": 0, "max_tokens": 12, "stream_options": {"include_usage": True}}
    body |= {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    *chunks, last = events(steady, path, body)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    whole = httpx.post(f"{steady.base_url}{path}", json=body | {"model": "demo", "stream_options": None}).json()
    cached = {"prompt_tokens_details"}  # the second one finds the first one's prompt
    assert {k: v for k, v in last["usage"].items() if k not in cached} == {
        k: v for k, v in whole["usage"].items() if k not in cached
    }
    assert last["metrics"] == whole["metrics"]


def test_every_chunk_may_say_what_was_used_so_far(demo: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(demo, "/v1/completions", {"prompt": PROMPT, "temperature": 0, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"]


def test_what_fails_before_the_first_token_is_a_plain_error(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="896 is not a token id"):
        client.completions.create(model="demo", prompt=[896], stream=True)


def test_what_fails_later_is_the_last_event(demo: Any, client: OpenAI) -> None:
    *chunks, last = events(demo, "/v1/completions", {"prompt": PROMPT} | ENDS_IN_THE_MIDDLE)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["z"]
    assert last["error"]["type"] == "invalid_request_error"
    assert "min_tokens" in last["error"]["message"]
    with pytest.raises(APIError, match="min_tokens"):
        list(client.completions.create(model="demo", prompt=PROMPT, stream=True, extra_body=ENDS_IN_THE_MIDDLE))
    with pytest.raises(BadRequestError, match="min_tokens"):
        client.completions.create(model="demo", prompt=PROMPT, extra_body=ENDS_IN_THE_MIDDLE)


@pytest.mark.parametrize("prompts", [PROMPT, [PROMPT] * 3])
@pytest.mark.usefixtures("slow_steps")
def test_a_client_that_leaves_its_stream_frees_its_slots(demo: Any, prompts: Any) -> None:
    body = ENDLESS | {"prompt": prompts, "stream": True}
    with httpx.stream("POST", f"{demo.base_url}/v1/completions", json=body) as response:
        pieces = response.iter_raw()  # kept: without it the client hangs up
        next(pieces)
        wait_until(lambda: num_running(demo) == (1 if prompts is PROMPT else 3))
    emitted = demo.llm.metrics()["fly_trt:generation_tokens_total"]
    wait_until(lambda: num_running(demo) == 0)
    assert demo.llm.metrics()["fly_trt:generation_tokens_total"] < emitted + 100


@pytest.mark.parametrize("prompts", [PROMPT, [PROMPT] * 3])
@pytest.mark.usefixtures("slow_steps")
def test_a_client_that_does_not_wait_for_its_answer_frees_its_slots(demo: Any, prompts: Any) -> None:
    body = json.dumps(ENDLESS | {"prompt": prompts}).encode()
    url = httpx.URL(demo.base_url)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: num_running(demo) == (1 if prompts is PROMPT else 3))
    emitted = demo.llm.metrics()["fly_trt:generation_tokens_total"]
    wait_until(lambda: num_running(demo) == 0)
    assert demo.llm.metrics()["fly_trt:generation_tokens_total"] < emitted + 100


@pytest.mark.usefixtures("slow_steps")
def test_the_streams_of_others_go_on(demo: Any, client: OpenAI) -> None:
    fields = {"model": "demo", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    extra = {"num_speculative_tokens": 0, "ignore_eos": True}
    expected = client.completions.create(**fields, extra_body=extra).choices[0].text
    mine = client.completions.create(**fields, stream=True, extra_body=extra)
    text = next(mine).choices[0].text
    for _ in range(3):
        with httpx.stream("POST", f"{demo.base_url}/v1/completions", json=ENDLESS | {"prompt": PROMPT, "stream": True}):
            text += next(mine).choices[0].text
    assert text + "".join(chunk.choices[0].text for chunk in mine) == expected


def test_an_engine_that_breaks_in_the_middle_is_the_last_event(
    server: Any, demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = server(demo_engine, model_names=("demo", "broken"))  # a server of its own: its engine does not recover
    run = OnnxRuntimeEngine.run
    steps = itertools.count()

    def break_later(engine: Any, step: Any) -> None:
        if next(steps) > 20:
            raise RuntimeError("out of something")
        run(engine, step)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", break_later)
    *chunks, last = events(broken, "/v1/completions", ENDLESS | {"prompt": PROMPT})
    assert chunks
    assert last["error"]["type"] == "service_unavailable_error"
    response = httpx.post(f"{broken.base_url}/v1/completions", json={"prompt": PROMPT})
    assert response.status_code == 503


@pytest.mark.parametrize("streams", [True, False])
def test_a_bug_at_one_of_several_prompts_ends_the_request(
    demo: Any, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    tokenize = PromptReader.tokenize

    def break_at_the_second(reader: Any, prompt: Any, **more: Any) -> Any:
        assert prompt != "second", "a bug"
        return tokenize(reader, prompt, **more)

    monkeypatch.setattr(PromptReader, "tokenize", break_at_the_second)
    body = {"prompt": [PROMPT, "second", PROMPT], "stream": streams, "max_tokens": 1900, "ignore_eos": True}
    response = httpx.post(f"{demo.base_url}/v1/completions", json=body, timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    wait_until(lambda: num_running(demo) == 0)


def test_others_have_their_turn_between_the_prompts_of_a_request(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    tokenize = PromptReader.tokenize

    def note(reader: Any, prompt: Any, **more: Any) -> Any:
        turns.append("prompt")
        return tokenize(reader, prompt, **more)

    async def tick() -> None:
        while True:
            turns.append("tick")
            await asyncio.sleep(0)

    async def generate() -> None:
        ticking = asyncio.create_task(tick())
        writer = SimpleNamespace(llm=demo.pool.choose(), params=SamplingParams(max_tokens=1))
        async for _ in generation._generate(writer, [PROMPT] * 20):
            pass
        ticking.cancel()

    monkeypatch.setattr(PromptReader, "tokenize", note)
    asyncio.run(generate())
    assert turns.count("prompt") == 20
    assert ("prompt", "prompt") not in itertools.pairwise(turns)


def test_a_schema_beyond_its_limits_ends_no_answer_of_others(demo: Any, client: OpenAI) -> None:
    properties = {f"property_{number}": {"type": "string", "pattern": "^[a-z]{1,64}$"} for number in range(1000)}
    schema = {"json": {"type": "object", "properties": properties}}
    body = {"prompt": PROMPT, "max_tokens": 8, "structured_outputs": schema}
    mine = client.completions.create(model="demo", prompt=PROMPT, stream=True, extra_body=ENDLESS)
    next(mine)
    for _ in range(3):
        response = httpx.post(f"{demo.base_url}/v1/completions", json=body, timeout=60)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert [chunk.choices[0].finish_reason for chunk in mine][-1] == "length"
