"""A result of tuning is JSON and back."""

import dataclasses
import json

import pytest

from fly_trt import ConfigError
from fly_trt.tuning.result import (
    Candidate,
    CandidateResult,
    RetentionBound,
    SpeedRatio,
    TuningResult,
    TuningSettings,
    Verdict,
)


def result() -> TuningResult:
    bound = RetentionBound(0.99, 0.97, 0.95, 2, 160, 2, 1, 299, 1500, "exact", mcnemar_p=0.5)
    loose = CandidateResult(
        candidate=Candidate("fly", {"acceptance": "fly", "fly_window_size": 4}, drafter="draft_model", policy="fly"),
        stage="judge",
        num_prompts=160,
        num_tokens=9000,
        tokens_per_second=410.5,
        over_plain=SpeedRatio(2.1, 2.0, 2.2),
        over_default=None,
        quality=0.8,
        target_quality=0.81,
        loosened_per_100=1.5,
        same_answers=0.7,
        common_prefix=0.9,
        perplexity_ratio=1.01,
        retention=bound,
    )
    settings = TuningSettings("é.jsonl", "ab", 240, "checks", 0.99, 0.95, 0, 64, {"budget": 5.0})
    verdict = Verdict("found", "fly", ["Found."])
    return TuningResult(settings, [loose], verdict, [0, 1], [2, 3], {"name": "x"}, {}, {}, "2026-01-01", 12.5)


def test_a_result_is_json_and_back() -> None:
    read = TuningResult.from_json(result().to_json())
    assert read == result()
    assert read.chosen.over_plain == SpeedRatio(2.1, 2.0, 2.2)


def test_json_has_no_numbers_that_json_does_not_know() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(result(), seconds=float("nan")).to_json()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "schema_version None, expected 1"),
        ('{"schema_version": 2}', "schema_version 2, expected 1"),
        ('{"schema_version": 1}', "missing"),
        (json.dumps({**json.loads(result().to_json()), "more": 1}), "unknown key 'more'"),
        (json.dumps({**json.loads(result().to_json()), "verdict": 1}), "1, expected an object"),
    ],
)
def test_what_is_no_result_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TuningResult.from_json(text)
