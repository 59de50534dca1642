"""Many clients of one server: streams side by side, clients that go away, and clients that ask for nonsense."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_switch import SLOW, add_switch

from eval_prompts import load_eval_prompts
from hosted_model import written_model
from triton_server import TritonServer, wait_until

PROMPTS = [record["prompt"] for record in load_eval_prompts()[50:90]]
WITHOUT_END = {"end_id": -1, "stream": True}  # the model's own end-of-sequence does not end it


@pytest.fixture(scope="module")
def wanted(server: TritonServer) -> list[list[int]]:
    """The tokens of each prompt, asked for one after another."""
    return [server.generate(text_input=prompt, max_tokens=60)["output_ids"] for prompt in PROMPTS]


def test_32_streams_are_complete_and_in_order(server: TritonServer, wanted: list[list[int]]) -> None:
    streams = [server.stream(text_input=prompt, max_tokens=60, stream=True) for prompt in PROMPTS[:32]]
    for stream, want in zip(streams, wanted, strict=False):
        assert stream.finish().error is None
        assert stream.token_ids == want
    assert sum(len(stream.responses) > 1 for stream in streams) > 16  # the others were one step's


@pytest.mark.usefixtures("slow_steps")
def test_streams_run_together(server: TritonServer) -> None:
    streams = [server.stream(text_input=prompt, max_tokens=1500, **WITHOUT_END) for prompt in PROMPTS[:8]]
    server.wait_for("num_requests_running", 8)
    for stream in streams:
        stream.disconnect()
    server.wait_for("num_requests_running", 0)


@pytest.mark.usefixtures("slow_steps")
def test_the_first_tokens_come_before_the_last_are_computed(server: TritonServer) -> None:
    server.settle()
    before, aborts = server.metric("generation_tokens_total"), server.num_aborts()
    stream = server.stream(text_input=PROMPTS[0], max_tokens=1900, **WITHOUT_END)
    stream.wait_for_response()
    stream.disconnect()
    wait_until(lambda: server.num_aborts() > aborts, "the request was ended")
    assert 0 < server.metric("generation_tokens_total") - before < 1900
    assert stream.responses[0]["text_output"][0]


@pytest.mark.usefixtures("slow_steps")
def test_a_grpc_client_that_goes_away_frees_its_slot(server: TritonServer) -> None:
    server.settle()
    aborts = server.num_aborts()
    stream = server.stream(text_input=PROMPTS[1], max_tokens=1900, **WITHOUT_END)
    stream.wait_for_response()
    server.wait_for("num_requests_running", 1)
    stream.disconnect()
    server.wait_for("num_requests_running", 0)
    wait_until(lambda: server.num_aborts() == aborts + 1, "one request was ended")


@pytest.mark.usefixtures("slow_steps")
def test_an_http_client_that_goes_away_frees_its_slot(server: TritonServer) -> None:
    server.settle()
    aborts = server.num_aborts()
    body = json.dumps({"text_input": PROMPTS[1], "max_tokens": 1900, **WITHOUT_END})
    with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
        head = f"POST /v2/models/fly/generate_stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        server.wait_for("num_requests_running", 1)
    server.wait_for("num_requests_running", 0)
    wait_until(lambda: server.num_aborts() == aborts + 1, "one request was ended")


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"max_tokens": 5}, "a prompt is text_input or input_ids, got neither"),
    "an empty prompt": ({"text_input": ""}, "the prompt is empty"),
    "a wrong type": ({"text_input": "a", "max_tokens": np.array([[5]], np.int64)}, "max_tokens"),
    "a wrong shape": ({"text_input": "a", "max_tokens": np.array([5], np.int32)}, "max_tokens"),
    "two prompts in one": ({"text_input": np.array([["a"], ["b"]], np.object_)}, "batch-size"),
    "negative max_tokens": ({"text_input": "a", "max_tokens": -1}, "max_tokens -1: expected a whole number"),
    "a prompt that is too long": ({"text_input": "word " * 3000}, "max_seq_len is 2048"),
    "an unknown acceptance": ({"text_input": "a", "acceptance": "generous"}, "acceptance 'generous': expected"),
    "an unknown preset": ({"text_input": "a", "preset": "best"}, "preset 'best': expected"),
    "a setting without effect": ({"text_input": "a", "acceptance": "exact", "fly_window_size": 5}, "has no effect"),
    "a negative threshold": ({"text_input": "a", "fly_entropy_threshold": -1.0}, "fly_entropy_threshold -1.0"),
    "a token that is none": ({"input_ids": [1, 2, 70_000]}, "70000 is not a token id"),
    "too many draft tokens": ({"text_input": "a", "num_draft_tokens": 99}, "num_speculative_tokens 99"),
    "beam search": ({"text_input": "a", "beam_width": 4}, "beam_width"),
    "no UTF-8": ({"text_input": np.array([[b"\xff\xfe"]], np.object_)}, "text_input: not UTF-8 text"),
    "an unknown input": ({"text_input": "a", "lora_task_id": 1}, "lora_task_id"),
}


def test_malformed_requests_get_an_error_each_and_disturb_nobody(server: TritonServer, wanted: list[list[int]]) -> None:
    healthy = [server.stream(text_input=prompt, max_tokens=60, stream=True) for prompt in PROMPTS[:8]]
    refused = {name: server.stream(**inputs) for name, (inputs, _) in MALFORMED.items()}
    for name, stream in refused.items():
        error = stream.finish().error
        assert error is not None, name
        assert MALFORMED[name][1] in error.message(), name
        assert "\n" not in error.message()
        assert not stream.responses
    for stream, want in zip(healthy, wanted, strict=False):
        assert stream.finish().error is None
        assert stream.token_ids == want


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": 5}, "a prompt is text_input or input_ids"),
        ({"text_input": "a", "max_tokens": -1}, "max_tokens -1: expected a whole number, at least 1"),
        ({"text_input": "a", "max_token": 5}, "unknown input 'max_token': expected one of text_input"),
        ({"text_input": "a", "acceptance": "generous"}, "acceptance 'generous': expected one of"),
        ({"text_input": ["a", "b"]}, "batch-size"),
    ],
)
def test_http_clients_get_a_client_error(server: TritonServer, body: Any, message: str) -> None:
    status, answer = server.post("/v2/models/fly/generate", body)
    assert status == 400
    assert message in answer["error"]


@pytest.mark.parametrize("body", [{"text_input": "a", "max_tokens": "five"}, "{", "[1]"])
def test_what_triton_cannot_read_reaches_nobody(server: TritonServer, body: Any) -> None:
    status, answer = server.post("/v2/models/fly/generate", body)
    assert status >= 400
    assert answer["error"]
    assert server.generate(text_input=PROMPTS[0], max_tokens=5)["num_output_tokens"] == 5


@pytest.fixture
def small(server: TritonServer, demo_engine: Path, tmp_path: Path) -> Iterator[str]:
    """A model with one request in flight, and one that waits as long as it likes. Its steps are slow while there is a
    file slow."""
    settings: dict[str, Any] = {"max_batch_size": 1, "max_num_tokens": 64}
    queue = {"max_queue_size": 1, "queue_timeout": 0}
    plain = {"method": None}
    with written_model(server, demo_engine, "small", settings=settings, speculative=plain, **queue) as model_dir:
        add_switch(model_dir, tmp_path / "slow", SLOW)
        server.load("small")
        yield "small"


def test_a_full_queue_and_a_long_wait_are_refused(server: TritonServer, small: str, tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    running = server.stream(
        small, text_input=PROMPTS[0], max_tokens=1900, **WITHOUT_END
    )  # a minute and a half, or more
    running.wait_for_response()
    waiting = server.stream(small, text_input=PROMPTS[1], max_tokens=5)
    server.wait_for("num_requests_waiting", 1)
    status, answer = server.post(f"/v2/models/{small}/generate", {"text_input": PROMPTS[2], "max_tokens": 5})
    assert status >= 400
    assert "the queue is full: 1 requests wait and max_queue_size is 1" in answer["error"]
    waiting.disconnect()
    server.wait_for("num_requests_waiting", 0)
    error = server.stream(small, text_input=PROMPTS[1], max_tokens=5, wait=1.0).finish().error
    assert error is not None
    assert "timed out in the queue" in error.message()
    (tmp_path / "slow").unlink()
    running.disconnect()
    server.wait_for("num_requests_running", 0)
    assert server.generate(small, text_input=PROMPTS[1], max_tokens=5)["num_output_tokens"] == 5
