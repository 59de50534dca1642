"""Which of TensorRT-LLM's speculative modes take FLy in its PyTorch backend, by release, and why the others do not.

One-model modes decide on the GPU in `SpecWorkerBase`, where the rule is put; all others decide on the host, where no
logits are left. This module reads the `speculative_config` that the LLM API and its YAML have, as plain values; it
knows neither torch nor TensorRT-LLM.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fly_trt.errors import ConfigError

Release = Literal["1.2", "main"]
# main is 1.3 for as long as that is not released.
RELEASES: dict[str, Release] = {"1.2": "1.2", "1.3": "main"}

_ON_HOST = "accepts on the host, where the target's logits are gone"
_TWO_MODELS = f"two models: {_ON_HOST}"


@dataclass(frozen=True, slots=True)
class Mode:
    """A `decoding_type` of `speculative_config`.

    config: its class in tensorrt_llm.llmapi. releases: where it takes FLy. exact_because: why it does not in the
    others. mode: the member of SpeculativeDecodingMode that takes it. exact_with: settings, with the value that they
    must not have, under which it does not either, and why.
    """

    decoding_type: str
    config: str
    releases: tuple[Release, ...] = ()
    mode: str = ""
    exact_because: str = ""
    exact_with: tuple[tuple[str, bool, str], ...] = ()


_TREES = (
    ("use_dynamic_tree", True, "draft trees are accepted by another kernel"),
    ("dynamic_tree_max_topK", True, "draft trees are accepted by another kernel"),
    ("eagle_choices", True, "draft trees are accepted by another kernel"),
)
_REJECTION = ("use_rejection_sampling", True, "its test of drawn tokens takes the place of the comparison")
_EAGLE = (("eagle3_one_model", False, _TWO_MODELS), *_TREES, _REJECTION)

MODES: dict[str, Mode] = {
    mode.decoding_type: mode
    for mode in (
        Mode(
            "Draft_Target",
            "DraftTargetDecodingConfig",
            ("main",),
            "DRAFT_TARGET_ONE_MODEL",
            f"{_TWO_MODELS} (1.3 has one)",
            (_REJECTION,),
        ),
        Mode("Eagle3", "Eagle3DecodingConfig", ("1.2", "main"), "EAGLE3_ONE_MODEL", exact_with=_EAGLE),
        Mode("Eagle", "EagleDecodingConfig", ("1.2", "main"), "EAGLE3_ONE_MODEL", exact_with=_EAGLE),
        Mode(
            "MTP",
            "MTPDecodingConfig",
            ("1.2", "main"),
            "MTP",  # or MTP_EAGLE_ONE_MODEL: the checkpoint says
            exact_with=(
                ("mtp_eagle_one_model", False, _TWO_MODELS),
                ("use_relaxed_acceptance_for_thinking", True, "relaxed acceptance takes its place"),
                ("use_dynamic_tree", True, _TREES[0][2]),
                _REJECTION,
            ),
        ),
        Mode("PARD", "PARDDecodingConfig", ("main",), "PARD", "this release does not have it", (_REJECTION,)),
        Mode("DFlash", "DFlashDecodingConfig", ("main",), "DFLASH", "this release does not have it", (_REJECTION,)),
        Mode("SA", "SADecodingConfig", ("main",), "SA", "this release does not have it"),
        Mode("NGram", "NGramDecodingConfig", exact_because=f"n-gram drafts: {_ON_HOST}"),
        Mode("AUTO", "AutoDecodingConfig", exact_because=f"chooses n-gram drafts: {_ON_HOST}"),
        Mode("User_Provided", "UserProvidedDecodingConfig", exact_because=f"a drafter of one's own: {_ON_HOST}"),
        Mode("SaveState", "SaveHiddenStatesDecodingConfig", exact_because="drafts nothing"),
        Mode("Medusa", "MedusaDecodingConfig", exact_because="the PyTorch backend does not have it"),
        Mode("Lookahead", "LookaheadDecodingConfig", exact_because="the PyTorch backend does not have it"),
    )
}


def release_of(version: str) -> Release:
    """The release that `tensorrt_llm.__version__` belongs to. Raises ConfigError for one that is not known here."""
    found = re.match(r"(\d+\.\d+)(?!\d)", version)
    if found is None or found[1] not in RELEASES:
        raise ConfigError(
            f"tensorrt_llm {version}: expected {' or '.join(f'{known}.x' for known in RELEASES)}: install one of them, "
            "or a fly-trt that knows this one"
        )
    return RELEASES[found[1]]


def modes_of(release: Release) -> tuple[str, ...]:
    """The decoding types that take FLy there."""
    return tuple(mode.decoding_type for mode in MODES.values() if release in mode.releases)


def check_mode(speculative_config: Mapping[str, Any], release: Release) -> Mode:
    """The mode of a `speculative_config`, as the YAML has it: `decoding_type` and settings. Raises ConfigError, with
    the reason, where FLy would not decide there: the server would be exact without a word."""
    name = str(speculative_config.get("decoding_type"))
    expected = f"expected one of {', '.join(modes_of(release))}"
    if name not in MODES:
        raise ConfigError(f"speculative_config: decoding_type {name!r}: {expected}")
    mode = MODES[name]
    if release not in mode.releases:
        raise ConfigError(
            f"speculative_config: decoding_type {name} of TensorRT-LLM {release} does not take FLy: "
            f"{mode.exact_because}: {expected}"
        )
    for setting, refused, reason in mode.exact_with:
        value = speculative_config.get(setting)
        if value is not None and bool(value) is refused:
            raise ConfigError(
                f"speculative_config: {name} with {setting} {value!r} does not take FLy: {reason}: leave it out"
            )
    return mode
