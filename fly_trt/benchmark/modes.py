"""The modes that a benchmark compares, and the SpeculativeConfig of each for a given engine directory."""

from collections.abc import Mapping, Sequence
from typing import Any

from fly_trt.drafting import DRAFTERS
from fly_trt.errors import ConfigError
from fly_trt.manifest import Manifest
from fly_trt.params import SpeculativeConfig
from fly_trt.service.config import ServiceConfig, resolve_sizes, resolve_speculative_config
from fly_trt.verification import POLICIES

AUTOREGRESSIVE = "autoregressive"
EXACT = "exact"


def modes() -> dict[str, dict[str, Any]]:
    """The settings of each mode: plain decoding; every acceptance policy on multi-level drafts, by its name; FLy on
    drafts of the draft model alone; and every other drafter by its name, with the policy of its drafts by default."""
    fly_draft = {"fly-draft": {"method": "draft_model", "acceptance": "fly"}}
    policies = {name: {"method": "multi_level", "acceptance": name} for name in POLICIES}
    exact = {EXACT: policies.pop(EXACT)}
    drafters = {
        name: {"method": name, "acceptance": kind.acceptance}
        for name, kind in DRAFTERS.items()
        if name not in ("multi_level", "draft_model")
    }
    return {AUTOREGRESSIVE: {"method": None}} | exact | fly_draft | policies | drafters


def choose_modes(
    asked: Sequence[str], manifest: Manifest, overrides: Mapping[str, Any] | None = None
) -> dict[str, SpeculativeConfig]:
    """What each of the modes `asked` for means, in the order of `modes`; none means all that the engines can do.

    overrides: fields of SpeculativeConfig, each for the modes that it fits. Raises ConfigError for an unknown mode, for
    one that needs a draft model or draft tokens that were not built, and for a setting that fits no mode.
    """
    known = modes()
    if unknown := [mode for mode in asked if mode not in known]:
        raise ConfigError(f"mode {unknown[0]!r}: expected {', '.join(known)}")
    chosen = {
        mode: settings
        for mode, settings in known.items()
        if (mode in asked if asked else _is_possible(settings["method"], manifest))
    }
    overrides = overrides or {}
    for name, value in overrides.items():
        if not any(_fits(name, settings) for settings in chosen.values()):
            raise ConfigError(f"{name} {value!r}: has no effect in mode {', '.join(chosen)}: leave it out, or add fly")
    return {mode: _config(mode, settings, manifest, overrides) for mode, settings in chosen.items()}


def _is_possible(method: str | None, manifest: Manifest) -> bool:
    if method is None:
        return True
    return manifest.limits.max_draft_len > 0 and (manifest.draft is not None or not DRAFTERS[method].needs_draft_model)


def _fits(name: str, settings: Mapping[str, Any]) -> bool:
    if settings["method"] is None:
        return False
    return name == "num_speculative_tokens" or name in POLICIES[settings["acceptance"]].settings


def _config(
    mode: str, settings: Mapping[str, Any], manifest: Manifest, overrides: Mapping[str, Any]
) -> SpeculativeConfig:
    fitting = {name: value for name, value in overrides.items() if _fits(name, settings)}
    try:
        config = resolve_speculative_config(manifest, {**settings, **fitting})
        resolve_sizes(ServiceConfig(), config, manifest)
    except ConfigError as error:
        raise ConfigError(f"mode {mode}: {error}") from None
    return config
