"""What fly-serve says of how tokens came to be is a trace that fly-inspect reads, streamed or not, and the same as
LLM's."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, SamplingParams
from fly_trt.inspection.sources import parse_traces

PROMPT = load_eval_prompts()[0]["prompt"]
# What becomes of a draft, and how its round is cut, so depends on nothing but the request.
FIXED = {"speculative_config": {"adaptive_draft_length": False}}
ASKED = {"model": "demo", "max_tokens": 40, "temperature": 0, "speculation_trace": True, "num_speculative_tokens": 6}


@pytest.fixture(scope="module")
def site(server: Any, demo_engine: Path) -> Any:
    return server(demo_engine, llm_settings=FIXED)


def post(site: Any, path: str, **fields: Any) -> bytes:
    """The body of the answer, as a client may save it."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{site.base_url}{path}", json.dumps(ASKED | fields).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def known_of(content: bytes) -> dict[str, Any]:
    """The one request of it, without what differs from one to the next: its name and its times."""
    (request,) = parse_traces(content, "answer")["requests"]
    for round_ in request["rounds"]:
        assert round_.pop("draft_seconds") >= 0
        assert round_.pop("verification_seconds") > 0
    return request | {"name": ""}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Spell out: 21."}]}),
    ],
)
def test_answers_and_streams_are_the_same_trace(site: Any, path: str, fields: dict[str, Any]) -> None:
    whole = known_of(post(site, path, **fields))
    streamed = known_of(post(site, path, **fields, stream=True, stream_options={"include_usage": True}))
    assert streamed == whole
    assert whole["metrics"]["num_output_tokens"] == len(whole["tokens"])
    assert whole["rounds"][-1]["number"] == whole["tokens"][-1]["round"]
    short = known_of(post(site, path, **fields, stream=True))  # no last chunk with metrics
    assert short == whole | {"metrics": None}


def test_it_says_what_llm_says(site: Any, demo_engine: Path) -> None:
    served = known_of(post(site, "/v1/completions", prompt=PROMPT))
    params = SamplingParams(max_tokens=40, speculation_trace=True, num_speculative_tokens=6)
    with LLM(demo_engine, max_batch_size=1, **FIXED) as llm:
        (completion,) = llm.generate(PROMPT, params)[0].outputs
    assert completion.trace is not None
    said = [(how.kind, how.round, how.choice, how.rejected) for how in completion.trace]
    assert said == [
        (token["kind"], token["round"], token["choice"], (token["rejected"] or {}).get("token_id"))
        for token in served["tokens"]
    ]
    assert [how.reason for how in completion.trace] == [token["reason"] for token in served["tokens"]]


def test_nobody_else_gets_it(site: Any) -> None:
    answer = json.loads(post(site, "/v1/completions", prompt=PROMPT, speculation_trace=False))
    assert not {"speculation_trace", "speculation_rounds"} & answer["choices"][0].keys()
