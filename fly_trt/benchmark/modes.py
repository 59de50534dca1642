"""The modes that a benchmark compares, and the SpeculativeConfig of each for a given engine directory."""

from collections.abc import Mapping, Sequence
from typing import Any

from fly_trt.errors import ConfigError
from fly_trt.manifest import Manifest
from fly_trt.params import SpeculativeConfig
from fly_trt.service.config import ServiceConfig, resolve_sizes, resolve_speculative_config

AUTOREGRESSIVE = "autoregressive"
EXACT = "exact"
MODES: Mapping[str, Mapping[str, Any]] = {
    AUTOREGRESSIVE: {"method": None},
    EXACT: {"method": "multi_level", "acceptance": "exact"},
    "fly-draft": {"method": "draft_model", "acceptance": "fly"},
    "fly": {"method": "multi_level", "acceptance": "fly"},
    "ngram": {"method": "ngram", "acceptance": "exact"},
}
"""exact: multi-level drafts, verified exactly. fly-draft and fly: FLy, on drafts of the draft model alone and on
multi-level ones. ngram: drafts from the prompt and the output alone, verified exactly."""


def choose_modes(
    asked: Sequence[str], manifest: Manifest, overrides: Mapping[str, Any] | None = None
) -> dict[str, SpeculativeConfig]:
    """What each of the modes `asked` for means, in MODES' order; none means all that the engine directory can do.

    overrides: fields of SpeculativeConfig, each for the modes that it fits. Raises ConfigError for an unknown mode, for
    one that needs a draft model or draft tokens that were not built, and for a setting that fits no mode.
    """
    if unknown := [mode for mode in asked if mode not in MODES]:
        raise ConfigError(f"mode {unknown[0]!r}: expected {', '.join(MODES)}")
    chosen = [mode for mode in MODES if (mode in asked if asked else _is_possible(mode, manifest))]
    overrides = overrides or {}
    for name, value in overrides.items():
        if not any(_fits(name, mode) for mode in chosen):
            raise ConfigError(f"{name} {value!r}: has no effect in mode {', '.join(chosen)}: leave it out, or add fly")
    return {mode: _config(mode, manifest, overrides) for mode in chosen}


def _is_possible(mode: str, manifest: Manifest) -> bool:
    method = MODES[mode]["method"]
    return method is None or (manifest.limits.max_draft_len > 0 and (method == "ngram" or manifest.draft is not None))


def _fits(name: str, mode: str) -> bool:
    settings = MODES[mode]
    return settings["method"] is not None and (name == "num_speculative_tokens" or settings["acceptance"] == "fly")


def _config(mode: str, manifest: Manifest, overrides: Mapping[str, Any]) -> SpeculativeConfig:
    fitting = {name: value for name, value in overrides.items() if _fits(name, mode)}
    try:
        config = resolve_speculative_config(manifest, {**MODES[mode], **fitting})
        resolve_sizes(ServiceConfig(), config, manifest)
    except ConfigError as error:
        raise ConfigError(f"mode {mode}: {error}") from None
    return config
