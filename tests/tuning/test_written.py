"""The setting that fly-tune found, in the engine's manifest: never one that is slower than plain decoding."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fly_trt import ConfigError
from fly_trt.manifest import (
    SCHEMA_VERSION,
    Head,
    Limits,
    Manifest,
    ModelEngine,
    Source,
    hash_directory,
    read_manifest,
    write_manifest,
)
from fly_trt.service.config import resolve_speculative_config
from fly_trt.tuning.result import (
    DEFAULT,
    PLAIN,
    Candidate,
    CandidateResult,
    RetentionBound,
    SpeedRatio,
    TuningResult,
    TuningSettings,
    Verdict,
)
from fly_trt.tuning.written import write_setting

AS_BUILT = {"method": "ngram", "draft_token_cost": 0.1}
SETTINGS = {"method": "suffix", "acceptance": "conditional", "conditional_floor": 0.3}
BOUND = RetentionBound(0.999, 0.992, 0.95, 2, 400, 1, 1, 309, 350, "exact")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete engine directory as far as the manifest is concerned."""
    (tmp_path / "model.onnx").write_bytes(b"graph")
    target = ModelEngine(
        model="model.onnx",
        source=Source(checkpoint="org/model", architecture="LlamaForCausalLM", num_parameters=700),
        vocab_size=32,
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        backend="onnxruntime",
        name="tiny",
        fly_trt_version="0",
        library_versions={},
        limits=Limits(max_batch_size=1, max_seq_len=64, max_draft_len=15, max_num_tokens=32),
        head=Head(entropy_top_k=3, stop_token_ids=[1], top_tokens=True),
        speculative=AS_BUILT,
        target=target,
        draft=None,
        files=hash_directory(tmp_path),
    )
    write_manifest(manifest, tmp_path)
    return tmp_path


def result(chosen: str, lower: float = 1.4, **candidate: Any) -> TuningResult:
    """One that chose a candidate whose speed is surely `lower` times that of plain decoding."""
    over_plain = SpeedRatio(lower + 0.1, lower, lower + 0.2)
    one = CandidateResult(
        candidate=Candidate(chosen, **candidate),
        stage="judge",
        num_prompts=400,
        num_tokens=9000,
        tokens_per_second=410.5,
        over_plain=None if chosen == PLAIN else over_plain,
        over_default=None if chosen == DEFAULT else SpeedRatio(1.2, 1.1, 1.3),
        quality=0.999,
        target_quality=1.0,
        loosened_per_100=1.0,
        same_answers=0.9,
        common_prefix=0.95,
        perplexity_ratio=None,
        retention=None if candidate.get("is_lossless") else BOUND,
    )
    return TuningResult(
        settings=TuningSettings("prompts.jsonl", "0f", 500, "checks", 0.99, 0.95, 7, 64, {"default": AS_BUILT}),
        candidates=[one],
        verdict=Verdict("found", chosen, ["Found."]),
        search_prompts=[0],
        judge_prompts=[1, 2],
        engine={},
        machine={"cpu": "a CPU", "gpu": None},
        versions={},
        date="2026-01-02T03:04:05+00:00",
        seconds=60.0,
    )


def test_the_engine_then_runs_what_was_measured_and_says_why(directory: Path) -> None:
    measured = resolve_speculative_config(read_manifest(directory), SETTINGS)
    assert write_setting(directory, result("suffix+conditional", settings=SETTINGS))
    written = read_manifest(directory)
    assert resolve_speculative_config(written, {}) == measured
    assert written.tuning is not None
    assert (written.tuning.lower_bound, written.tuning.num_prompts, written.tuning.seed) == (0.992, 400, 7)
    assert (written.tuning.speedup_over_plain, written.tuning.speedup_over_default) == (1.5, 1.2)
    assert written.tuning.previous == AS_BUILT
    assert written.tuning.machine == "a CPU"


def test_of_a_lossless_setting_everything_is_kept(directory: Path) -> None:
    settings = {"method": "suffix", "acceptance": "exact"}
    assert write_setting(directory, result("suffix+exact", settings=settings, is_lossless=True))
    tuning = read_manifest(directory).tuning
    assert tuning is not None
    assert (tuning.retention, tuning.lower_bound) == (1, 1)


def test_a_default_that_stays_gets_its_evidence(directory: Path) -> None:
    measured = resolve_speculative_config(read_manifest(directory), {})
    assert write_setting(directory, result(DEFAULT, settings={}, is_lossless=True))
    written = read_manifest(directory)
    assert resolve_speculative_config(written, {}) == measured
    assert written.tuning is not None
    assert written.tuning.speedup_over_default == 1


@pytest.mark.parametrize(
    "slow", [result(PLAIN, settings={"method": None}), result("slow", lower=0.99, settings=SETTINGS)]
)
def test_what_is_not_surely_faster_than_plain_decoding_is_not_written(directory: Path, slow: TuningResult) -> None:
    before = (directory / "fly.json").read_bytes()
    assert not write_setting(directory, slow)
    assert (directory / "fly.json").read_bytes() == before


def test_a_setting_without_the_claim_that_was_asked_for_is_not_written(directory: Path) -> None:
    found = result("suffix+conditional", settings=SETTINGS)
    settings = dataclasses.replace(found.settings, min_retention=0.995)
    assert not write_setting(directory, dataclasses.replace(found, settings=settings))


def test_an_engine_whose_default_was_changed_meanwhile_is_left_as_it_is(directory: Path) -> None:
    manifest = read_manifest(directory)
    write_manifest(manifest.model_copy(update={"speculative": {"method": "suffix"}}), directory)
    with pytest.raises(ConfigError, match="its defaults have changed since they were measured"):
        write_setting(directory, result("suffix+conditional", settings=SETTINGS))
