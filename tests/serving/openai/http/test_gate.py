"""Keys, the paths that need none, and what is refused during a drain. The routes behind it are those of the server."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fly_trt import AsyncLLM
from openai_servers import ThreadServer

BODY = {"prompt": "Spell out: 21.", "max_tokens": 3}
GUARDED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/demo"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/nowhere"),
]


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[ThreadServer]:
    with ThreadServer([llm], api_keys=("first key", "sécond", "voilà")) as server:
        yield server


def ask(
    server: ThreadServer, method: str, path: str, authorization: bytes | None = None, **more: Any
) -> httpx.Response:
    headers = {} if authorization is None else {"Authorization": authorization}
    return httpx.request(method, server.url + path, headers=headers, timeout=60, **more)


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "authorization",
    [None, b"Bearer wrong", b"Bearer", b"first key", b"Basic first key", b"Bearer first", b"Bearer \xff"],
)
def test_without_a_key_nothing_is_told(
    server: ThreadServer, method: str, path: str, authorization: bytes | None
) -> None:
    response = ask(server, method, path, authorization)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "first" not in response.text


@pytest.mark.parametrize("authorization", ["Bearer first key", "bearer  first key", "Bearer sécond", "Bearer voilà"])
def test_each_of_the_keys_opens(server: ThreadServer, authorization: str) -> None:
    assert ask(server, "GET", "/v1/models", authorization.encode()).status_code == 200
    assert ask(server, "POST", "/v1/completions", authorization.encode(), json=BODY).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics"])
def test_probes_and_scrapers_need_no_key(server: ThreadServer, path: str) -> None:
    assert ask(server, "GET", path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/health/../v1/models", "//v1/models", "/health/v1", "/page/../v1/models", "/HEALTH", "/v1/models/"]
)
def test_no_path_goes_around_the_key(server: ThreadServer, path: str) -> None:
    with server.wire() as wire:
        answer = wire.send(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()).read()
    assert answer.split()[1] in (b"401", b"404")
    assert b"max_model_len" not in answer


def test_below_a_root_path_the_same_paths_need_a_key(llm: AsyncLLM) -> None:
    """A proxy may leave the prefix on the path, or take it away."""
    with ThreadServer([llm], api_keys=("key",), root_path="/fly") as server:
        for prefix in ("", "/fly"):
            assert ask(server, "GET", f"{prefix}/health").status_code == 200
            assert ask(server, "GET", f"{prefix}/v1/models").status_code == 401
            assert ask(server, "GET", f"{prefix}/v1/models", b"Bearer key").status_code == 200


def test_a_draining_server_refuses_what_is_new_and_says_so_to_probes(llm: AsyncLLM) -> None:
    with ThreadServer([llm], api_keys=("key",)) as server:
        server.lifecycle.num_active += 1  # somebody's answer is under way
        try:
            server.lifecycle.drain()
            response = ask(server, "POST", "/v1/completions", b"Bearer key", json=BODY)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "server_stopping")
            assert int(response.headers["retry-after"]) > 0
            assert response.headers["connection"] == "close"
            assert ask(server, "GET", "/ready").status_code == 503
            assert ask(server, "GET", "/health").status_code == 200
        finally:
            server.lifecycle.num_active -= 1


def preflight(server: ThreadServer, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return httpx.options(f"{server.url}/v1/completions", headers=headers)


def test_web_pages_are_allowed_where_they_are_named(llm: AsyncLLM, server: ThreadServer) -> None:
    with ThreadServer([llm], api_keys=("key",), allowed_origins=("https://a.example",)) as open_to_one:
        assert preflight(open_to_one, "https://a.example").headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in preflight(open_to_one, "https://b.example").headers
        response = httpx.get(f"{open_to_one.url}/v1/models", headers={"Origin": "https://a.example"})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, "https://a.example")
    closed = preflight(server, "https://a.example")
    assert closed.status_code == 401
    assert not [name for name in closed.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_what_a_web_page_may_send_without_being_asked_is_refused(llm: AsyncLLM, kind: str | None) -> None:
    with ThreadServer([llm]) as server:
        headers = {} if kind is None else {"Content-Type": kind}
        response = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_content_type")


def test_no_answer_sends_a_client_elsewhere(llm: AsyncLLM) -> None:
    with ThreadServer([llm]) as server:
        response = httpx.post(f"{server.url}/v1/completions/", json=BODY, headers={"Host": "elsewhere.example"})
    assert (response.status_code, response.headers.get("location")) == (404, None)


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br", 415), ("identity", 200)])
def test_bodies_are_not_unpacked(llm: AsyncLLM, encoding: str, status: int) -> None:
    with ThreadServer([llm]) as server:
        response = httpx.post(f"{server.url}/v1/completions", json=BODY, headers={"Content-Encoding": encoding})
    assert response.status_code == status
