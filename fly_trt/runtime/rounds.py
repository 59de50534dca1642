"""One request's round: up to K draft tokens, what the target chose at each, and what is decided so far.

A round may be verified in one step or in several, as the load asks for; its verdict is the same, because the rule sees
the same draft, the same choices and the same length either way. So the cut changes speed and never tokens.
"""

from dataclasses import dataclass, field

import numpy as np

from fly_trt.runtime.loosening import Evidence
from fly_trt.tokens import NO_TOKENS, FloatArray, IntArray
from fly_trt.verification import Verdict, accept, count_loosened, opens_window
from fly_trt.verification.policy import AcceptancePolicy

NO_GATES: FloatArray = np.empty(0, np.float32)


@dataclass(slots=True)
class Round:
    """A draft of `num_draft` tokens that follows the `start` tokens of the sequence, and the `policy` that decides it.
    Where it `is_evidence` its length is the rule's and not the load's.

    `draft` int64 [d] is the part of it that exists, all of it where the drafter `has_ended`; `choices` int64 [v] and
    `gates` float32 [v] are the target's choice and entropy at the positions that were verified, `logits` float32 [v, V]
    where they are wanted; `num_committed` draft tokens are part of the sequence already. `is_careful`: a step came to
    something that is not a number, so that one draft token at a time is fed and none spoils those before it.
    """

    start: int
    num_draft: int
    policy: AcceptancePolicy
    is_evidence: bool = False
    has_ended: bool = False
    draft: IntArray = field(default_factory=lambda: NO_TOKENS)
    choices: IntArray = field(default_factory=lambda: NO_TOKENS)
    gates: FloatArray = field(default_factory=lambda: NO_GATES)
    logits: FloatArray = field(default_factory=lambda: NO_GATES)
    num_committed: int = 0
    is_careful: bool = False

    @property
    def num_fed(self) -> int:
        """Draft tokens that the target has processed."""
        return max(0, len(self.choices) - 1)

    @property
    def end(self) -> int:
        """Draft tokens that there will be."""
        return len(self.draft) if self.has_ended else self.num_draft

    @property
    def num_missing(self) -> int:
        """Draft tokens that the target has not processed."""
        return self.end - self.num_fed

    @property
    def num_window(self) -> int:
        """Draft tokens to process until the open window is decided; 0 where none is open."""
        is_open = self.num_committed < min(len(self.draft), len(self.choices))
        return self.num_committed + self.policy.lookahead - self.num_fed if is_open else 0

    def set_draft(self, draft: IntArray, num_asked: int, *, is_whole: bool) -> None:
        """Takes the draft as far as it was made; less than asked for means that it ends there. A draft that was made as
        a whole, before any of it was needed, is then a shorter round; one that is made in parts may not be, for its
        first part was decided by the length that was asked for."""
        self.draft = draft
        self.has_ended = len(draft) < num_asked
        if self.has_ended and is_whole:
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

    def verdict(self, stop_token_ids: frozenset[int]) -> Verdict:
        return accept(
            self.draft,
            self.choices,
            self.gates,
            self.policy,
            stop_token_ids,
            self.num_draft,
            has_ended=self.has_ended,
        )

    def evidence(self, stop_token_ids: frozenset[int]) -> Evidence:
        """What the round shows once it is decided; the same however it was cut."""
        stood = self.num_loosened(self.num_committed)
        at, failed = self.num_committed, False
        if differs := at < self.end:
            failed = opens_window(at, self.num_draft, self.draft, self.choices, self.gates, self.policy, stop_token_ids)
        return Evidence(at - stood, stood + differs, stood, int(failed))

    def num_loosened(self, num_accepted: int) -> int:
        return count_loosened(self.draft, self.choices, num_accepted)
