"""Verification: the target's choices, the acceptance policies and the rule that decides which draft tokens stand."""

from fly_trt.verification.policy import PRESETS, fly_policy
from fly_trt.verification.rule import Verdict, accept, count_loosened, opens_window
from fly_trt.verification.sampling import (
    MIN_TEMPERATURE,
    LogitsProcessor,
    TopLogprobs,
    UniformStream,
    distribution,
    gate_entropy,
    greedy,
    sample,
    top_logprobs,
)

__all__ = [
    "MIN_TEMPERATURE",
    "PRESETS",
    "LogitsProcessor",
    "TopLogprobs",
    "UniformStream",
    "Verdict",
    "accept",
    "count_loosened",
    "distribution",
    "fly_policy",
    "gate_entropy",
    "greedy",
    "opens_window",
    "sample",
    "top_logprobs",
]
