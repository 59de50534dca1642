"""Conditional verification of Alignment-Augmented Speculative Decoding (AASD, arXiv 2505.13204): a probability
threshold that falls with the target's uncertainty, for drafts that are copied from the context.

The paper's own formula could not be read. This one and its constants are from a third party's code that names the paper
as their source (lihuahua123/vllm_speculative, rejection_sampler.py), which has had two values for beta: 0.4, used here,
and 0.1, with which anything stands from 1 nat on. The floor is ours: at H >= beta / alpha the formula accepts tokens of
probability 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from fly_trt.tokens import FloatArray
from fly_trt.verification.policy import AcceptancePolicy, DraftSource, Evidence, HeadInfo, Verdict, decide_each, percent

DEFAULT_ALPHA, DEFAULT_BETA, DEFAULT_FLOOR = 0.1, 0.4, 0.01
APPLY_TO = ("ngram", "all")


@dataclass(frozen=True, slots=True)
class ConditionalPolicy(AcceptancePolicy):
    """Draft token x stands iff it is the target's choice or p(x) >= max(floor, min(beta - alpha H, p_max)), with H the
    entropy of the whole vocabulary in nats. apply_to: "ngram", copied draft tokens alone, as the paper argues for;
    "all", a draft model's as well."""

    alpha: float = DEFAULT_ALPHA
    beta: float = DEFAULT_BETA
    floor: float = DEFAULT_FLOOR
    apply_to: str = APPLY_TO[0]

    name: ClassVar[str] = "conditional"
    settings: ClassVar[tuple[str, ...]] = (
        "conditional_alpha",
        "conditional_beta",
        "conditional_floor",
        "conditional_apply_to",
    )
    loosens_copies: ClassVar[bool] = True

    @classmethod
    def make(cls, settings: Mapping[str, Any], head: HeadInfo) -> Self:
        given = {name: settings[f"conditional_{name}"] for name in ("alpha", "beta", "floor", "apply_to")}
        return cls(use_full_entropy=True, **{name: value for name, value in given.items() if value is not None})

    @property
    def loosens(self) -> frozenset[DraftSource]:
        copies = (DraftSource.LOOKUP,)
        return frozenset(copies if self.apply_to == "ngram" else (*copies, DraftSource.MODEL))

    def why(self, evidence: Evidence, position: int) -> str:
        said = evidence.target
        if self.apply_to == "ngram" and evidence.sources[position] != DraftSource.LOOKUP:
            return "not a copy, and only copies are loosened"
        likely = percent(float(said.draft_logprob[position]))
        wanted = percent(float(np.log(self._lowest(evidence, position + 1)[position])))
        return f"{likely} probable, {wanted} wanted at {said.entropy[position]:.2f} nats"

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        known, said = evidence.num_known, evidence.target
        is_likely = np.exp(said.draft_logprob[:known]) >= self._lowest(evidence, known)
        if self.apply_to == "ngram":
            is_likely &= evidence.sources[:known] == DraftSource.LOOKUP
        return decide_each(evidence, evidence.matches | is_likely)

    def _lowest(self, evidence: Evidence, count: int) -> FloatArray:
        """float32 [count]: the probabilities that the first draft tokens must have."""
        said = evidence.target
        wanted = np.float32(self.beta) - np.float32(self.alpha) * said.entropy[:count]
        lowest: FloatArray = np.maximum(np.minimum(wanted, np.exp(said.argmax_logprob[:count])), np.float32(self.floor))
        return lowest
