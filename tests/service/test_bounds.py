"""Guards that an engine is served with bound all its requests: what they ask for is in force only where it is stricter,
and the outputs say what is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, RequestOutput, SamplingParams
from toy_policy import LikelyPolicy

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:4]]
BOUND = {"max_loosened_per_100": 1, "exact_first": 3, "exact_within": ["digits"], "method": "draft_model"}
LOOSE = {"acceptance": "relaxed", "relaxed_top_n": 3, "relaxed_delta": 1.0}
IN_FORCE = {"max_loosened_per_100": 1, "exact_first": 3, "exact_within": ["digits"]}


@pytest.fixture(scope="module")
def llm(demo_engine: Path) -> Iterator[LLM]:
    with LLM(demo_engine, speculative_config=BOUND) as llm:
        yield llm


def assert_bounded(output: RequestOutput, budget: int, exact_first: int) -> int:
    """Counted on the trace of each completion; returns how many are loosened."""
    total = 0
    for completion in output.outputs:
        assert completion.trace is not None
        loosened = [
            of_token.choice != token for of_token, token in zip(completion.trace, completion.token_ids, strict=True)
        ]
        assert not any(loosened[:exact_first])
        assert max(sum(loosened[at : at + 100]) for at in range(len(loosened))) <= budget
        total += sum(loosened)
    assert output.metrics.num_loosened_tokens == total
    return total


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"max_loosened_per_100": 50, "exact_first": 0, "exact_within": []},
        {"preset": "vllm", "fly_entropy_threshold": 0.0, "fly_window_size": 0},
        LOOSE,
        LOOSE | {"max_loosened_per_100": 100},
        {"acceptance": LikelyPolicy(), "max_loosened_per_100": 7},
    ],
    ids=str,
)
def test_no_request_is_looser_than_the_engine_was_told_to_be(llm: LLM, asked: dict[str, Any]) -> None:
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 1, "n": 2}, {"temperature": 0.7, "seed": 2}]
    acceptance = AcceptanceParams(**asked)
    params = [
        SamplingParams(max_tokens=130, ignore_eos=True, acceptance=acceptance, speculation_trace=True, **way)
        for way in ways
    ]
    for output in llm.generate([PROMPTS[0]] * len(params), params):
        assert_bounded(output, budget=1, exact_first=3)
        assert output.metrics.guards == IN_FORCE


def test_a_policy_object_is_bounded_too(llm: LLM) -> None:
    params = SamplingParams(max_tokens=130, ignore_eos=True, acceptance=LikelyPolicy(), speculation_trace=True)
    outputs = llm.generate(PROMPTS, params)
    assert sum(assert_bounded(output, budget=1, exact_first=3) for output in outputs) > 0
    refused = sum(output.metrics.num_refused_loosenings_by_guard.get("max_loosened_per_100", 0) for output in outputs)
    assert refused > 0, "without the bound there were more"


def test_a_stricter_request_gets_what_it_asks_for(llm: LLM) -> None:
    acceptance = AcceptanceParams(
        **LOOSE, max_loosened_per_100=0, exact_first=5, exact_token_ids=[7], exact_within=["code"]
    )
    params = SamplingParams(max_tokens=60, acceptance=acceptance)
    exact = SamplingParams(max_tokens=60, acceptance=AcceptanceParams(acceptance="exact"))
    (bounded,), (plain,) = llm.generate(PROMPTS[0], params), llm.generate(PROMPTS[0], exact)
    assert bounded.outputs[0].token_ids == plain.outputs[0].token_ids
    assert bounded.metrics.guards == {
        "exact_first": 5,
        "exact_token_ids": [7],
        "exact_within": ["digits", "code"],
        "max_loosened_per_100": 0,
    }
    assert plain.metrics.guards == {}, "nothing is to be guarded"


def test_an_engine_that_is_exact_by_default_bounds_requests_that_are_not(demo_engine: Path) -> None:
    params = SamplingParams(
        max_tokens=130, ignore_eos=True, acceptance=AcceptanceParams(**LOOSE), speculation_trace=True
    )
    with LLM(demo_engine, speculative_config={"acceptance": "exact", "max_loosened_per_100": 2}) as llm:
        (output,) = llm.generate(PROMPTS[0], params)
    assert assert_bounded(output, budget=2, exact_first=0) > 0
