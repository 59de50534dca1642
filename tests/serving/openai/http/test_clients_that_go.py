"""Clients that go away, in each way in which a connection can end: their slots are free within a step, and nobody else
notices."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fly_trt import LLM, AsyncLLM, SamplingParams
from openai_servers import ThreadServer, Wire, post, wait_until

LONG = {"prompt": "Spell out: 21.", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "### Instruction:\nSpell out: 21.\n### Response:\n", "temperature": 0, "max_tokens": 64}


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[ThreadServer]:
    with ThreadServer([llm]) as server:
        yield server


def half_close(wire: Wire) -> None:
    wire.socket.shutdown(socket.SHUT_WR)


ENDINGS: dict[str, Callable[[Wire], None]] = {"FIN": Wire.close, "RST": Wire.reset, "half closed": half_close}


def gauge(llm: AsyncLLM, name: str) -> float:
    return llm.metrics()[f"fly_trt:{name}"]


def begin(server: ThreadServer, llm: AsyncLLM, **more: Any) -> Wire:
    """A request that has a slot, alone."""
    wait_until(lambda: gauge(llm, "num_requests_running") == 0)
    wire = server.wire().send(post("/v1/completions", json.dumps(LONG | more).encode()))
    wait_until(lambda: gauge(llm, "num_requests_running") > 0)
    return wire


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_frees_its_slot(server: ThreadServer, llm: AsyncLLM, ending: str, streams: bool) -> None:
    wire = begin(server, llm, stream=streams)
    before = gauge(llm, "generation_tokens_total")
    ENDINGS[ending](wire)
    wait_until(lambda: gauge(llm, "num_requests_running") == 0 and not server.lifecycle.num_active)
    assert gauge(llm, "generation_tokens_total") - before < LONG["max_tokens"], "it was not served to its end"
    assert server.pool.num_requests == 0
    wire.close()


@pytest.mark.usefixtures("slow_steps")
def test_a_client_that_goes_leaves_the_queue(demo_engine: Path) -> None:
    llm = AsyncLLM(demo_engine, max_batch_size=1)
    with ThreadServer([llm]) as server:
        running = begin(server, llm, stream=True)
        waiting = server.wire().send(post("/v1/completions", json.dumps(LONG).encode()))
        wait_until(lambda: gauge(llm, "num_requests_waiting") == 1)
        waiting.reset()
        wait_until(lambda: gauge(llm, "num_requests_waiting") == 0)
        assert gauge(llm, "num_requests_running") == 1
        running.close()
        wait_until(lambda: gauge(llm, "num_requests_running") == 0)
    llm.shutdown()


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("streams", [True, False])
def test_all_completions_and_prompts_of_a_request_end_with_its_client(
    server: ThreadServer, llm: AsyncLLM, streams: bool
) -> None:
    more = {"prompt": ["a", "b"], "n": 2, "temperature": 1.0, "stream": streams}
    wire = begin(server, llm, **more)
    wait_until(lambda: gauge(llm, "num_requests_running") == 4)
    wire.close()
    wait_until(lambda: gauge(llm, "num_requests_running") == gauge(llm, "num_requests_waiting") == 0)


def test_others_do_not_notice(server: ThreadServer, llm: AsyncLLM, demo_engine: Path) -> None:
    with LLM(demo_engine) as alone:
        want = alone.generate(SHORT["prompt"], SamplingParams(max_tokens=64))[0].outputs[0].text
    for ending in ENDINGS.values():
        goes = begin(server, llm, stream=True)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=SHORT | {"stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            text = [next(lines)]
            ending(goes)
            text += list(lines)
        chunks = [json.loads(line[6:]) for line in text if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == want
        goes.close()
    wait_until(lambda: gauge(llm, "num_requests_running") == 0)


def test_a_stream_that_nobody_reads_is_cut_and_holds_nobody_up(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has more to say than the kernel's buffers hold."""
    make = socket.socket

    def small(*arguments: Any, **named: Any) -> socket.socket:
        made = make(*arguments, **named)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # those of its connections too
        return made

    monkeypatch.setattr("fly_trt.serving.openai.http.server.socket.socket", small)
    with ThreadServer([llm], write_timeout=0.3) as server:
        monkeypatch.undo()
        body = LONG | {"stream": True, "logprobs": 5, "n": 4, "temperature": 1.0, "max_tokens": 400}
        wire = server.wire(receive_buffer=4096).send(post("/v1/completions", json.dumps(body).encode()))
        wait_until(lambda: server.lifecycle.num_active == 1)
        assert httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=60).status_code == 200
        wait_until(lambda: server.lifecycle.num_active == 0)
        wait_until(lambda: gauge(llm, "num_requests_running") == 0)
        assert b"[DONE]" not in wire.read()
        wire.close()


def test_a_slow_reader_gets_everything(llm: AsyncLLM) -> None:
    with ThreadServer([llm], write_timeout=30) as server:
        body = LONG | {"stream": True, "logprobs": 5, "max_tokens": 300}
        with server.wire(receive_buffer=4096) as wire:
            wire.send(post("/v1/completions", json.dumps(body).encode()))
            wait_until(lambda: gauge(llm, "num_requests_running") == 0)
            answer = wire.read()
    chunks = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
    assert sum(len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks) == 300
    assert b"data: [DONE]" in answer
