"""`fly-serve` as a process: how it begins, drains and ends, TLS and sockets."""

import json
import re
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from openai_servers import ServeProcess, post, wait_until

LONG = {"prompt": "Spell out: 21.", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}


def begin(server: ServeProcess, **more: Any) -> Any:
    """A stream that has begun."""
    wire = server.wire().send(post("/v1/completions", json.dumps(LONG | {"stream": True} | more).encode()))
    wire.read_until(b"data: ")
    return wire


def test_sigterm_loses_no_running_answer(demo_engine: Path) -> None:
    """Streams, whole answers, and those that wait for a slot; the process ends with 0."""
    with ServeProcess(demo_engine, "--max-batch-size", "2", "--method", "ngram", is_slow=True) as server:
        streams = [begin(server, max_tokens=400) for _ in range(2)]
        waiting = server.wire().send(post("/v1/completions", json.dumps(LONG | {"max_tokens": 5}).encode()))
        wait_until(lambda: "num_requests_waiting 1.0" in httpx.get(f"{server.url}/metrics").text)
        kept = httpx.Client(base_url=server.url, timeout=60)
        assert kept.get("/ready").status_code == 200
        server.signal(signal.SIGTERM)
        wait_until(lambda: kept.get("/ready").status_code == 503)
        refused = kept.post("/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
        assert int(refused.headers["retry-after"]) > 0
        for stream in streams:
            answer = stream.read()
            assert b'"finish_reason":"length"' in answer
            assert b"data: [DONE]" in answer
        whole = waiting.read()
        assert whole.startswith(b"HTTP/1.1 200")
        assert b'"completion_tokens":5' in whole
        assert server.wait() == 0
        kept.close()
    assert "drains: 3 requests are under way" in server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [("SIGTERM", "SIGINT", 130), pytest.param("SIGTERM", "SIGTERM", 143, marks=pytest.mark.long)],
)
def test_a_second_signal_ends_answers_with_an_error(demo_engine: Path, first: str, second: str, code: int) -> None:
    with ServeProcess(demo_engine, "--max-batch-size", "1", is_slow=True) as server:
        stream = begin(server)
        waiting = server.wire().send(post("/v1/completions", json.dumps(LONG).encode()))
        wait_until(lambda: "num_requests_waiting 1.0" in httpx.get(f"{server.url}/metrics").text)
        server.signal(signal.Signals[first])
        wait_until(lambda: "drains" in server.log)
        server.signal(signal.Signals[second])
        events = re.findall(rb"data: (.*?)\n\n", stream.read())
        assert events[-1] == b"[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "server_stopping"
        head, _, body = waiting.read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert json.loads(body)["error"]["code"] == "server_stopping"
        assert server.wait() == code
    assert "stops: 2 requests are cut short" in server.log
    assert "Traceback" not in server.log


def test_a_drain_has_its_time(demo_engine: Path) -> None:
    with ServeProcess(demo_engine, "--drain-timeout", "0.2", is_slow=True) as server:
        stream = begin(server)
        server.signal(signal.SIGTERM)
        assert b"server_stopping" in stream.read()
        assert server.wait() == 143


def test_ctrl_c_drains_too_and_an_idle_server_ends_at_once(demo_engine: Path) -> None:
    with ServeProcess(demo_engine, "--log-level", "warning") as server:
        kept = httpx.Client(base_url=server.url)
        kept.get("/health")
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        kept.close()
    assert len(server.lines) == 1, server.log


def test_the_summary_says_what_is_served(demo_engine: Path) -> None:
    flags = ("--served-model-name", "a", "--served-model-name", "b", "--acceptance", "exact", "--max-batch-size", "4")
    with ServeProcess(demo_engine, *flags, environment={"FLY_TRT_API_KEY": "one two"}) as server:
        (line,) = [line for line in server.lines if line.startswith("fly-serve: ")]
        assert re.fullmatch(
            r"fly-serve: a b at http://127\.0\.0\.1:\d+: 4 requests of up to 2048 tokens in flight: "
            r"exact, [\w +]+ drafts of \d+\n",
            line,
        )
        for key, status in (("one", 200), ("two", 200), ("one two", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-out", str(files[0]), "-keyout", str(files[1])], check=True, capture_output=True)
    return files


def test_it_serves_over_tls(demo_engine: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = map(str, certificate)
    with ServeProcess(demo_engine, "--ssl-certfile", cert, "--ssl-keyfile", key) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=cert)
        with httpx.Client(verify=context, base_url=server.url, timeout=60) as client:
            assert client.post("/v1/completions", json=LONG | {"max_tokens": 3}).status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(server.url.replace("https", "http"))


def test_it_serves_at_a_unix_socket(demo_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "fly.sock"
    with ServeProcess(demo_engine, "--uds", str(path)) as server:
        assert server.url == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://fly", timeout=60) as client:
            assert client.post("/v1/completions", json=LONG | {"max_tokens": 3}).status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert not path.exists()
