"""Which setting runs, in one line, and when the engine's tuning is no evidence about it."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from fly_trt import SpeculativeConfig
from fly_trt.manifest import SCHEMA_VERSION, File, Head, Limits, Manifest, ModelEngine, Source, Tuning
from fly_trt.runtime.metrics import Metrics
from fly_trt.service.config import merged_settings, resolve_speculative_config
from fly_trt.service.setting import describe_setting
from toy_policy import LikelyPolicy

FLY = "fly (reference: threshold 0.3, window 6), model + lookup drafts of 15"
SETTING = {"fly_entropy_threshold": 0.5, "max_loosened_per_100": 2, "num_speculative_tokens": 8}
TUNED = "fly (reference: threshold 0.5, window 6), model + lookup drafts of 8, at most 2 loosened per 100"


def engine(vocab_size: int = 100) -> ModelEngine:
    return ModelEngine(
        model="model.onnx",
        source=Source(checkpoint="org/model", architecture="LlamaForCausalLM", num_parameters=700),
        vocab_size=vocab_size,
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
    )


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        backend="onnxruntime",
        name="tiny",
        fly_trt_version="0",
        library_versions={},
        limits=Limits(max_batch_size=1, max_seq_len=64, max_draft_len=15, max_num_tokens=32),
        head=Head(entropy_top_k=3, stop_token_ids=[1], top_tokens=True),
        speculative={"draft_token_cost": 0.1},
        target=engine(),
        draft=engine(),
        files={"model.onnx": File(size=5, sha256="1" * 64)},
    )


@pytest.fixture
def tuned(manifest: Manifest) -> Manifest:
    """As write_tuning leaves it."""
    setting = merged_settings(manifest, SETTING)
    tuning = Tuning(
        min_retention=0.99,
        confidence=0.95,
        retention=0.998,
        lower_bound=0.99149,
        judged_by="checks",
        num_prompts=160,
        prompts_sha256="0" * 64,
        seed=0,
        speedup_over_plain=2.31,
        speedup_over_default=1.1,
        machine="2 cores",
        date=datetime.date(2026, 11, 27),
        version="0.1.0",
        setting=setting,
        previous=manifest.speculative,
        engine_sha256=manifest.engine_sha256(),
    )
    return manifest.model_copy(update={"speculative": setting, "tuning": tuning})


def line_of(manifest: Manifest, overrides: dict[str, Any]) -> str:
    line = str(describe_setting(manifest, resolve_speculative_config(manifest, overrides)))
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({}, f"{FLY}; not tuned"),
        ({"method": None}, "plain decoding"),
        ({"acceptance": "exact"}, "exact, model + lookup drafts of 15"),
        ({"method": "ngram", "num_speculative_tokens": 4}, "exact, lookup drafts of 4"),
        (
            {"preset": "paper", "method": "draft_model", "draft_stop": "adasd"},
            "fly (paper: threshold 1.38, window 6), model drafts of 15 that adasd ends; not tuned",
        ),
        (
            {"fly_entropy_threshold": 0, "fly_window_size": 0, "method": "suffix", "acceptance": "fly"},
            "fly (reference: no gate, no window), suffix drafts of 15; not tuned",
        ),
        (
            {"acceptance": "relaxed", "relaxed_top_n": 2, "exact_first": 4, "exact_within": ["code", "digits"]},
            "relaxed (top_n 2, delta 0.6), model + lookup drafts of 15, the first 4 exact, exact within code and "
            "digits; not tuned",
        ),
        (
            {"acceptance": "exact", "max_loosened_per_100": 0, "exact_token_ids": [3, 4]},
            "exact, model + lookup drafts of 15, at most 0 loosened per 100, 2 token ids exact",
        ),
        ({"acceptance": LikelyPolicy()}, "likely, model + lookup drafts of 15; not tuned"),
    ],
    ids=str,
)
def test_one_line_says_what_runs(manifest: Manifest, overrides: dict[str, Any], line: str) -> None:
    assert line_of(manifest, overrides) == line


def test_what_was_tuned_comes_with_its_evidence_whose_bound_is_not_rounded_up(tuned: Manifest) -> None:
    evidence = "tuned on 2026-11-27: keeps 99.1 % with 95 % confidence on 160 prompts, 2.3x plain"
    assert line_of(tuned, {}) == f"{TUNED}; {evidence}"
    assert line_of(tuned, {"max_loosened_per_100": 2}) == f"{TUNED}; {evidence}", "the same said again"


def test_of_a_lossless_setting_no_confidence_is_told(manifest: Manifest, tuned: Manifest) -> None:
    assert tuned.tuning is not None
    setting = {"acceptance": "exact"}
    lossless = manifest.model_copy(
        update={
            "speculative": setting,
            "tuning": tuned.tuning.model_copy(update={"setting": setting, "retention": 1.0, "lower_bound": 1.0}),
        }
    )
    assert line_of(lossless, {}) == "exact, model + lookup drafts of 15; tuned on 2026-11-27: 2.3x plain on 160 prompts"


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"fly_window_size": 3}, "fly_window_size differs"),
        ({"max_loosened_per_100": 3, "preset": "vllm"}, "max_loosened_per_100, fly_entropy_threshold, preset differ"),
        ({"method": "draft_model"}, "method differs"),
    ],
)
def test_what_overrides_the_tuned_setting_has_no_evidence(tuned: Manifest, overrides: dict[str, Any], why: str) -> None:
    line = line_of(tuned, overrides)
    named = line.partition("not as tuned on 2026-11-27 (")[2].partition(")")[0]
    assert sorted(named.removesuffix(" differ").removesuffix(" differs").split(", ")) == sorted(
        why.removesuffix(" differ").removesuffix(" differs").split(", ")
    )
    assert line.endswith(": that evidence is not about it")


def test_nor_has_an_engine_whose_files_changed_or_another_drafter(tuned: Manifest) -> None:
    files = {"model.onnx": File(size=5, sha256="2" * 64)}
    assert line_of(tuned.model_copy(update={"files": files}), {}) == (
        f"{TUNED}; tuned on 2026-11-27, and the engine's files changed since: that evidence is not about them"
    )
    config = resolve_speculative_config(tuned, {})
    assert "own drafts of 8" in str(describe_setting(tuned, config, has_own_drafter=True))
    assert "(drafter differs)" in str(describe_setting(tuned, config, has_own_drafter=True))


def test_hand_made_defaults_beside_a_tuning_are_not_what_it_is_about(tuned: Manifest) -> None:
    edited = tuned.model_copy(update={"speculative": {**tuned.speculative, "fly_entropy_threshold": 0.1}})
    assert "(fly_entropy_threshold differs)" in line_of(edited, {})


def test_what_was_merged_resolves_to_the_same_as_overrides(manifest: Manifest) -> None:
    built = manifest.model_copy(update={"speculative": {"fly_entropy_threshold": 0.2, "draft_stop": "adasd"}})
    changes: list[dict[str, Any]] = [{}, SETTING, {"preset": "paper"}, {"method": "ngram"}, {"draft_stop": "adaedl"}]
    for overrides in (*changes, {"method": None}):
        merged = built.model_copy(update={"speculative": merged_settings(built, overrides)})
        assert resolve_speculative_config(merged, {}) == resolve_speculative_config(built, overrides)


def test_machines_get_it_as_a_record_and_as_labels(tuned: Manifest, tmp_path: Path) -> None:
    setting = describe_setting(tuned, resolve_speculative_config(tuned, {}))
    record = setting.as_dict()
    assert record["line"] == str(setting)
    assert (record["acceptance"], record["method"], record["num_speculative_tokens"]) == ("fly", "multi_level", 8)
    assert record["guards"] == {"max_loosened_per_100": 2}
    assert record["tuning"].items() >= {"status": "applies", "date": "2026-11-27", "lower_bound": 0.99149}.items()
    assert describe_setting(tuned, SpeculativeConfig(method=None)).as_dict()["tuning"]["status"] == "other setting"
    metrics = Metrics()
    metrics.set_setting(setting.labels())
    (name,) = [name for name in metrics.as_dict() if "setting_info" in name]
    assert name == (f'fly_trt:setting_info{{acceptance="fly",method="multi_level",setting="{TUNED}",tuning="applies"}}')
