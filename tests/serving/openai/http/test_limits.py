"""How much a client may send and how long it may take: bodies, heads, and answers that nobody reads."""

import json
import re
import time
from collections.abc import Iterator

import pytest

from fly_trt import AsyncLLM
from fly_trt.serving.openai.http import connection
from openai_servers import ThreadServer, post, wait_until

MAX_BODY = 2000
BODY = json.dumps({"prompt": "Spell out: 21.", "max_tokens": 3}).encode()


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[ThreadServer]:
    with ThreadServer([llm], max_body_bytes=MAX_BODY) as server:
        yield server


def ask(server: ThreadServer, data: bytes) -> tuple[int, bytes]:
    with server.wire() as wire:
        answer = wire.send(data).read()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def padded(size: int) -> bytes:
    return BODY[:-1] + b" " * (size - len(BODY)) + b"}"


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def test_a_body_may_be_as_long_as_is_said_and_no_byte_longer(server: ThreadServer) -> None:
    assert ask(server, post("/v1/completions", padded(MAX_BODY)))[0] == 200
    status, body = ask(server, post("/v1/completions", padded(MAX_BODY + 1)))
    assert status == 413
    assert json.loads(body)["error"]["message"] == "the body has more than 2000 bytes"


@pytest.mark.parametrize("size", [1, 7, 4000])
def test_the_same_holds_for_bodies_of_chunks(server: ThreadServer, size: int) -> None:
    headers = ["Transfer-Encoding: chunked"]
    assert ask(server, post("/v1/completions", chunked(padded(MAX_BODY), size), headers=headers))[0] == 200
    assert ask(server, post("/v1/completions", chunked(padded(MAX_BODY + 1), size), headers=headers))[0] == 413


@pytest.mark.parametrize("size", [10 * MAX_BODY, 10_000_000])
def test_a_body_that_is_announced_far_too_long_is_not_waited_for(server: ThreadServer, size: int) -> None:
    head = post("/v1/completions", b"", headers=[f"Content-Length: {size}"]).replace(b"Content-Length: 0\r\n", b"")
    assert ask(server, head)[0] == 413


def test_an_endless_body_of_chunks_is_cut_off(server: ThreadServer) -> None:
    with server.wire() as wire:
        wire.send(post("/v1/completions", b"", headers=["Transfer-Encoding: chunked"]))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            wire.send(b"400\r\n" + b" " * 1024 + b"\r\n", times=100_000)


def test_a_body_that_does_not_arrive_in_time_is_408(llm: AsyncLLM) -> None:
    with ThreadServer([llm], body_timeout=0.2) as server:
        status, body = ask(server, post("/v1/completions", BODY)[:-1])
        assert (status, json.loads(body)["error"]["code"]) == (408, "request_timeout")
        assert ask(server, post("/v1/completions", BODY))[0] == 200


def test_a_client_that_goes_while_it_sends_is_forgotten(server: ThreadServer) -> None:
    with server.wire() as wire:
        wire.send(post("/v1/completions", BODY)[:-1])
        wait_until(lambda: server.lifecycle.num_active == 1)
    wait_until(lambda: server.lifecycle.num_active == 0)


def test_a_client_that_wants_to_be_told_first_is_told(server: ThreadServer) -> None:
    request = post("/v1/completions", BODY, headers=["Expect: 100-continue"])
    with server.wire() as wire:
        wire.send(request.removesuffix(BODY))
        assert b"100 Continue" in wire.read_until(b"\r\n\r\n")
        assert b"200 OK" in wire.send(BODY).read()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-"])
def test_a_head_that_does_not_come_is_cut_off(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    make = connection.connection_class
    monkeypatch.setattr("fly_trt.serving.openai.http.server.connection_class", lambda seconds: make(seconds, 0.2))
    with ThreadServer([llm]) as server:
        with server.wire() as wire:
            assert wire.send(sent).read() == b""
        with server.wire() as wire:  # and one on a connection that had an answer
            wire.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n").read_until(b"}")
            time.sleep(0.4)
            assert b"200 OK" in wire.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n").read_until(b"}")
            assert wire.send(b"GET /hea").read() == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/33\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        b"GET /health HTTP/1.1\r\nHost: a\r\nBad Header: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nXYZ\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X-Flood: a\r\n" * 100_000 + b"\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_no_http_is_400_in_the_shape_of_all_errors(server: ThreadServer, sent: bytes) -> None:
    status, body = ask(server, sent)
    assert (status, json.loads(body)["error"]["code"]) == (400, "bad_http")


def test_requests_that_are_sent_at_once_are_answered_in_order(server: ThreadServer) -> None:
    paths = ["/health", "/nowhere", "/version"]
    requests = [f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for path in paths]
    completion = post("/v1/completions", BODY)
    with server.wire() as wire:
        answer = wire.send(b"".join(requests) + completion).read()
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"404", b"200", b"200"]


def test_what_comes_behind_a_body_is_another_request(server: ThreadServer) -> None:
    """A Content-Length that is too short: the rest is no HTTP."""
    request = post("/v1/completions", BODY, close=False)
    with server.wire() as wire:
        answer = wire.send(request + b"more\r\n\r\n").read()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 400" in answer


def test_a_body_with_two_lengths_is_refused_and_nothing_behind_it_read(server: ThreadServer) -> None:
    head = post("/v1/completions", BODY).partition(b"\r\n\r\n")[0]
    assert b"Content-Length" in head
    behind = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
    with server.wire() as wire:
        answer = wire.send(head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(BODY, 100) + behind).read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
