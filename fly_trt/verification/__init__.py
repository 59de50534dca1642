"""Verification: the target's choices, and the acceptance policies that decide which draft tokens stand.

POLICIES is the table of the rules by the name that `acceptance` has.
"""

from fly_trt.verification.adaptive import AdaptivePolicy
from fly_trt.verification.cactus import CactusPolicy
from fly_trt.verification.conditional import APPLY_TO, ConditionalPolicy
from fly_trt.verification.exact import EXACT, EXACT_WITH_ENTROPY, ExactPolicy
from fly_trt.verification.fly import DEFAULT_PRESET, PRESETS, FlyPolicy, accept, fly_policy
from fly_trt.verification.guards import Guards, GuardSettings, Limits, check_regions, make_guards
from fly_trt.verification.margin import MarginPolicy
from fly_trt.verification.policy import (
    NO_DRAFT_SCORES,
    NO_SCORES,
    NOTHING,
    AcceptancePolicy,
    DraftScores,
    DraftSource,
    Evidence,
    HeadInfo,
    Positions,
    Verdict,
    decide_each,
)
from fly_trt.verification.reasons import Decision, explain, num_agreeing
from fly_trt.verification.relaxed import RelaxedPolicy
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
from fly_trt.verification.typical import TypicalPolicy

POLICIES: dict[str, type[AcceptancePolicy]] = {
    policy.name: policy
    for policy in (
        FlyPolicy,
        ExactPolicy,
        RelaxedPolicy,
        MarginPolicy,
        TypicalPolicy,
        ConditionalPolicy,
        AdaptivePolicy,
        CactusPolicy,
    )
}

__all__ = [
    "APPLY_TO",
    "DEFAULT_PRESET",
    "EXACT",
    "EXACT_WITH_ENTROPY",
    "MIN_TEMPERATURE",
    "NOTHING",
    "NO_DRAFT_SCORES",
    "NO_SCORES",
    "POLICIES",
    "PRESETS",
    "AcceptancePolicy",
    "AdaptivePolicy",
    "CactusPolicy",
    "ConditionalPolicy",
    "Decision",
    "DraftScores",
    "DraftSource",
    "Evidence",
    "ExactPolicy",
    "FlyPolicy",
    "GuardSettings",
    "Guards",
    "HeadInfo",
    "Limits",
    "LogitsProcessor",
    "MarginPolicy",
    "Positions",
    "RelaxedPolicy",
    "TopLogprobs",
    "TypicalPolicy",
    "UniformStream",
    "Verdict",
    "accept",
    "check_regions",
    "decide_each",
    "distribution",
    "explain",
    "fly_policy",
    "gate_entropy",
    "greedy",
    "make_guards",
    "num_agreeing",
    "sample",
    "top_logprobs",
    "top_tokens",
]
