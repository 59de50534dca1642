"""The variable that says which rule TensorRT-LLM's processes accept by."""

import math

import pytest

from fly_trt.errors import ConfigError
from fly_trt.integrations.tensorrt_llm.environment import (
    FORWARDED,
    NO_ACCEPTANCE,
    STOP_TOKENS_VARIABLE,
    VARIABLE,
    Acceptance,
)
from fly_trt.verification.fly import PRESETS


@pytest.mark.parametrize(
    "acceptance",
    [
        Acceptance(),
        Acceptance("paper"),
        Acceptance("vllm", threshold=0.1),
        Acceptance("reference", window=9),
        Acceptance("reference", 1.0 / 3.0, 0, (2, 128009)),
        Acceptance(threshold=math.inf),
    ],
)
def test_what_is_written_is_read(acceptance: Acceptance) -> None:
    assert Acceptance.from_environment(acceptance.to_environment()) == acceptance


def test_what_is_said_for_workers_replaces_what_they_inherit() -> None:
    inherited = {VARIABLE: "vllm,0.5", STOP_TOKENS_VARIABLE: "7"}
    forwarded = {name: Acceptance("paper").to_environment()[name] for name in FORWARDED.values()}
    assert all(name.startswith("TRTLLM") for name in forwarded)
    assert Acceptance.from_environment(inherited | forwarded) == Acceptance("paper")
    assert Acceptance.from_environment(inherited | {name: NO_ACCEPTANCE[name] for name in FORWARDED.values()}) is None


def test_unset_and_empty_are_none() -> None:
    assert Acceptance.from_environment({}) is None
    assert Acceptance.from_environment({VARIABLE: "  "}) is None


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_alone_is_that_preset(preset: str) -> None:
    acceptance = Acceptance.from_environment({VARIABLE: f" {preset} "})
    assert acceptance is not None
    unit = math.log(1000) if PRESETS[preset].use_full_entropy else 1.0
    assert acceptance.policy(1000).entropy_threshold == PRESETS[preset].entropy_threshold * unit
    assert acceptance.policy(1000).window == PRESETS[preset].window


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("strict", "preset 'strict': expected one of reference"),
        ("reference,much", "expected FLY_TRT_TRTLLM=preset"),
        ("reference,0.3,6.5", "expected FLY_TRT_TRTLLM=preset"),
        ("reference,0.3,6,1", "expected FLY_TRT_TRTLLM=preset"),
        ("reference,-1", "threshold -1.0: expected a number"),
        ("reference,nan", "threshold nan: expected a number"),
        ("reference,,-2", "window -2: expected tokens"),
    ],
)
def test_what_it_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Acceptance.from_environment({VARIABLE: text})


@pytest.mark.parametrize("text", ["2,end", "-1"])
def test_stop_tokens_are_token_ids(text: str) -> None:
    with pytest.raises(ConfigError, match="expected token ids"):
        Acceptance.from_environment({VARIABLE: "reference", STOP_TOKENS_VARIABLE: text})
