"""An acceptance rule that the product does not have, as its author would write it: one module."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fly_trt.verification import AcceptancePolicy, Evidence, Verdict, decide_each

RATIO = 0.25


@dataclass(frozen=True, slots=True)
class LikelyPolicy(AcceptancePolicy):
    """A draft token stands that the target finds at least a quarter as probable as its own choice."""

    name: ClassVar[str] = "likely"

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        known, stops = evidence.num_known, list(stop_token_ids)
        draft, said = evidence.draft[:known], evidence.target
        is_likely = said.draft_logprob[:known] >= said.argmax_logprob[:known] + math.log(RATIO)
        is_stop = np.isin(draft, stops) | np.isin(said.choices[:known], stops)
        return decide_each(evidence, evidence.matches | (is_likely & ~is_stop))
