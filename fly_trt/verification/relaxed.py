"""Relaxed acceptance: a draft token stands that is among the target's most probable ones and not much less probable
than its choice.

Source: TensorRT-LLM's relaxed acceptance (relaxed_topk, relaxed_delta), which it offers for the thinking phase of
reasoning models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from fly_trt.errors import ConfigError
from fly_trt.verification.policy import AcceptancePolicy, Evidence, HeadInfo, Verdict, decide_each, percent

DEFAULT_TOP_N, DEFAULT_DELTA = 3, 0.6


@dataclass(frozen=True, slots=True)
class RelaxedPolicy(AcceptancePolicy):
    """Draft token x stands iff it is the target's choice or one of its `top_n` most probable tokens with
    p(x) >= p_max - delta, in probabilities."""

    top_n: int = DEFAULT_TOP_N
    delta: float = DEFAULT_DELTA

    name: ClassVar[str] = "relaxed"
    settings: ClassVar[tuple[str, ...]] = ("relaxed_top_n", "relaxed_delta")
    needs_top: ClassVar[bool] = True

    @classmethod
    def make(cls, settings: Mapping[str, Any], head: HeadInfo) -> Self:
        top_n, delta = settings["relaxed_top_n"], settings["relaxed_delta"]
        if (top_n or 0) > head.entropy_top_k:
            raise ConfigError(
                f"relaxed_top_n {top_n}: the engine names the {head.entropy_top_k} most probable tokens: ask for "
                f"fewer, or rebuild with --entropy-top-k {top_n}"
            )
        top_n = min(DEFAULT_TOP_N, head.entropy_top_k) if top_n is None else top_n
        return cls(top_n=top_n, delta=DEFAULT_DELTA if delta is None else delta)

    def why(self, evidence: Evidence, position: int) -> str:
        said = evidence.target
        is_listed = bool((said.top_ids[position, : self.top_n] == evidence.draft[position]).any())
        shares = percent(float(said.draft_logprob[position])), percent(float(said.argmax_logprob[position]))
        place = f"one of the {self.top_n} most probable" if is_listed else f"not one of the {self.top_n} most probable"
        return f"{place}, {shares[0]} beside the best one’s {shares[1]}, {100 * self.delta:.0f} points allowed"

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        known, said = evidence.num_known, evidence.target
        is_listed = (said.top_ids[:known, : self.top_n] == evidence.draft[:known, None]).any(axis=1)
        lowest = np.exp(said.argmax_logprob[:known]) - np.float32(self.delta)
        is_likely = np.exp(said.draft_logprob[:known]) >= lowest
        return decide_each(evidence, evidence.matches | (is_listed & is_likely))
