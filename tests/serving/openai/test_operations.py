"""Health, readiness, version, metrics, the model's card, and text to tokens and back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

import fly_trt
from fly_trt import LLM, AsyncLLM
from openai_servers import ThreadServer

CHAT = [{"role": "user", "content": "Spell out: 21."}]


@pytest.fixture(scope="module")
def llms(demo_engine: Path) -> Iterator[list[AsyncLLM]]:
    llms = [AsyncLLM(demo_engine), AsyncLLM(demo_engine, max_seq_len=2048)]
    yield llms
    for llm in llms:
        llm.shutdown()


@pytest.fixture(scope="module")
def server(llms: list[AsyncLLM]) -> Iterator[ThreadServer]:
    with ThreadServer(llms[:1], model_names=("demo", "other/name")) as server:
        yield server


@pytest.fixture
def client(server: ThreadServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> tuple[int, Any]:
    content = json.dumps(body)  # in ASCII: halves of surrogate pairs have no other way
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    return response.status_code, response.json()


def test_a_server_at_work_is_healthy_and_ready(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200
    assert client.get("/version").json() == {"version": fly_trt.__version__}


def test_models_are_listed_under_all_their_names(client: httpx.Client) -> None:
    found = client.get("/v1/models").json()
    assert found["object"] == "list"
    assert [card["id"] for card in found["data"]] == ["demo", "other/name"]
    assert client.get("/v1/models/other/name").json() == found["data"][1]
    assert found["data"][0]["max_model_len"] == 2048
    assert "/" not in found["data"][0]["root"], "no path of this machine"
    setting = found["data"][0]["setting"]
    assert setting["line"] == "fly (reference: threshold 0.3, window 6), model + lookup drafts of 15; not tuned"
    assert (setting["acceptance"], setting["guards"], setting["tuning"]) == ("fly", {}, None)


def test_an_unknown_model_is_404_with_its_code(client: httpx.Client) -> None:
    response = client.get("/v1/models/gpt-4")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "the model 'gpt-4' does not exist: expected 'demo' or 'other/name'",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize("body", [{"prompt": "Spell out: 21."}, {"prompt": "<|bos|>Spell out: 21."}])
def test_tokenize_gives_what_a_prompt_is_read_as(client: httpx.Client, demo_engine: Path, body: dict[str, Any]) -> None:
    with LLM(demo_engine) as llm:
        want = llm.generate(body["prompt"])[0].prompt_token_ids
    status, found = post(client, "/tokenize", **body)
    assert (status, found) == (200, {"count": len(want), "max_model_len": 2048, "tokens": want, "token_strs": None})
    plain = post(client, "/tokenize", prompt="Spell out: 21.", add_special_tokens=False)[1]["tokens"]
    assert want == [0, *plain]


def test_tokenize_of_messages_gives_the_rendered_chat(client: httpx.Client, llms: list[AsyncLLM]) -> None:
    want = llms[0].render_chat(CHAT)["prompt_token_ids"]
    assert post(client, "/tokenize", messages=CHAT)[1]["tokens"] == want
    talk = [*CHAT, {"role": "assistant", "content": "In words: twenty-one."}]
    without = llms[0].render_chat(talk, add_generation_prompt=False)["prompt_token_ids"]
    assert post(client, "/tokenize", messages=talk, add_generation_prompt=False)[1]["tokens"] == without


def test_detokenize_gives_back_what_tokenize_read(client: httpx.Client) -> None:
    text = "Spell out: 21. Zażółć 😀\n"
    found = post(client, "/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True)[1]
    assert len(found["token_strs"]) == found["count"]
    assert post(client, "/detokenize", tokens=found["tokens"]) == (200, {"prompt": text})
    assert post(client, "/detokenize", tokens=[]) == (200, {"prompt": ""})


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/tokenize", {}, 400, "the body: give either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, 400, "the body: give either prompt or messages"),
        ("/tokenize", {"prompt": ""}, 400, "the prompt is empty"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "the prompt: '\\ud800' at character 0"),
        ("/tokenize", {"prompt": 5}, 400, "prompt: input should be a valid string"),
        ("/tokenize", {"prompt": "a", "model": "b"}, 404, "the model 'b' does not exist"),
        ("/tokenize", {"prompt": "a", "colour": 1, "size": 2}, 400, "unknown fields colour, size"),
        ("/tokenize", {"prompt": "a b " * 100_000}, 400, "the prompt has 400000 characters, max_seq_len is 2048"),
        ("/tokenize", {"messages": [{"content": "a"}]}, 400, "messages[0].role: field required"),
        ("/tokenize", {"messages": CHAT, "chat_template": "x"}, 400, "chat_template 'x': expected the name of one"),
        (
            "/tokenize",
            {"messages": CHAT, "chat_template_kwargs": {"tools": 1}},
            400,
            "chat_template_kwargs: 'tools' is",
        ),
        ("/detokenize", {}, 400, "tokens: field required"),
        ("/detokenize", {"tokens": [892]}, 400, "tokens: 892 is not a token id, expected 0 to 891"),
        ("/detokenize", {"tokens": [2**70]}, 400, "tokens: 1180591620717411303424 is not a token id"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]: input should be greater than or equal to 0"),
        ("/detokenize", {"tokens": ["1"]}, 400, "tokens[0]: input should be a valid integer"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens[0]: input should be a valid integer"),
    ],
)
def test_what_is_wrong_is_one_line(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    found, answer = post(client, path, **body)
    assert found == status, answer
    assert answer["error"]["message"].startswith(message)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert len(answer["error"]["message"].splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v2", 404), ("GET", "/tokenize", 405), ("PUT", "/health", 405)]
)
def test_unknown_routes_and_methods_have_the_shape_of_all_errors(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    if status == 405:
        assert response.headers["allow"]


def test_metrics_are_those_of_the_runtime(client: httpx.Client, llms: list[AsyncLLM]) -> None:
    client.post("/v1/completions", json={"prompt": "Spell out: 21.", "max_tokens": 5, "temperature": 0})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = {
        sample.name: sample.value
        for family in parse_text(response.text)
        for sample in family.samples
        if not sample.labels
    }
    mine = llms[0].metrics()
    assert found["fly_trt:generation_tokens_total"] == mine["fly_trt:generation_tokens_total"] > 0
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert found[f"fly_trt:{gauge}"] == 0


def test_metrics_have_the_same_names_for_a_scraper_that_would_rather_have_openmetrics(client: httpx.Client) -> None:
    accept = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8,text/plain;version=0.0.4;q=0.5"
    response = client.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert {family.name for family in parse_text(response.text)} == {
        family.name for family in parse_text(client.get("/metrics").text)
    }


def test_several_engines_are_told_apart_by_a_label(llms: list[AsyncLLM]) -> None:
    with ThreadServer(llms) as server:
        text = httpx.get(f"{server.url}/metrics").text
    families = {family.name: family for family in parse_text(text)}
    running = families["fly_trt:num_requests_running"].samples
    assert [sample.labels for sample in running] == [{"engine": "0"}, {"engine": "1"}]
    tokens = families["fly_trt:generation_tokens"].samples
    assert [sample.value for sample in tokens] == [llm.metrics()["fly_trt:generation_tokens_total"] for llm in llms]
    assert text.count("# TYPE fly_trt:num_requests_running ") == 1
