"""Exact acceptance: a draft token stands where it is the target's choice. Lossless."""

from dataclasses import dataclass
from typing import ClassVar

from fly_trt.verification.policy import AcceptancePolicy, Evidence, Verdict, decide_each


@dataclass(frozen=True, slots=True)
class ExactPolicy(AcceptancePolicy):
    """Speculative decoding as in arXiv 2211.17192: with argmax choices the text is the target's greedy text, with
    sampled ones it has the target's law."""

    name: ClassVar[str] = "exact"
    is_decided_by_head: ClassVar[bool] = True

    @property
    def is_loose(self) -> bool:
        return False

    def why(self, evidence: Evidence, position: int) -> str:
        return "only the target’s own choice stands"

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        return decide_each(evidence, evidence.matches)


EXACT = ExactPolicy()
EXACT_WITH_ENTROPY = ExactPolicy(use_full_entropy=True)
