"""A whole run of fly-tune over the demo pair: what it says is what the engines do."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import fly_trt.engines.directory
from eval_prompts import load_eval_prompts
from fly_trt import ConfigError, EngineError
from fly_trt.engines import load_engine
from fly_trt.tuning.result import DEFAULT, PLAIN, TuningResult
from fly_trt.tuning.run import Progress
from fly_trt.tuning.tune import TuningConfig, run_tuning

FEW = {"methods": ["ngram"], "acceptances": ["exact", "margin"], "num_candidates": 5, "max_tokens": 12, "budget": None}


def prompts_file(folder: Path, count: int = 6) -> Path:
    """With a check that every answer passes."""
    path = folder / "prompts.jsonl"
    check = {"kind": "regex", "value": "."}
    records = [{"prompt": one["prompt"], "check": check} for one in load_eval_prompts()[:count]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def config(folder: Path) -> TuningConfig:
    path = prompts_file(folder)
    return TuningConfig(prompts=path, state=folder / "state.jsonl", num_threads=1, **FEW)


@pytest.fixture(scope="module")
def told() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def result(demo_engine: Path, config: TuningConfig, told: list[Progress]) -> TuningResult:
    with pytest.MonkeyPatch.context() as patch:
        loaded: list[str] = []

        def load_once(directory: Path, manifest: Any, model: Any, **more: Any) -> Any:
            loaded.append(model.model)
            return load_engine(directory, manifest, model, **more)

        patch.setattr(fly_trt.engines.directory, "load_engine", load_once)
        found = run_tuning(demo_engine, config, told.append)
    assert len(loaded) == len(set(loaded))  # once for all candidates
    return found


def no_engine(*arguments: object, **more: object) -> None:
    raise AssertionError("an engine is loaded")


def test_lossless_candidates_answer_as_the_target_does(result: TuningResult) -> None:
    lossless = [one for one in result.candidates if one.candidate.is_lossless]
    assert {PLAIN, "ngram+exact"} <= {one.candidate.name for one in lossless}
    for one in lossless:
        assert (one.same_answers, one.loosened_per_100) == (1, 0)
        assert one.quality == one.target_quality == 1


def test_plain_decoding_and_the_default_are_judged_whatever_else_is(result: TuningResult) -> None:
    judged = {one.candidate.name: one for one in result.candidates if one.stage == "judge"}
    assert {PLAIN, DEFAULT} < set(judged)
    assert {one.num_prompts for one in judged.values()} == {len(result.judge_prompts)}


def test_the_prompts_that_judge_are_not_those_that_chose(result: TuningResult) -> None:
    assert sorted((*result.search_prompts, *result.judge_prompts)) == list(range(6))


def test_six_prompts_claim_nothing_of_what_is_loose(result: TuningResult) -> None:
    assert result.chosen.candidate.is_lossless
    default = next(one for one in result.candidates if one.candidate.name == DEFAULT)
    assert default.retention is not None
    assert default.retention.lower < 0.9
    assert default.retention.num_prompts_without_loss > 300


def test_what_left_the_search_says_why(result: TuningResult) -> None:
    assert all(one.verdict for one in result.candidates)


def test_progress_names_the_stage_and_what_is_left(result: TuningResult, told: list[Progress]) -> None:
    assert [told[0].what, told[-1].what] == ["search 0", "judge"]
    assert told[-1].done == told[-1].total == len(result.judge_prompts)
    assert told[0].num_candidates == 5


def test_a_finished_run_is_shown_again_without_engines(
    demo_engine: Path, config: TuningConfig, result: TuningResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fly_trt.engines.directory, "load_engine", no_engine)
    again = run_tuning(demo_engine, config)
    assert again.candidates == result.candidates
    assert again.verdict == result.verdict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "another seed"),
        ({"max_tokens": 13}, "another max_tokens"),
        ({"num_threads": 2}, "another num_threads"),
        ({"acceptances": ["exact"]}, "another acceptances"),
    ],
)
def test_the_state_of_another_run_is_refused(
    demo_engine: Path, config: TuningConfig, result: TuningResult, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_tuning(demo_engine, dataclasses.replace(config, **change))


def test_what_another_machine_measured_is_no_evidence_for_this_one(
    demo_engine: Path, config: TuningConfig, result: TuningResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1000)
    with pytest.raises(ConfigError, match=r'another machine \(\{"num_cores": \d+\}, now \{"num_cores": 1000\}\)'):
        run_tuning(demo_engine, config)


def test_other_prompts_are_another_run(
    demo_engine: Path, config: TuningConfig, result: TuningResult, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="another prompts file"):
        run_tuning(demo_engine, dataclasses.replace(config, prompts=prompts_file(tmp_path, count=7)))


def test_under_a_load_candidates_take_turns_by_blocks_of_prompts(
    demo_engine: Path, config: TuningConfig, tmp_path: Path
) -> None:
    state = tmp_path / "state.jsonl"
    changes = {"concurrency": 2, "state": state, "acceptances": ["exact"], "num_candidates": 3, "max_tokens": 4}
    found = run_tuning(demo_engine, dataclasses.replace(config, **changes))
    blocks = [json.loads(line) for line in state.read_text().splitlines() if '"measured"' in line]
    judged = next(block for block in blocks if block["measured"] == "judge")
    assert len({outcome["prompt_index"] for outcome in judged["outcomes"]}) == 4
    assert len(found.judge_prompts) == 4


@pytest.mark.parametrize(
    ("lines", "change", "message"),
    [
        ([], {}, "no prompts"),
        (['{"prompt": "x"}'], {}, "one prompt: tuning takes one to choose by"),
        (['{"prompt": "x"}', '{"prompt": "x"}'], {}, "one prompt"),
        (['{"prompt": "x"}', "y"], {}, "prompts.jsonl:2: not JSON"),
        (['{"prompt": "x"}', json.dumps({"prompt": "word " * 3000})], {}, "'word word"),
        (['{"prompt": "x"}', '{"prompt": "y"}'], {"methods": ["self"]}, "method self: demo was built for no such way"),
        (['{"prompt": "x"}', '{"prompt": "y"}'], {"concurrency": 99}, "rebuild with --max-batch-size 99"),
    ],
)
def test_what_cannot_be_tuned_with_is_refused_before_an_engine_is_loaded(
    demo_engine: Path,
    tmp_path: Path,
    lines: list[str],
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fly_trt.engines.directory, "load_engine", no_engine)
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        run_tuning(demo_engine, TuningConfig(prompts=path, **change))
    assert message in str(caught.value)


def test_a_directory_that_is_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such engine directory"):
        run_tuning(tmp_path / "nowhere", TuningConfig(prompts=prompts_file(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"min_retention": 1.0},
            "such as 0.95; acceptance exact tries lossless settings alone",
        ),
        ({"confidence": 0}, "confidence 0: expected a share"),
        ({"budget": 0}, "budget 0: expected minutes, above 0"),
        ({"budget": float("inf")}, "budget inf: expected minutes, above 0"),
        ({"score_timeout": 0}, "score_timeout 0: expected seconds, above 0"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"num_finalists": 0}, "num_finalists 0"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TuningConfig(prompts=Path("prompts.jsonl"), **change)
    assert message in str(caught.value)
