"""What a response says of speculation: vLLM's object, whose numbers agree with each other as its readers check."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, SamplingParams, SpeculativeConfig
from fly_trt.outputs import RequestMetrics, RoundCounts
from fly_trt.serving.openai.answers.speculation import speculative_decoding_object
from fly_trt.serving.openai.answers.usage import metrics_object

PROMPTS = [prompt["prompt"] for prompt in load_eval_prompts()[:4]]
SUMMARY = {
    "mean_acceptance_length",
    "draft_acceptance_rate",
    "acceptance_histogram",
    "acceptance_histogram_by_draft_length",
    "num_spec_steps",
    "num_accepted_draft_tokens",
    "num_draft_tokens",
    "num_spec_tokens",
}
DETAILED = SUMMARY | {"per_step_accepted", "per_step_drafted"}


def assert_is_consistent(found: dict[str, Any]) -> None:
    """What AIPerf's adapter and record demand, and vLLM's documentation says besides."""
    histogram, steps = found["acceptance_histogram"], found["num_spec_steps"]
    accepted, drafted = found["num_accepted_draft_tokens"], found["num_draft_tokens"]
    assert all(type(count) is int and count >= 0 for count in histogram)
    assert len(histogram) == found["num_spec_tokens"] + 1
    assert sum(histogram) == steps
    assert sum(j * count for j, count in enumerate(histogram)) == accepted <= drafted
    by_length = {int(length): rows for length, rows in found["acceptance_histogram_by_draft_length"].items()}
    assert all(len(rows) == length + 1 and any(rows) for length, rows in by_length.items())
    assert sum(sum(rows) for rows in by_length.values()) == steps
    assert sum(length * sum(rows) for length, rows in by_length.items()) == drafted
    for j, count in enumerate(histogram):
        assert count == sum(rows[j] for length, rows in by_length.items() if length >= j)
    assert found["mean_acceptance_length"] == pytest.approx(1 + accepted / steps if steps else 1)
    assert found["draft_acceptance_rate"] == pytest.approx(accepted / drafted if drafted else 0)
    if "per_step_accepted" in found:
        of_steps = list(zip(found["per_step_drafted"], found["per_step_accepted"], strict=True))
        assert len(of_steps) == steps
        assert sum(d for d, _ in of_steps) == drafted
        assert sum(a for _, a in of_steps) == accepted
        assert all(a <= d for d, a in of_steps)
        for length, rows in by_length.items():
            assert rows == [of_steps.count((length, j)) for j in range(length + 1)]
    assert json.loads(json.dumps(found)) == found


def of_rounds(*rounds: tuple[int, int], detailed: bool = False) -> RequestMetrics:
    """Metrics of rounds of so many draft tokens, of which so many were emitted."""
    metrics = RequestMetrics()
    if detailed:
        metrics.per_step_drafted, metrics.per_step_accepted = [], []
    for drafted, accepted in rounds:
        metrics.record_round(RoundCounts(drafted, accepted, 0, {"model": drafted}, {"model": accepted}))
    return metrics


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}, {"stop": ["####"]}, {"max_tokens": 5}])
@pytest.mark.parametrize("acceptance", ["fly", "exact", "typical"])
def test_the_numbers_of_a_real_request_agree(demo_engine: Path, acceptance: str, settings: dict[str, Any]) -> None:
    params = SamplingParams(
        **{"max_tokens": 80} | settings, acceptance=AcceptanceParams(acceptance=acceptance), detailed_metrics=True
    )
    with LLM(demo_engine) as llm:
        for output in llm.generate(PROMPTS, params):
            found = speculative_decoding_object(output.metrics, 15, detailed=True)
            assert found is not None
            assert found.keys() == DETAILED
            assert_is_consistent(found)


def test_it_has_vllms_fields_and_ours_are_beside_it() -> None:
    metrics = of_rounds((3, 0), (3, 3), (2, 1), (0, 0))
    found = metrics_object([metrics], SamplingParams(), SpeculativeConfig(num_speculative_tokens=3))
    assert found.pop("speculative_decoding") == {
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": 0.5,
        "acceptance_histogram": [2, 1, 0, 1],
        "acceptance_histogram_by_draft_length": {"0": [1], "2": [0, 1, 0], "3": [1, 0, 0, 1]},
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 4,
        "num_draft_tokens": 8,
        "num_spec_tokens": 3,
    }
    assert found == {
        "acceptance": "fly",
        "guards": {},
        "exact_because": None,
        "num_loosened_tokens": 0,
        "num_saved_tokens": 0,
        "num_refused_loosenings_by_guard": {},
        "num_draft_tokens_by_source": {"model": 8},
        "num_accepted_tokens_by_source": {"model": 4},
    }


def test_per_step_lists_are_there_where_they_are_asked_for() -> None:
    rounds = [(3, 0), (3, 3), (2, 1)]
    found = speculative_decoding_object(of_rounds(*rounds, detailed=True), 3, detailed=True)
    assert found is not None
    assert (found["per_step_drafted"], found["per_step_accepted"]) == ([3, 3, 2], [0, 3, 1])
    assert (speculative_decoding_object(of_rounds(*rounds, detailed=True), 3) or {}).keys() == SUMMARY


def test_a_request_that_drafted_nothing_has_an_empty_histogram() -> None:
    found = speculative_decoding_object(RequestMetrics(), 4, detailed=True)
    assert found is not None
    assert found["acceptance_histogram"] == [0] * 5
    assert found["acceptance_histogram_by_draft_length"] == {}
    assert_is_consistent(found)


def test_a_round_that_is_longer_than_the_engines_lengthens_the_histogram() -> None:
    found = speculative_decoding_object(of_rounds((6, 5), (2, 2)), 3)
    assert found is not None
    assert found["num_spec_tokens"] == 6
    assert_is_consistent(found)


def test_there_is_none_for_several_sequences_and_without_speculation() -> None:
    config, metrics = SpeculativeConfig(num_speculative_tokens=3), of_rounds((3, 1))
    one, several = SamplingParams(), SamplingParams(n=2, temperature=1)
    assert metrics_object([metrics], one, config)["speculative_decoding"] is not None
    for of_prompts, params in (([metrics], several), ([metrics, metrics], one)):
        found = metrics_object(of_prompts, params, config)
        assert found["speculative_decoding"] is None
        assert found["num_accepted_tokens_by_source"] == {"model": len(of_prompts)}
    for settings in ({"method": None}, {"num_speculative_tokens": 3}):
        off = SamplingParams(num_speculative_tokens=None if "method" in settings else 0)
        assert metrics_object([RequestMetrics()], off, SpeculativeConfig(**settings))["speculative_decoding"] is None


def test_sequences_of_one_prompt_are_summed_by_draft_length_and_have_no_list_of_steps() -> None:
    one, other = of_rounds((3, 1), (2, 2), detailed=True), of_rounds((3, 3), (4, 0), detailed=True)
    total = one.merged([other])
    assert total.acceptance_by_draft_length == {2: [0, 0, 1], 3: [0, 1, 0, 1], 4: [1, 0, 0, 0, 0]}
    assert total.per_step_drafted is total.per_step_accepted is None
    alone = one.merged([])
    one.record_round(RoundCounts(3, 0, 0, {}, {}))
    assert (alone.per_step_drafted, alone.per_step_accepted) == ([3, 2], [1, 2]), "a copy"
    assert alone.acceptance_by_draft_length[3] == [0, 1, 0, 0]


def answers_of(server: Any, **body: Any) -> list[dict[str, Any]]:
    """The whole answer, and the last chunk with a choice together with the usage chunk, of the same request."""
    asked = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 60, "temperature": 0} | body
    whole = httpx.post(f"{server.base_url}/v1/completions", json=asked, timeout=60).json()
    streamed = asked | {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{server.base_url}/v1/completions", json=streamed, timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [whole, json.loads(lines[-2])]


def test_answers_and_streams_have_as_much_of_it_as_the_server_says(server: Any, demo_engine: Path) -> None:
    steady = {"speculative_config": {"adaptive_draft_length": False}}  # else how much is drafted depends on the machine
    for level, fields in (("summary", SUMMARY), ("detailed", DETAILED)):
        whole, last = answers_of(server(demo_engine, llm_settings=steady, spec_decode_metrics=level))
        assert last["choices"] == []
        assert last["metrics"] == whole["metrics"]
        assert last["usage"].keys() == whole["usage"].keys()
        found = whole["metrics"]["speculative_decoding"]
        assert found.keys() == fields
        assert found["num_accepted_draft_tokens"] > 0
        assert_is_consistent(found)
    for answer in answers_of(server(demo_engine, spec_decode_metrics="none")):
        assert "metrics" not in answer
        assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
