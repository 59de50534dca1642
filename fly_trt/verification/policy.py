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
NO_TOP_IDS: IntArray = np.empty((0, 0), np.int64)
NO_TOP_LOGPROBS: FloatArray = np.empty((0, 0), np.float32)
NO_UNIFORMS: npt.NDArray[np.float64] = np.empty(0)


class DraftSource(IntEnum):
    """Where a draft token comes from: a draft model chose it, or it is copied, from earlier text of its own sequence or
    from another's output, or it spells what the request's grammar forces."""

    MODEL = 0
    LOOKUP = 1
    CORPUS = 2
    GRAMMAR = 3


class HeadInfo(NamedTuple):
    """What an engine's verification head offers to a rule: tokens of the vocabulary, how many of the most probable ones
    the gate looks at, and whether it names them."""

    vocab_size: int
    entropy_top_k: int
    has_top_tokens: bool = False


class DraftScores(NamedTuple):
    """What a draft model said where it chose d draft tokens: float32 [d] in nats the entropy of its whole vocabulary
    and the token's log-probability, and its k most probable tokens, int64 [d, k], with log-probabilities float32
    [d, k]. NaN and -1 where no model chose the token, and where nobody asked."""

    entropy: FloatArray
    logprob: FloatArray
    top_ids: IntArray
    top_logprobs: FloatArray

    @classmethod
    def none(cls, num_tokens: int, top_k: int = 0) -> "DraftScores":
        """Of tokens that no model scored."""
        entropy, logprob = np.full((2, num_tokens), np.nan, np.float32)
        return cls(entropy, logprob, np.full((num_tokens, top_k), -1), np.full((num_tokens, top_k), np.nan, np.float32))

    def first(self, num_tokens: int) -> "DraftScores":
        return DraftScores._make(array[:num_tokens] for array in self)

    def followed_by(self, others: "DraftScores") -> "DraftScores":
        """Of these tokens and those; tokens that no model scored may have been given fewer places."""
        top_k = max(self.top_ids.shape[1], others.top_ids.shape[1])
        pairs = zip(self._with_top(top_k), others._with_top(top_k), strict=True)
        return DraftScores._make(np.concatenate([ours, more]) for ours, more in pairs)

    def _with_top(self, top_k: int) -> "DraftScores":
        missing = top_k - self.top_ids.shape[1]
        if not missing:
            return self
        places = (0, 0), (0, missing)
        ids, logprobs = np.pad(self.top_ids, places, constant_values=-1), self.top_logprobs
        return self._replace(top_ids=ids, top_logprobs=np.pad(logprobs, places, constant_values=np.float32(np.nan)))


NO_DRAFT_SCORES = DraftScores.none(0)


class Positions(NamedTuple):
    """What the target says of m consecutive positions: its choices int64 [m] (argmax or sample), and float32 [m] in
    nats the entropies of the whole vocabulary and of its most probable tokens, and the log-probabilities of its most
    probable token and of the draft token. Where a rule asks for them: its k most probable tokens int64 [m, k], most
    probable first, with log-probabilities float32 [m, k]; a number in [0, 1) that was drawn for the position, float64
    [m], and for nothing else."""

    choices: IntArray
    entropy: FloatArray
    entropy_topk: FloatArray
    argmax_logprob: FloatArray
    draft_logprob: FloatArray
    top_ids: IntArray = NO_TOP_IDS
    top_logprobs: FloatArray = NO_TOP_LOGPROBS
    uniforms: npt.NDArray[np.float64] = NO_UNIFORMS

    def copy(self) -> "Positions":
        return Positions._make(array.copy() for array in self)

    def but_last(self) -> "Positions":
        return Positions._make(array[:-1] for array in self)

    def followed_by(self, others: "Positions") -> "Positions":
        return Positions._make(np.concatenate([ours, more]) for ours, more in zip(self, others, strict=True))


NOTHING = Positions(NO_TOKENS, NO_SCORES, NO_SCORES, NO_SCORES, NO_SCORES)


