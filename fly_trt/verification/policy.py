"""The named acceptance policies: which draft tokens that differ from the target's argmax may stand."""

import math
from dataclasses import dataclass, replace

from fly_trt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AcceptancePolicy:
    """Which draft tokens of a row stand, as four inputs of the engine, so that one target engine serves every policy.

    A mismatching draft token j of n is loosened iff the gate's entropy at j is >= `entropy_threshold` (nats), draft
    and target agree on the `lookahead` tokens after j, and j + max(window, lookahead) < n.

    The gate is the entropy of the `k` largest probabilities, not renormalised, or with `use_full_entropy` that of the
    whole vocabulary. A threshold of +inf means exact match.
    """

    entropy_threshold: float
    use_full_entropy: bool
    window: int
    lookahead: int

    @property
    def is_loose(self) -> bool:
        """Whether any draft token may stand that differs from the target's choice."""
        return math.isfinite(self.entropy_threshold)


EXACT = AcceptancePolicy(entropy_threshold=math.inf, use_full_entropy=False, window=0, lookahead=0)


PRESETS: dict[str, AcceptancePolicy] = {
    # The authors' program, which produced the published speedups: the window counts the mismatch itself.
    "reference": AcceptancePolicy(entropy_threshold=0.3, use_full_entropy=False, window=6, lookahead=5),
    # The text of arXiv 2511.22972: the threshold is a fraction of the largest possible entropy, ln(vocabulary).
    "paper": AcceptancePolicy(entropy_threshold=0.3, use_full_entropy=True, window=6, lookahead=6),
    # vLLM's rejection_sample_method="fly".
    "vllm": AcceptancePolicy(entropy_threshold=0.3, use_full_entropy=False, window=6, lookahead=6),
}


def fly_policy(
    preset: str, vocab_size: int, *, entropy_threshold: float | None = None, window: int | None = None
) -> AcceptancePolicy:
    """The preset with its threshold or window replaced; the unit of the threshold and the relation of lookahead to
    window stay the preset's: under `paper` a threshold is a fraction of ln(vocab_size)."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    policy = PRESETS[preset]
    if window is not None:
        policy = replace(policy, window=window, lookahead=max(0, window - policy.window + policy.lookahead))
    threshold = policy.entropy_threshold if entropy_threshold is None else entropy_threshold
    unit = math.log(vocab_size) if policy.use_full_entropy else 1.0
    return replace(policy, entropy_threshold=threshold * unit)
