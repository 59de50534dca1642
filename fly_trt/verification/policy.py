"""What an acceptance policy is: an object that says, from arrays alone, which draft tokens of a round stand.

It knows the draft, what the target chose and how sure it was; it knows nothing of engines, requests or text. Each rule
is a module of its own and a line in the table `POLICIES` of this package.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from fly_trt.tokens import NO_TOKENS, FloatArray, IntArray

NO_SCORES: FloatArray = np.empty(0, np.float32)


class DraftSource(IntEnum):
    """Where a draft token comes from: a draft model chose it, or it is copied from earlier text."""

    MODEL = 0
    LOOKUP = 1


class Positions(NamedTuple):
    """What the target says of m consecutive positions: its choices int64 [m] (argmax or sample), and float32 [m] in
    nats the entropies of the whole vocabulary and of its most probable tokens, and the log-probabilities of its most
    probable token and of the draft token."""

    choices: IntArray
    entropy: FloatArray
    entropy_topk: FloatArray
    argmax_logprob: FloatArray
    draft_logprob: FloatArray

    def copy(self) -> "Positions":
        copies = (array.copy() for array in self[1:])
        return Positions(self.choices.copy(), *copies)

    def but_last(self) -> "Positions":
        scores = (array[:-1] for array in self[1:])
        return Positions(self.choices[:-1], *scores)

    def followed_by(self, others: "Positions") -> "Positions":
        scores = (np.concatenate([ours, more]) for ours, more in zip(self[1:], others[1:], strict=True))
        return Positions(np.concatenate([self.choices, others.choices]), *scores)


NOTHING = Positions(NO_TOKENS, NO_SCORES, NO_SCORES, NO_SCORES, NO_SCORES)


@dataclass(slots=True)
class Evidence:
    """What is known of one round: the draft, or its beginning, and what the target said so far.

    num_draft n is the length of the whole draft, which a loose verdict may depend on; `draft` int64 [d] the part that
    exists, all of it where it `has_ended`; `sources` uint8 [d] the DraftSource of each token. `target` has the draft
    positions that were verified, v of them, and once all are, the position after the last.

    Not promised, and then perhaps NaN: `target.entropy` unless the policy's use_full_entropy is set; the draft token's
    log-probability after the last draft token, where it is the target's choice, and where logits are not numbers. Of a
    request that samples or changes scores (penalties, bad words) nothing but the choices unless its policy is loose,
    and both log-probabilities only where that is decided on the host. Of a position whose logits are not numbers the
    choice agrees with no draft token.
    """

    num_draft: int
    has_ended: bool = False
    draft: IntArray = field(default_factory=lambda: NO_TOKENS)
    sources: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    target: Positions = NOTHING

    @property
    def choices(self) -> IntArray:
        return self.target.choices

    @property
    def end(self) -> int:
        """Draft tokens that there will be."""
        return len(self.draft) if self.has_ended else self.num_draft

    @property
    def num_known(self) -> int:
        """Draft tokens that exist and were verified."""
        return min(len(self.draft), len(self.target.choices))

    @property
    def matches(self) -> npt.NDArray[np.bool_]:
        """bool [num_known]: where the draft token is the target's choice."""
        known = self.num_known
        result: npt.NDArray[np.bool_] = self.draft[:known] == self.target.choices[:known]
        return result

    def add(self, positions: Positions) -> None:
        """What a step found at the next positions. The first arrays are kept as they are, so a round that goes on needs
        arrays of its own."""
        if len(self.target.choices):
            positions = self.target.followed_by(positions)
        self.target = positions

    def num_loosened(self, num_accepted: int) -> int:
        """How many of the accepted draft tokens differ from the target's choice."""
        return int(np.count_nonzero(self.draft[:num_accepted] != self.target.choices[:num_accepted]))


@dataclass(frozen=True, slots=True)
class Verdict:
    """`num_accepted` draft tokens stand, then comes `next_token`, the target's choice after them; None as long as what
    was verified does not decide what follows."""

    num_accepted: int
    next_token: int | None


@dataclass(frozen=True, slots=True)
class AcceptancePolicy(ABC):
    """One rule with its settings.

    Its fields are the four numbers that the engine's verification head takes for a row; the head accepts exactly where
    entropy_threshold is +inf, as for every rule that it does not know. use_full_entropy also asks for the entropy of
    the whole vocabulary, which a step may leave out.

    name: as `acceptance` has it. settings: the fields of AcceptanceParams that the rule reads. is_decided_by_head: the
    engine's head decides by the same rule, for argmax choices and whole rounds; the host decides everything else.
    """

    entropy_threshold: float = math.inf
    use_full_entropy: bool = False
    window: int = 0
    lookahead: int = 0

    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    is_decided_by_head: ClassVar[bool] = False

    @classmethod
    def make(cls, settings: Mapping[str, Any], vocab_size: int) -> Self:
        """From AcceptanceParams' fields by name, None where not given, for a vocabulary of so many tokens. Raises
        ConfigError for what the rule cannot be made of."""
        return cls()

    @property
    def is_loose(self) -> bool:
        """Whether any draft token may stand that differs from the target's choice."""
        return True

    @property
    def has_windows(self) -> bool:
        """Whether a loosened token waits for the `lookahead` tokens after it: a window that fails costs what it was
        drafted for."""
        return False

    @abstractmethod
    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        """How many draft tokens of a round stand, as far as it is verified. A verdict on a beginning never differs
        from the one on the whole: it accepts what is certain and leaves next_token open. A rule that waits for
        tokens after a mismatch says by `lookahead` for how many. Neither a draft token nor a choice among
        `stop_token_ids` is ever loosened."""

    def opens_window(self, evidence: Evidence, position: int, stop_token_ids: frozenset[int]) -> bool:
        """Whether the mismatch at `position` stands if draft and choices agree on the tokens that it waits for."""
        return False


def decide_each(evidence: Evidence, stands: npt.NDArray[np.bool_]) -> Verdict:
    """The verdict of a rule that decides every position by itself: draft tokens stand up to the first that does not.

    stands: bool [num_known], of the draft tokens that were verified.
    """
    fallen = np.flatnonzero(~stands)
    if len(fallen):
        return Verdict(int(fallen[0]), int(evidence.choices[fallen[0]]))
    known = len(stands)
    if known == evidence.end < len(evidence.choices):
        return Verdict(known, int(evidence.choices[known]))
    return Verdict(known, None)
