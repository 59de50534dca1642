"""fly-serve with a setting that is not what an operator takes it for: audits find it, answers become exact and say so,
and a reset brings loose decoding back."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from eval_prompts import load_eval_prompts
from fly_trt.runtime.breaker import DEFAULT_ERROR_RATE, DEFAULT_MIN_QUALITY
from fly_trt.runtime.quality import audits_to_trip
from openai_servers import ServeProcess, ThreadServer, wait_until

PROMPTS = [record["prompt"] for record in load_eval_prompts()]
KEY = "secret"
PLANTED = ("--acceptance", "fly", "--fly-entropy-threshold", "0", "--fly-window-size", "1")
# What the planted setting comes to with the weak draft is 0.57; by then 99 of 100 such are found.
MOST_AUDITS = audits_to_trip(0.7, DEFAULT_MIN_QUALITY, DEFAULT_ERROR_RATE)


class Client:
    """Greedy answers of a few tokens, with the key."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"})

    def complete(self, prompt: str, **fields: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 10, "temperature": 0, "return_token_ids": True}
        response = self.http.post("/v1/completions", json=body | fields)
        assert response.status_code == 200, response.text
        return response

    def metric(self, name: str, **labels: str) -> float | None:
        for family in parse_text(self.http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == f"fly_trt:{name}" and sample.labels == labels:
                    return sample.value
        return None

    def settings(self) -> dict[str, dict[str, Any]]:
        return {state["setting"]: state for state in self.http.get("/breaker").json()["settings"]}


def tokens_of(response: httpx.Response) -> list[int]:
    return response.json()["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audits") / "audit.jsonl"


@pytest.fixture(scope="module")
def process(weak_engine: Path, log: Path) -> Iterator[ServeProcess]:
    flags = ("--audit-fraction", "1", "--audit-exact-fraction", "0", "--audit-log", str(log), "--allow-breaker-reset")
    with ServeProcess(weak_engine, *PLANTED, *flags, environment={"FLY_TRT_API_KEY": KEY}) as process:
        yield process


@pytest.fixture(scope="module")
def client(process: ServeProcess) -> Iterator[Client]:
    client = Client(process.url)
    yield client
    client.http.close()


def trip(client: Client) -> None:
    """Sends requests, each when the one before it was audited, until one of them was made exact."""
    for prompt in PROMPTS[:MOST_AUDITS]:
        if "X-Fly-Exact-Because" in client.complete(prompt).headers:
            return
        wait_until(lambda: client.metric("audits_waiting") == 0, "audited")
    raise AssertionError(f"not tripped after {MOST_AUDITS} audits")


def test_a_planted_setting_is_found_answers_become_exact_and_a_reset_brings_loose_ones_back(
    process: ServeProcess, client: Client, log: Path
) -> None:
    before = tokens_of(client.complete(PROMPTS[200]))
    trip(client)
    said = client.complete(PROMPTS[200])
    exact = client.complete(PROMPTS[200], acceptance="exact")
    assert tokens_of(said) == tokens_of(exact) != before
    assert said.headers["X-Fly-Exact-Because"] == said.json()["metrics"]["exact_because"] == "breaker"
    assert said.json()["metrics"]["acceptance"] == "fly", "what was asked for"
    assert said.json()["metrics"]["num_loosened_tokens"] == 0
    assert "X-Fly-Exact-Because" not in exact.headers
    assert exact.json()["metrics"]["exact_because"] is None

    own = client.complete(PROMPTS[200], num_speculative_tokens=14)
    assert own.json()["metrics"]["exact_because"] is None, "a setting of its own, of which nothing is known yet"
    body = {"prompt": PROMPTS[201], "max_tokens": 3, "temperature": 0, "stream": True}
    with client.http.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.headers["X-Fly-Exact-Because"] == "breaker"
        stream.read()
    wait_until(lambda: "num_speculative_tokens=14" in client.settings(), "audited")
    assert not client.settings()["num_speculative_tokens=14"]["is_tripped"]

    state = client.settings()["default"]
    assert state["is_tripped"]
    assert state["why"].endswith(f"certainly below min_quality {DEFAULT_MIN_QUALITY:g}")
    assert state["upper"] <= DEFAULT_MIN_QUALITY
    assert state["num_audits"] <= MOST_AUDITS
    assert client.metric("breaker_tripped", setting="default") == 1
    assert client.metric("breaker_changes_total", setting="default", change="tripped") == 1
    assert client.metric("requests_made_exact_total") == 3
    assert client.metric("audit_quality_count") == state["num_audits"] + 1
    assert "WARNING breaker: setting 'default' is exact from now on" in process.log

    num_lines = state["num_audits"] + 1
    wait_until(lambda: client.metric("audit_log_lines_total", outcome="written") == num_lines, "log")
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"default"' in line]
    assert [line["breaker"] for line in lines] == [None] * (len(lines) - 1) + [state["why"]]
    assert not any("prompt" in line or "output" in line for line in lines)

    assert client.http.post("/breaker/reset", json={}).json() == {"reset": ["default"]}
    again = client.complete(PROMPTS[200])
    assert tokens_of(again) == before
    assert "X-Fly-Exact-Because" not in again.headers
    assert client.metric("breaker_tripped", setting="default") == 0
    assert client.settings()["default"]["why"] == "person"
    assert "WARNING breaker: setting 'default' is loose again: reset by a person" in process.log


def test_whoever_audits_is_told_that_sampled_answers_are_not_audited(process: ServeProcess) -> None:
    assert "WARNING audits judge greedy answers alone" in process.log


def test_the_breaker_is_asked_and_reset_with_a_key_and_by_a_setting_that_it_knows(client: Client) -> None:
    for method, path in (("GET", "/breaker"), ("POST", "/breaker/reset")):
        response = httpx.request(method, f"{client.http.base_url}{path}", json={})
        assert response.status_code == 401
    response = client.http.post("/breaker/reset", json={"setting": "nobody's"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith('setting "nobody\'s": no audit knows it: expected one of def')
    assert client.http.post("/breaker/reset", json={"settings": "default"}).status_code == 400


def test_a_log_that_cannot_be_written_fails_no_request(client: Client, log: Path) -> None:
    folder = log.parent
    os.rename(folder, folder.with_name("moved"))
    before = client.metric("audit_log_lines_total", outcome="lost")
    client.complete(PROMPTS[202])
    wait_until(lambda: client.metric("audit_log_lines_total", outcome="lost") > before, "lost")


def test_no_client_resets_where_the_operator_does_not_say_so(demo: Any) -> None:
    response = httpx.post(f"{demo.base_url}/breaker/reset", json={})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "reset_not_allowed"
    assert httpx.get(f"{demo.base_url}/breaker").json() == {"settings": []}


def test_a_reset_where_nothing_is_audited_says_what_is_missing(demo: Any) -> None:
    with ThreadServer([demo.llm], allow_breaker_reset=True) as server:
        response = httpx.post(f"{server.url}/breaker/reset", json={})
    assert response.status_code == 400
    assert "there is no breaker to reset: serve with audit_fraction" in response.json()["error"]["message"]
