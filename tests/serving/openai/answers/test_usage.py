"""What an answer says of tokens and of speculation, field by field, against what LLM.generate says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, SamplingParams

PROMPTS = [record["prompt"] for record in load_eval_prompts()[50:60]]


@pytest.fixture(scope="module")
def llm(demo_engine: Path) -> Iterator[LLM]:
    with LLM(demo_engine, speculative_config={"adaptive_draft_length": False}) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(steady: Any) -> OpenAI:
    return steady.client


def complete(client: OpenAI, prompt: Any, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"max_tokens": 32, "temperature": 0, **fields}
    return client.completions.create(model="demo", prompt=prompt, extra_body=extra, **fields)


@pytest.mark.parametrize("acceptance", ["exact", "fly"])
def test_usage_counts_tokens_and_predictions(client: OpenAI, llm: LLM, acceptance: str) -> None:
    params = SamplingParams(max_tokens=32, acceptance=AcceptanceParams(acceptance=acceptance))
    for prompt in PROMPTS[:3]:
        metrics = llm.generate(prompt, params)[0].metrics
        usage = complete(client, prompt, extra={"acceptance": acceptance}).usage
        assert usage.prompt_tokens == metrics.num_prompt_tokens
        assert usage.completion_tokens == metrics.num_output_tokens
        assert usage.total_tokens == metrics.num_prompt_tokens + metrics.num_output_tokens
        details = usage.completion_tokens_details
        assert details.accepted_prediction_tokens == metrics.num_accepted_tokens
        assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == metrics.num_draft_tokens


def test_usage_counts_what_the_cache_had(client: OpenAI) -> None:
    prompt = PROMPTS[3] * 3
    complete(client, prompt)
    usage = complete(client, prompt).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_metrics_are_those_of_generate(client: OpenAI, llm: LLM) -> None:
    metrics = llm.generate(PROMPTS[4], SamplingParams(max_tokens=32))[0].metrics
    found = complete(client, PROMPTS[4]).metrics
    assert found.keys() == {
        "speculative_decoding",
        "acceptance",
        "exact_because",
        "guards",
        "num_loosened_tokens",
        "num_saved_tokens",
        "num_refused_loosenings_by_guard",
        "num_draft_tokens_by_source",
        "num_accepted_tokens_by_source",
    }
    assert found["acceptance"] == "fly"
    assert found["num_loosened_tokens"] == metrics.num_loosened_tokens
    assert found["num_saved_tokens"] == metrics.num_saved_tokens >= metrics.num_loosened_tokens
    assert found["guards"] == found["num_refused_loosenings_by_guard"] == {}
    assert found["num_draft_tokens_by_source"] == metrics.num_draft_tokens_by_source
    assert found["num_accepted_tokens_by_source"] == metrics.num_accepted_tokens_by_source
    said = found["speculative_decoding"]
    assert said["num_spec_steps"] == metrics.num_spec_steps
    assert said["num_draft_tokens"] == metrics.num_draft_tokens
    assert said["num_accepted_draft_tokens"] == metrics.num_accepted_tokens
    assert said["mean_acceptance_length"] == metrics.mean_acceptance_length
    assert said["draft_acceptance_rate"] == metrics.num_accepted_tokens / metrics.num_draft_tokens
    assert said["num_spec_tokens"] == 15
    assert sum(said["acceptance_histogram"]) == metrics.num_spec_steps
    assert "per_step_accepted" not in said


def test_a_request_that_drafts_less_says_so(client: OpenAI) -> None:
    found = complete(client, PROMPTS[5], extra={"num_speculative_tokens": 4}).metrics["speculative_decoding"]
    assert found["num_spec_tokens"] == 4
    assert complete(client, PROMPTS[5], extra={"num_speculative_tokens": 0}).metrics["speculative_decoding"] is None


def test_a_request_may_ask_how_each_token_came_to_be(client: OpenAI, llm: LLM) -> None:
    expected = llm.generate(PROMPTS[7], SamplingParams(max_tokens=32, speculation_trace=True))[0].outputs[0]
    asked = {"speculation_trace": True}
    trace = complete(client, PROMPTS[7], extra=asked).choices[0].speculation_trace
    assert [each["token_id"] for each in trace] == expected.token_ids
    names = ("kind", "source", "round", "entropy", "choice")
    for each, how in zip(trace, expected.trace, strict=True):
        assert [each[name] for name in names] == [getattr(how, name) for name in names]
        assert each["kind"] == "loosened" or each["token"] == each["choice_token"]
    text = "".join(each["token"] for each in trace).removesuffix("<|eos|>")
    assert text == expected.text
    chunks = complete(client, PROMPTS[7], extra=asked, stream=True)
    assert [each for chunk in chunks for each in chunk.choices[0].speculation_trace] == trace
    messages = [{"role": "user", "content": "Spell out: 21."}]
    fields = {"model": "demo", "messages": messages, "max_tokens": 32, "temperature": 0, "extra_body": asked}
    answer = client.chat.completions.create(**fields).choices[0].speculation_trace
    streamed = [
        each
        for chunk in client.chat.completions.create(stream=True, **fields)
        for each in getattr(chunk.choices[0], "speculation_trace", [])
    ]
    assert streamed == answer
    assert answer
