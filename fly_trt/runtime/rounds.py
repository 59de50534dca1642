"""One request's round: up to K draft tokens, what the target chose at each, and what is decided so far.

A round may be verified in one step or in several, as the load asks for; its verdict is the same, because the rule sees
the same draft, the same choices and the same length either way. So the cut changes speed and never tokens.
"""

from dataclasses import dataclass, field

import numpy as np

from fly_trt.engines.base import NO_TOKENS, AcceptancePolicy, FloatArray, IntArray
from fly_trt.verification import Verdict, accept, count_loosened

NO_GATES: FloatArray = np.empty(0, np.float32)


@dataclass(slots=True)
class Round:
    """A draft of `num_draft` tokens that follows the `start` tokens of the sequence.

    `draft` int64 [d] is the part of it that exists; `choices` int64 [v] and `gates` float32 [v] are the target's choice
    and entropy at the positions that were verified, `logits` float32 [v, V] where they are wanted; `num_committed`
    draft tokens are part of the sequence already.
    """

    start: int
    num_draft: int
    draft: IntArray = field(default_factory=lambda: NO_TOKENS)
    choices: IntArray = field(default_factory=lambda: NO_TOKENS)
    gates: FloatArray = field(default_factory=lambda: NO_GATES)
    logits: FloatArray = field(default_factory=lambda: NO_GATES)
    num_committed: int = 0

    @property
    def num_fed(self) -> int:
        """Draft tokens that the target has processed."""
        return max(0, len(self.choices) - 1)

    @property
    def num_missing(self) -> int:
        """Draft tokens that the target has not processed."""
        return self.num_draft - self.num_fed

    def set_draft(self, draft: IntArray, num_asked: int) -> None:
        """Takes the draft as far as it was made; less than asked for means that it ends there."""
        self.draft = draft
        if len(draft) < num_asked:
            self.num_draft = len(draft)

    def add(self, choices: IntArray, gates: FloatArray, logits: FloatArray | None) -> None:
        """What a step found at the next positions. The first arrays are kept as they are, so a round that goes on needs
        arrays of its own."""
        if not len(self.choices):
            self.choices, self.gates = choices, gates
            self.logits = NO_GATES if logits is None else logits
            return
        self.choices = np.concatenate([self.choices, choices])
        self.gates = np.concatenate([self.gates, gates])
        if logits is not None:
            self.logits = np.concatenate([self.logits, logits])

    def verdict(self, policy: AcceptancePolicy, stop_token_ids: frozenset[int]) -> Verdict:
        return accept(self.draft, self.choices, self.gates, policy, stop_token_ids, self.num_draft)

    def num_loosened(self, num_accepted: int) -> int:
        return count_loosened(self.draft, self.choices, num_accepted)
