"""Typical acceptance: a draft token stands that the target finds probable enough for how uncertain it is.

Source: Medusa (arXiv 2401.10774, section 2.3.1); the defaults are those of vLLM's typical acceptance sampler
(posterior_threshold, posterior_alpha).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from fly_trt.tokens import FloatArray
from fly_trt.verification.policy import AcceptancePolicy, Evidence, HeadInfo, Verdict, decide_each, percent

DEFAULT_THRESHOLD, DEFAULT_ALPHA = 0.09, 0.3


@dataclass(frozen=True, slots=True)
class TypicalPolicy(AcceptancePolicy):
    """Draft token x stands iff it is the target's choice or p(x) >= min(threshold, alpha exp(-H)), with H the entropy
    of the whole vocabulary in nats."""

    threshold: float = DEFAULT_THRESHOLD
    alpha: float = DEFAULT_ALPHA

    name: ClassVar[str] = "typical"
    settings: ClassVar[tuple[str, ...]] = ("typical_threshold", "typical_alpha")

    @classmethod
    def make(cls, settings: Mapping[str, Any], head: HeadInfo) -> Self:
        threshold, alpha = settings["typical_threshold"], settings["typical_alpha"]
        return cls(
            use_full_entropy=True,
            threshold=DEFAULT_THRESHOLD if threshold is None else threshold,
            alpha=DEFAULT_ALPHA if alpha is None else alpha,
        )

    def why(self, evidence: Evidence, position: int) -> str:
        said, lowest = evidence.target, self._lowest(evidence.target.entropy[position : position + 1])
        likely, wanted = percent(float(said.draft_logprob[position])), percent(float(np.log(lowest[0])))
        return f"{likely} probable, {wanted} wanted at {said.entropy[position]:.2f} nats"

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        known, said = evidence.num_known, evidence.target
        is_likely = np.exp(said.draft_logprob[:known]) >= self._lowest(said.entropy[:known])
        return decide_each(evidence, evidence.matches | is_likely)

    def _lowest(self, entropy: FloatArray) -> FloatArray:
        """The probability that a token must have, by entropy float32 [m]."""
        lowest: FloatArray = np.minimum(np.float32(self.threshold), np.float32(self.alpha) * np.exp(-entropy))
        return lowest