@dataclass(slots=True)
class Evidence:
    """What is known of one round: the draft, or its beginning, and what the target said so far.

    num_draft n is the length of the whole draft, which a loose verdict may depend on; `draft` int64 [d] the part that
    exists, all of it where it `has_ended`; `sources` uint8 [d] the DraftSource of each token and `scores` what the
    draft model said of it. `target` has the draft positions that were verified, v of them, and once all are, the
    position after the last.

    Not promised, and then perhaps NaN, -1 or empty: `target.entropy` unless the policy's use_full_entropy is set; the
    target's most probable tokens, its drawn numbers and the draft's scores unless the policy needs them; the draft
    token's log-probability after the last draft token, where it is the target's choice, and where logits are not
    numbers; drawn numbers where nothing is sampled. Of a request that samples or changes scores (penalties, bad words)
    nothing but the choices unless its policy is loose, and log-probabilities only where that is decided on the host. Of
    a position whose logits are not numbers the choice agrees with no draft token.
    """

    num_draft: int
    has_ended: bool = False
    draft: IntArray = field(default_factory=lambda: NO_TOKENS)
    sources: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    scores: DraftScores = NO_DRAFT_SCORES
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

    def num_exact(self, num_accepted: int) -> int:
        """How many of the accepted draft tokens come before the first that differs: exact verification of the same
        draft would have accepted these."""
        differs = self.draft[:num_accepted] != self.target.choices[:num_accepted]
        return int(differs.argmax()) if differs.any() else num_accepted


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
    needs_top, needs_draft_scores, needs_uniforms: it reads the target's most probable tokens, what the draft model said
    of its own, or drawn numbers. loosens_copies: it is meant for copied draft tokens, so that a drafter that has them
    verified exactly beside a model's leaves them to it.
    """

    entropy_threshold: float = math.inf
    use_full_entropy: bool = False
    window: int = 0
    lookahead: int = 0

    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    is_decided_by_head: ClassVar[bool] = False
    needs_top: ClassVar[bool] = False
    needs_draft_scores: ClassVar[bool] = False
    needs_uniforms: ClassVar[bool] = False
    loosens_copies: ClassVar[bool] = False

    @classmethod
    def make(cls, settings: Mapping[str, Any], head: HeadInfo) -> Self:
        """From AcceptanceParams' fields by name, None where not given, for an engine with such a head. Raises
        ConfigError for what the rule cannot be made of."""
        return cls()

    def for_request(self) -> "AcceptancePolicy":
        """The policy of one sequence: a rule that learns returns one that knows nothing yet."""
        return self

    @property
    def loosens(self) -> frozenset[DraftSource]:
        """The sources of which a draft token may be loosened."""
        return frozenset((DraftSource.MODEL, DraftSource.LOOKUP))

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
        tokens after a mismatch says by `lookahead` for how many. `stop_token_ids` are never loosened, neither as draft
        tokens nor as choices: a rule need not look, since `Guards` has the last word."""

    def opens_window(self, evidence: Evidence, position: int, stop_token_ids: frozenset[int]) -> bool:
        """Whether the mismatch at `position` stands if draft and choices agree on the tokens that it waits for."""
        return False

    def why(self, evidence: Evidence, position: int) -> str:
        """What the rule says of the draft token at `position`, which differs from the target's choice, in words: the
        numbers that it compares. It is asked once the position is decided, and only for a trace."""
        return f"by the rule {self.name}"

    @property
    def gate(self) -> float | None:
        """The entropy in nats below which the rule is exact; None for a rule without such a gate."""
        return None

    def observe(self, evidence: Evidence, num_accepted: int) -> None:  # noqa: B027 - few rules learn
        """A round ended. What a rule learns must come from the accepted positions and the one after them: whether
        anything is known of those behind depends on how the round was cut."""


def percent(logprob: float) -> str:
    """A probability for people; empty where it is not known."""
    share = 100 * math.exp(min(logprob, 0.0)) if not math.isnan(logprob) else math.nan
    if math.isnan(share):
        return ""
    return "under 0.1 %" if share < 0.1 else f"{share:.0f} %" if share >= 10 else f"{share:.1f} %"


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
