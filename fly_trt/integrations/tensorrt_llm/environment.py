"""`FLY_TRT_TRTLLM`: which rule TensorRT-LLM's processes accept draft tokens by.

The environment is the only thing that reaches all of its worker processes, however they are started. Those that it
spawns itself, through MPI, surely get the variables whose names begin with TRTLLM or TLLM; others reach them as they
were when MPI was initialised, which may be long ago. So what is said for them (`to_environment`, `NO_ACCEPTANCE`) is
said under a second name too, and that one is believed first. This module reads and writes the variables; it knows
neither torch nor TensorRT-LLM.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from fly_trt.errors import ConfigError
from fly_trt.verification.fly import DEFAULT_PRESET, PRESETS, FlyPolicy, fly_policy

VARIABLE = "FLY_TRT_TRTLLM"
STOP_TOKENS_VARIABLE = "FLY_TRT_TRTLLM_STOP_TOKENS"
FORWARDED = {VARIABLE: "TRTLLM_FLY_TRT", STOP_TOKENS_VARIABLE: "TRTLLM_FLY_TRT_STOP_TOKENS"}
"""The second names."""
FORM = f"{VARIABLE}=preset[,threshold[,window]], such as {VARIABLE}={DEFAULT_PRESET},0.3,6"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """FLy's rule for a whole server: a preset, and what replaces its threshold (in the preset's unit) and window.
    stop_token_ids are never loosened."""

    preset: str = DEFAULT_PRESET
    threshold: float | None = None
    window: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"{VARIABLE}: preset {self.preset!r}: expected one of {', '.join(PRESETS)}")
        if self.threshold is not None and not self.threshold >= 0:
            raise ConfigError(f"{VARIABLE}: threshold {self.threshold}: expected a number, at least 0")
        if self.window is not None and self.window < 0:
            raise ConfigError(f"{VARIABLE}: window {self.window}: expected tokens, at least 0")
        if wrong := [token for token in self.stop_token_ids if token < 0]:
            raise ConfigError(f"{STOP_TOKENS_VARIABLE}: {wrong[0]}: expected token ids, at least 0")

    def policy(self, vocab_size: int) -> FlyPolicy:
        """The rule's four numbers for a vocabulary of that size."""
        return fly_policy(self.preset, vocab_size, entropy_threshold=self.threshold, window=self.window)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """None where the variable is not set or empty. Raises ConfigError for what it cannot be."""
        if not (text := _read(environment, VARIABLE).strip()):
            return None
        preset, *numbers = (part.strip() for part in text.split(","))
        if len(numbers) > 2:
            raise ConfigError(f"{VARIABLE}={text!r}: expected {FORM}")
        try:
            threshold = float(numbers[0]) if numbers and numbers[0] else None
            window = int(numbers[1]) if len(numbers) > 1 and numbers[1] else None
        except ValueError:
            raise ConfigError(f"{VARIABLE}={text!r}: expected {FORM}") from None
        listed = _read(environment, STOP_TOKENS_VARIABLE)
        try:
            stops = tuple(int(token) for token in listed.split(",") if token.strip())
        except ValueError:
            raise ConfigError(f"{STOP_TOKENS_VARIABLE}={listed!r}: expected token ids such as 2,128009") from None
        return cls(preset, threshold, window, stops)

    def to_environment(self) -> dict[str, str]:
        """The variables that say this; `from_environment` reads them back."""
        numbers = ["" if number is None else repr(number) for number in (self.threshold, self.window)]
        text = ",".join([self.preset, *numbers]).rstrip(",")
        return _variables(text, ",".join(map(str, self.stop_token_ids)))


def _read(environment: Mapping[str, str], name: str) -> str:
    return environment.get(FORWARDED[name], environment.get(name, ""))


def _variables(acceptance: str, stop_token_ids: str) -> dict[str, str]:
    values = {VARIABLE: acceptance, STOP_TOKENS_VARIABLE: stop_token_ids}
    return values | {FORWARDED[name]: value for name, value in values.items()}


NO_ACCEPTANCE = _variables("", "")
"""The variables of processes that accept as TensorRT-LLM does, also where they would inherit others."""
