"""Two parts that the product does not have, as far as its seams carry them: a drafter that drafts while the target
verifies, and a rule that has the target read the draft twice. What is missing for each is on the architecture page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fly_trt.drafting import Draft, DraftRow, ModelDrafter
from fly_trt.tokens import FloatArray, IntArray
from fly_trt.verification import AcceptancePolicy, Evidence, Verdict, decide_each


class AheadDrafter(ModelDrafter):
    """CARD's chain form (arXiv 2508.04462): behind its draft it goes on with a guess of the target's own token and the
    draft after that, so that a round in which everything stood and the guess was right needs no drafting. Here it does
    so before it returns; on a device of its own it would while the target verifies."""

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        further = super().propose([row._replace(num_tokens=2 * row.num_tokens + 1) for row in rows])
        return [
            draft._replace(tokens=draft.tokens[: row.num_tokens], sources=draft.sources[: row.num_tokens])
            for row, draft in zip(rows, further, strict=True)
        ]


SecondReading = Callable[[IntArray], FloatArray]
"""From draft tokens int64 [n] to their log-probabilities float32 [n] where the target reads them again, behind a prompt
that asks it to reflect: a stand-in for a row [context][draft][prompt][end of the context][draft]."""


@dataclass(frozen=True, slots=True)
class ReflectivePolicy(AcceptancePolicy):
    """Reflective verification (arXiv 2505.18629), on what a head says without the logits: a draft token stands where it
    certainly is the argmax of both readings' scores, mixed with the weight alpha of the second one. Every rival has at
    most what the token leaves of the second reading, and of the first what the most probable token has."""

    second_reading: SecondReading = lambda draft: np.full(len(draft), -np.inf, np.float32)
    alpha: float = 0.5

    name: ClassVar[str] = "reflective"

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        known, said = evidence.num_known, evidence.target
        again = self.second_reading(evidence.draft[:known])
        with np.errstate(divide="ignore", invalid="ignore"):
            rivals = (1 - self.alpha) * said.argmax_logprob[:known] + self.alpha * np.log1p(-np.exp(again))
            own = (1 - self.alpha) * said.draft_logprob[:known] + self.alpha * again
        return decide_each(evidence, evidence.matches | (own >= rivals))
