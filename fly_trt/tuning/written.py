"""The setting that was found as an engine's default, with the evidence for it, in its manifest."""

import datetime
from pathlib import Path

import fly_trt
from fly_trt.errors import ConfigError
from fly_trt.manifest import Tuning, read_manifest, write_tuning
from fly_trt.service.config import merged_settings
from fly_trt.tuning.result import DEFAULT, PLAIN, TuningResult


def write_setting(engine_dir: Path, result: TuningResult) -> bool:
    """Whether there was a setting to write: one that qualified and is surely faster than plain decoding. The engine's
    own default, where it stays, gets the evidence.

    Raises ConfigError where the directory's defaults are no longer those that were measured against, and EngineError
    for one that is no engine.
    """
    chosen = result.chosen
    qualifies = chosen.qualifies(result.settings.min_retention)
    if chosen.candidate.name == PLAIN or not chosen.is_faster_than_plain or not qualifies:
        return False
    manifest = read_manifest(engine_dir)
    if manifest.speculative != result.settings.extra["default"]:
        raise ConfigError(
            f"{engine_dir}: its defaults have changed since they were measured: run fly-tune again with another --state"
        )
    bound = chosen.retention
    over_plain, over_default = chosen.over_plain, chosen.over_default
    assert over_plain is not None  # it is faster
    is_default = chosen.candidate.name == DEFAULT or over_default is None
    evidence = Tuning(
        min_retention=result.settings.min_retention,
        confidence=result.settings.confidence,
        retention=1.0 if bound is None else bound.estimate,
        lower_bound=1.0 if bound is None else bound.lower,
        judged_by=result.settings.judged_by,
        num_prompts=chosen.num_prompts,
        prompts_sha256=result.settings.prompts_sha256,
        seed=result.settings.seed,
        speedup_over_plain=over_plain.estimate,
        speedup_over_default=1.0 if is_default or over_default is None else over_default.estimate,
        machine=result.machine["gpu"] or result.machine["cpu"],
        date=datetime.date.fromisoformat(result.date[:10]),
        version=fly_trt.__version__,
    )
    write_tuning(engine_dir, merged_settings(manifest, chosen.candidate.settings), evidence)
    return True
