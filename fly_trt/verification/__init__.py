"""Verification: the target's choices, and the acceptance policies that decide which draft tokens stand.

POLICIES is the table of the rules by the name that `acceptance` has.
"""

from fly_trt.verification.exact import EXACT, ExactPolicy
from fly_trt.verification.fly import DEFAULT_PRESET, PRESETS, FlyPolicy, accept, fly_policy
from fly_trt.verification.policy import (
    NO_SCORES,
    NOTHING,
    AcceptancePolicy,
    DraftSource,
    Evidence,
    Positions,
    Verdict,
    decide_each,
)
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
    top_tokens,
)

POLICIES: dict[str, type[AcceptancePolicy]] = {policy.name: policy for policy in (FlyPolicy, ExactPolicy)}

__all__ = [
    "DEFAULT_PRESET",
    "EXACT",
    "MIN_TEMPERATURE",
    "NOTHING",
    "NO_SCORES",
    "POLICIES",
    "PRESETS",
    "AcceptancePolicy",
    "DraftSource",
    "Evidence",
    "ExactPolicy",
    "FlyPolicy",
    "LogitsProcessor",
    "Positions",
    "TopLogprobs",
    "UniformStream",
    "Verdict",
    "accept",
    "decide_each",
    "distribution",
    "fly_policy",
    "gate_entropy",
    "greedy",
    "sample",
    "top_logprobs",
    "top_tokens",
]
