"""Acceptance by margin: a draft token stands that is the target's second choice where the first is hardly ahead.

Source: the idea of MARS (arXiv 2601.15498, abstract): accept the runner-up where the target's top-2 margin is small.
The paper's measure of the margin is not known here; this one is the difference of the two log-probabilities.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from fly_trt.errors import ConfigError
from fly_trt.verification.policy import AcceptancePolicy, Evidence, HeadInfo, Verdict, decide_each

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class MarginPolicy(AcceptancePolicy):
    """Draft token x stands iff it is the target's choice, or its second most probable token with a log-probability at
    most `threshold` nats below that of the first."""

    threshold: float = DEFAULT_THRESHOLD

    name: ClassVar[str] = "margin"
    settings: ClassVar[tuple[str, ...]] = ("margin_threshold",)
    needs_top: ClassVar[bool] = True

    @classmethod
    def make(cls, settings: Mapping[str, Any], head: HeadInfo) -> Self:
        if head.entropy_top_k < 2:
            raise ConfigError(
                "acceptance 'margin': the engine names one most probable token, the rule needs two: rebuild with "
                "--entropy-top-k 3"
            )
        threshold = settings["margin_threshold"]
        return cls(threshold=DEFAULT_THRESHOLD if threshold is None else threshold)

    def why(self, evidence: Evidence, position: int) -> str:
        said = evidence.target
        if said.top_ids[position, 1] != evidence.draft[position]:
            return "not the target’s second choice"
        behind = float(said.top_logprobs[position, 0] - said.top_logprobs[position, 1])
        return f"the target’s second choice, {behind:.2f} nats behind the first, {self.threshold:.2f} allowed"

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        known, said = evidence.num_known, evidence.target
        is_second = said.top_ids[:known, 1] == evidence.draft[:known]
        first, second = said.top_logprobs[:known, 0], said.top_logprobs[:known, 1]
        with np.errstate(invalid="ignore"):  # a runner-up of probability 0
            is_close = first - second <= np.float32(self.threshold)
        return decide_each(evidence, evidence.matches | (is_second & is_close))
