"""When a draft model stops before a round's draft is full: where it is no longer sure, its next tokens are rejected.

A rule looks at each token that the draft model chose, at the entropy of its vocabulary and at the token's probability;
the token that it stops at is still part of the draft. This changes no token under exact acceptance. Under a loose rule
a round's length does matter, and so an object belongs to one sequence and learns from that sequence's own rounds: its
drafts end at the same tokens whatever is served beside it and however its rounds are cut.

DRAFT_STOPS is the table of the rules by the name that `draft_stop` has.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar


class DraftStop(ABC):
    """The rule of one sequence. threshold: None is the rule's own; at most `most`. needs_entropy: it reads the entropy,
    which otherwise may be NaN. search: thresholds that fly-tune tries beside the rule's own."""

    name: ClassVar[str]
    most: ClassVar[float | None] = None
    search: ClassVar[tuple[float, ...]] = ()
    needs_entropy: ClassVar[bool] = True

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold

    @abstractmethod
    def ends(self, entropy: float, logprob: float) -> bool:
        """Whether the draft ends with a token, where the draft model's whole vocabulary had this entropy and the token
        this log-probability, both in nats."""

    def observe(self, entropy: float) -> None:  # noqa: B027 - few rules learn
        """The target rejected a draft token, where the draft model had this entropy."""


class AdaSDStop(DraftStop):
    """Stops where the entropy exceeds the mean entropy at the sequence's rejected draft tokens; before the first of
    them never. A threshold that is given does not learn.

    Source: AdaSD (arXiv 2512.11280), generation threshold T_G; published with rounds of at most 20 tokens.
    """

    name = "adasd"

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__(threshold)
        self._total, self._count = 0.0, 0

    def ends(self, entropy: float, logprob: float) -> bool:
        if self.threshold is not None:
            return entropy > self.threshold
        return self._count > 0 and entropy > self._total / self._count

    def observe(self, entropy: float) -> None:
        if not math.isnan(entropy):
            self._total += entropy
            self._count += 1


class ConfidenceStop(DraftStop):
    """Stops where the draft model gives its token less than the threshold, 0.7.

    Source: KnapSpec (arXiv 2602.20217), and long before it the assistant_confidence_threshold of transformers.
    """

    name = "confidence"
    most = 1.0
    search = (0.4, 0.9)
    needs_entropy = False

    def __init__(self, threshold: float | None = None) -> None:
        threshold = 0.7 if threshold is None else threshold
        super().__init__(threshold)
        self._least = math.log(threshold) if threshold else -math.inf

    def ends(self, entropy: float, logprob: float) -> bool:
        return logprob < self._least


class AdaEDLStop(DraftStop):
    """Stops where a lower bound of the chance that the target accepts, 1 - sqrt(gamma H) with gamma 0.5, falls below
    the threshold, 0.2.

    Source: AdaEDL (arXiv 2410.18351), with a fixed threshold; formula and gamma from a re-implementation of it.
    """

    name = "adaedl"
    most = 1.0
    search = (0.1, 0.4)
    GAMMA = 0.5

    def __init__(self, threshold: float | None = None) -> None:
        self._least = 0.2 if threshold is None else threshold
        super().__init__(self._least)

    def ends(self, entropy: float, logprob: float) -> bool:
        return 1 - math.sqrt(self.GAMMA * max(0.0, entropy)) < self._least


NO_STOP = "none"
DRAFT_STOPS: dict[str, type[DraftStop] | None] = {
    NO_STOP: None,
    **{stop.name: stop for stop in (AdaSDStop, ConfidenceStop, AdaEDLStop)},
}
