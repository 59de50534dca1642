"""Ids, the line of each request, and what no log may ever say: a text of a client's."""

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fly_trt import AcceptanceParams, AsyncLLM, SamplingParams
from fly_trt.grammar import StructuredOutputs
from fly_trt.serving.openai.request_log import describe_request
from openai_servers import ThreadServer, post, wait_until

SECRET = "xyzzy"
"""In everything that a client sends as text."""


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[ThreadServer]:
    with ThreadServer([llm], log_requests=True) as server:
        yield server


def send(server: ThreadServer, body: Any, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=60)


def access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fly_trt.access"]


@pytest.fixture(autouse=True)
def all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


@pytest.mark.parametrize("given", ["abc-123", "0af7651916cd43dd8448eb211c80319c", "a" * 128])
def test_an_id_that_a_client_gives_is_kept(server: ThreadServer, caplog: pytest.LogCaptureFixture, given: str) -> None:
    response = send(server, {"prompt": "a", "max_tokens": 1}, **{"X-Request-Id": given})
    assert response.headers["x-request-id"] == given
    wait_until(lambda: access_lines(caplog))
    assert f"id {given}" in access_lines(caplog)[0]


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "a;b", "é", "<script>"])
def test_an_id_that_cannot_stand_in_a_log_is_replaced(server: ThreadServer, given: str) -> None:
    headers = [(b"X-Request-Id", given.encode())]
    response = httpx.get(f"{server.url}/health", headers=headers)
    assert re.fullmatch("[0-9a-f]{24}", response.headers["x-request-id"])


def test_errors_have_ids_too(server: ThreadServer) -> None:
    for path in ("/nowhere", "/v1/completions"):
        assert httpx.get(server.url + path).headers["x-request-id"]


def test_a_request_is_one_line_with_its_tokens(server: ThreadServer, caplog: pytest.LogCaptureFixture) -> None:
    usage = send(server, {"prompt": "Spell out: 21.", "max_tokens": 7}).json()["usage"]
    wait_until(lambda: access_lines(caplog))
    (line,) = access_lines(caplog)
    tokens = f"{usage['prompt_tokens']}\\+{usage['completion_tokens']}"
    assert re.fullmatch(rf"127\.0\.0\.1:\d+ POST /v1/completions 200 \d+ ms, {tokens} tokens, id [0-9a-f]{{24}}", line)


def test_a_path_cannot_write_lines_of_its_own(server: ThreadServer, caplog: pytest.LogCaptureFixture) -> None:
    with server.wire() as wire:
        wire.send(b"GET /a%0Ab?q=xyzzy HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").read()
    wait_until(lambda: access_lines(caplog))
    (line,) = access_lines(caplog)
    assert "GET /a%0Ab 404" in line


def test_a_forwarded_address_cannot_write_what_it_likes(server: ThreadServer, caplog: pytest.LogCaptureFixture) -> None:
    forged = b"1.2.3.4\x1b[2K\x9b" + b"a" * 500
    with server.wire() as wire:
        wire.send(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: " + forged + b"\r\n\r\n")
        wait_until(lambda: access_lines(caplog))
    (line,) = access_lines(caplog)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 250


TEXTS: dict[str, tuple[str, Any]] = {
    "a prompt": ("/v1/completions", {"prompt": SECRET, "stop": [SECRET], "bad_words": [SECRET], "max_tokens": 2}),
    "a stream": ("/v1/completions", {"prompt": SECRET, "stream": True, "max_tokens": 2}),
    "messages": ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}),
    "a schema": (
        "/v1/completions",
        {"prompt": SECRET, "max_tokens": 2, "structured_outputs": {"choice": [SECRET]}},
    ),
    "a wrong type": ("/v1/completions", {"prompt": "a", "stop": {SECRET: SECRET}}),
    "a wrong type of a prompt": ("/v1/completions", {"prompt": {"text": SECRET}}),
    "an unknown field": ("/v1/completions", {"prompt": "a", SECRET: SECRET}),
    "an unknown model": ("/v1/completions", {"prompt": "a", "model": SECRET}),
    "a wrong role": ("/v1/chat/completions", {"messages": [{"role": SECRET, "content": SECRET}]}),
    "a stop string that is too long": ("/v1/completions", {"prompt": "a", "stop": [SECRET * 5000]}),
    "a wrong bad word": ("/v1/completions", {"prompt": "a", "bad_words": [SECRET, ""]}),
    "a prompt that is too long": ("/v1/completions", {"prompt": SECRET * 50_000}),
    "half of a surrogate pair": ("/v1/completions", {"prompt": f"{SECRET}\ud800"}),
    "a broken schema": ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": {"type": SECRET}}}),
    "a broken regex": ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": f"{SECRET}("}}),
    "text to tokenise": ("/tokenize", {"prompt": SECRET}),
    "broken JSON": ("/v1/completions", f'{{"prompt": "{SECRET}'.encode()),
    "broken UTF-8": ("/v1/completions", f'{{"prompt": "{SECRET}'.encode() + b'\xff"}'),
}


@pytest.mark.parametrize("name", TEXTS)
def test_no_log_says_what_a_client_sent(server: ThreadServer, caplog: pytest.LogCaptureFixture, name: str) -> None:
    path, body = TEXTS[name]
    send(server, body, path)
    wait_until(lambda: access_lines(caplog))
    assert SECRET not in caplog.text


def test_texts_are_logged_where_that_is_asked_for(llm: AsyncLLM, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadServer([llm], log_texts=True) as server:
        text = send(server, {"prompt": f"Spell {SECRET}", "max_tokens": 3}).json()["choices"][0]["text"]
    assert f"prompt 'Spell {SECRET}'" in caplog.text
    assert f"answered [{text!r}]" in caplog.text


def test_parameters_are_logged_with_counts_in_place_of_texts() -> None:
    params = SamplingParams(
        temperature=0.5,
        stop=[SECRET, "b"],
        bad_words=[SECRET],
        logit_bias={5: 1.0},
        acceptance=AcceptanceParams(acceptance="fly", fly_window_size=3),
        structured_outputs=StructuredOutputs(regex=SECRET),
    )
    line = describe_request(SECRET, params, with_texts=False)
    assert SECRET not in line
    assert line.startswith("prompt of 5 characters, temperature=0.5, logit_bias=[1], bad_words=[1], stop=[2], ")
    assert "acceptance={fly_window_size=3, acceptance=fly}" in line or "acceptance={acceptance=fly" in line


def test_what_breaks_is_500_with_the_id_and_the_log_has_the_place(
    llm: AsyncLLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError(f"because of {SECRET}")

    with ThreadServer([llm]) as server:
        monkeypatch.setattr(llm, "generate", break_down)
        response = send(server, {"prompt": SECRET})
        request_id = response.headers["x-request-id"]
        assert response.status_code == 500
        assert response.json()["error"] == {
            "message": f"the server broke at this request; its log says more under {request_id}",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
        monkeypatch.undo()
        assert send(server, {"prompt": "a", "max_tokens": 1}).status_code == 200
    assert SECRET not in caplog.text
    assert f"request {request_id} broke: ZeroDivisionError" in caplog.text
    assert "in break_down" in caplog.text


@pytest.mark.usefixtures("slow_steps")
def test_a_client_that_went_is_in_the_line_of_its_request(
    server: ThreadServer, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}).encode()
    with server.wire() as wire:
        wire.send(post("/v1/completions", body)).read_until(b"data: ")
    wait_until(lambda: access_lines(caplog))
    assert "(client gone)" in access_lines(caplog)[0]
