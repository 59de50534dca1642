"""The demo pair on evaluation prompts, all of them in a long run and every third one otherwise: exact speculation is
lossless, FLy keeps the target's accuracy."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, RequestOutput, SamplingParams
from fly_trt.benchmark.checks import is_right

Answers = Callable[..., list[RequestOutput]]
PARAMS = SamplingParams(max_tokens=160)
FIXED = {"method": "multi_level", "adaptive_draft_length": False}
"""Every round drafts 15 tokens, so that rounds can be compared."""


@pytest.fixture(scope="module")
def records(is_long: bool) -> list[dict[str, Any]]:
    return load_eval_prompts()[:: 1 if is_long else 3]


@pytest.fixture(scope="module")
def answers(records: list[dict[str, Any]], build_once: Callable[[str, Callable[[Path], object]], Path]) -> Answers:
    """What an engine answers to all of them, asked once in a run."""

    def answers(engine: Path, **settings: Any) -> list[RequestOutput]:
        def ask(path: Path) -> None:
            with LLM(engine, speculative_config=settings) as llm:
                outputs = llm.generate([record["prompt"] for record in records], PARAMS)
            path.write_bytes(pickle.dumps(outputs))

        name = "".join(c if c.isalnum() else "-" for c in json.dumps(settings, sort_keys=True))
        return pickle.loads(build_once(f"answers-{engine.name}-{name}", ask).read_bytes())

    return answers


def share_right(outputs: list[RequestOutput], records: list[dict[str, Any]]) -> float:
    pairs = zip(records, outputs, strict=True)
    return sum(is_right(r["check"], o.outputs[0].text) for r, o in pairs) / len(records)


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_autoregressive_decoding_answers_every_prompt_right(
    demo_engine: Path, answers: Answers, records: list[dict[str, Any]], is_long: bool
) -> None:
    assert len(records) == (240 if is_long else 80)
    assert share_right(answers(demo_engine, method=None), records) == 1


@pytest.mark.parametrize(
    "settings", [FIXED, FIXED | {"method": "draft_model"}, FIXED | {"method": "ngram"}], ids=lambda s: s["method"]
)
def test_exact_speculation_is_lossless(demo_engine: Path, answers: Answers, settings: dict) -> None:
    plain = answers(demo_engine, method=None)
    speculative = answers(demo_engine, acceptance="exact", **settings)
    assert token_ids(speculative) == token_ids(plain)
    assert sum(output.metrics.num_loosened_tokens for output in speculative) == 0
    assert sum(output.metrics.num_accepted_tokens for output in speculative) > 1000 / 240 * len(plain)


def test_fly_keeps_99_percent_of_the_accuracy_in_fewer_steps(
    demo_engine: Path, answers: Answers, records: list[dict[str, Any]]
) -> None:
    exact = answers(demo_engine, acceptance="exact", **FIXED)
    fly = answers(demo_engine, acceptance="fly", **FIXED)
    assert share_right(fly, records) >= 0.99
    assert sum(output.metrics.num_loosened_tokens for output in fly) > 100 / 240 * len(records)
    steps = [sum(output.metrics.num_spec_steps for output in outputs) for outputs in (exact, fly)]
    assert steps[1] < 0.9 * steps[0]


def test_a_weak_draft_costs_little_accuracy_in_this_sample(
    weak_engine: Path, answers: Answers, records: list[dict[str, Any]]
) -> None:
    fly = answers(weak_engine, method="multi_level", acceptance="fly")
    assert share_right(fly, records) >= 0.95


def test_flys_ablations_accept_more_than_it_and_keep_less(
    weak_engine: Path, answers: Answers, records: list[dict[str, Any]]
) -> None:
    """On this pair the gate is what keeps answers right; on the paper's it is the window."""
    published = FIXED | {"adaptive_acceptance": False}
    outputs = {
        "exact": answers(weak_engine, acceptance="exact", **published),
        "fly": answers(weak_engine, acceptance="fly", **published),
        "no window": answers(weak_engine, acceptance="fly", fly_window_size=0, **published),
        "no gate": answers(weak_engine, acceptance="fly", fly_entropy_threshold=0, **published),
    }
    right = {name: share_right(given, records) for name, given in outputs.items()}
    assert right["no gate"] < right["no window"] <= right["fly"] <= right["exact"] == 1
    steps = {name: sum(output.metrics.num_spec_steps for output in given) for name, given in outputs.items()}
    assert max(steps["no gate"], steps["no window"]) < steps["fly"] < steps["exact"]


def test_int8_keeps_99_percent_of_the_accuracy_and_exact_speculation_is_lossless(
    target_only_engine: Path, answers: Answers, records: list[dict[str, Any]]
) -> None:
    plain = answers(target_only_engine, method=None)
    speculative = answers(target_only_engine, method="ngram", acceptance="exact")
    assert share_right(plain, records) >= 0.99
    assert token_ids(speculative) == token_ids(plain)
