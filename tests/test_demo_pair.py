"""The demo pair on all evaluation prompts: exact speculation is lossless, FLy keeps the target's accuracy."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, RequestOutput, SamplingParams
from fly_trt.benchmark.checks import is_right

RECORDS = load_eval_prompts()
PARAMS = SamplingParams(max_tokens=160)
FIXED = {"method": "multi_level", "adaptive_draft_length": False}
"""Every round drafts 15 tokens, so that rounds can be compared."""


@cache
def answers(engine: Path, **settings: Any) -> list[RequestOutput]:
    with LLM(engine, speculative_config=settings) as llm:
        return llm.generate([record["prompt"] for record in RECORDS], PARAMS)


def num_right(outputs: list[RequestOutput]) -> int:
    return sum(is_right(r["check"], o.outputs[0].text) for r, o in zip(RECORDS, outputs, strict=True))


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_autoregressive_decoding_answers_every_prompt_right(demo_engine: Path) -> None:
    assert len(RECORDS) == 240
    assert num_right(answers(demo_engine, method=None)) == 240


@pytest.mark.parametrize("settings", [FIXED, {"method": "draft_model"}, {"method": "ngram"}], ids=lambda s: s["method"])
def test_exact_speculation_is_lossless(demo_engine: Path, settings: dict) -> None:
    plain = answers(demo_engine, method=None)
    speculative = answers(demo_engine, acceptance="exact", **settings)
    assert token_ids(speculative) == token_ids(plain)
    assert sum(output.metrics.num_loosened_tokens for output in speculative) == 0
    assert sum(output.metrics.num_accepted_tokens for output in speculative) > 1000


def test_fly_keeps_99_percent_of_the_accuracy_in_fewer_steps(demo_engine: Path) -> None:
    exact = answers(demo_engine, acceptance="exact", **FIXED)
    fly = answers(demo_engine, acceptance="fly", **FIXED)
    assert num_right(fly) >= 0.99 * 240
    assert sum(output.metrics.num_loosened_tokens for output in fly) > 100
    steps = [sum(output.metrics.num_spec_steps for output in outputs) for outputs in (exact, fly)]
    assert steps[1] < 0.9 * steps[0]


def test_a_weak_draft_costs_little_accuracy_in_this_sample(weak_engine: Path) -> None:
    fly = answers(weak_engine, method="multi_level", acceptance="fly")
    assert num_right(fly) >= 0.95 * 240


def test_int8_keeps_99_percent_of_the_accuracy_and_exact_speculation_is_lossless(target_only_engine: Path) -> None:
    plain = answers(target_only_engine, method=None)
    speculative = answers(target_only_engine, method="ngram", acceptance="exact")
    assert num_right(plain) >= 0.99 * 240
    assert token_ids(speculative) == token_ids(plain)
