"""One request's round: up to K draft tokens, what the target says of each, and what is decided so far.

A round may be verified in one step or in several, as the load asks for; its verdict is the same, because the policy
sees the same draft, the same choices and the same length either way. So the cut changes speed and never tokens. The
round owns it: it says what it feeds next and takes what a step says of that. It knows steps and tokens, and nothing of
requests or drafters.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fly_trt.drafting import Draft
from fly_trt.engines.base import Step
from fly_trt.runtime.feed import Feed
from fly_trt.runtime.loosening import WindowCounts
from fly_trt.tokens import FloatArray, IntArray
from fly_trt.verification import (
    NO_SCORES,
    AcceptancePolicy,
    DraftSource,
    Evidence,
    Limits,
    Positions,
    Verdict,
)

NO_CHOICE = -1  # agrees with no draft token

Choose = Callable[[FloatArray, IntArray, IntArray], Positions]
"""From logits float32 [m, V], the draft tokens that are verified and undecided, and those that follow, to what the
target says of the positions, or of the first ones of them."""


@dataclass(slots=True)
class RoundCosts:
    """What a round that is traced took so far: its request's share of every step and draft that it was in."""

    draft_seconds: float = 0.0
    verification_seconds: float = 0.0
    num_steps: int = 0
    num_rows: int = 0

    def add_draft(self, seconds: float, num_rows: int) -> None:
        self.draft_seconds += seconds / num_rows

    def add_step(self, seconds: float, num_rows: int) -> None:
        self.verification_seconds += seconds / num_rows
        self.num_steps += 1
        self.num_rows = max(self.num_rows, num_rows)


@dataclass(slots=True)
class Round:
    """A draft that follows the `start` tokens of the sequence, the `policy` that decides it, and the `limits` that no
    policy goes beyond.

    `evidence` has the draft and what the target said of it, `logits` float32 [v, V] where they are wanted;
    `num_committed` draft tokens are part of the sequence already. Where the round `is_observed` its length is the
    rule's and not the load's, so that the request's windows may be judged by it. `is_careful`: a step came to something
    that is not a number, so that one draft token at a time is fed, or as few as there must be, and none spoils those
    before it; where even those few do, the next step `is_alone`, and a draft token that spoils its row is not loosened.
    Where a grammar has a say it `is_guided`: the draft begins with the `num_forced` tokens that the grammar forces, and
    `is_cut` where the grammar forbids the drafter's next one and forces none instead. `is_limited`: the policy wanted
    the draft token to stand at which the round ended. Of a request that wants a trace it has its `costs`, and whether
    it `needs_top` tokens for it, and why a loose request's round is exact: its "windows" are closed for a while, or the
    "breaker" is tripped.
    """

    start: int
    evidence: Evidence
    policy: AcceptancePolicy
    limits: Limits
    is_observed: bool = False
    logits: FloatArray = field(default_factory=lambda: NO_SCORES)
    num_committed: int = 0
    is_careful: bool = False
    is_alone: bool = False
    is_guided: bool = False
    num_forced: int = 0
    is_cut: bool = False
    is_limited: bool = False
    costs: RoundCosts | None = None
    needs_top: bool = False
    exact_because: str | None = None

    @property
    def draft(self) -> IntArray:
        return self.evidence.draft

    @property
    def num_draft(self) -> int:
        return self.evidence.num_draft

    @property
    def end(self) -> int:
        """Draft tokens that there will be."""
        return self.evidence.end

    @property
    def num_verified(self) -> int:
        """Positions that the target spoke of."""
        return len(self.evidence.choices)

    @property
    def has_begun(self) -> bool:
        return self.num_verified > 0

    @property
    def num_fed(self) -> int:
        """Draft tokens that the target has processed."""
        return max(0, self.num_verified - 1)

    @property
    def num_missing(self) -> int:
        """Draft tokens that the target has not processed."""
        return self.end - self.num_fed

    @property
    def num_window(self) -> int:
        """Draft tokens to process until the open window is decided; 0 where none is open."""
        is_open = self.num_committed < self.evidence.num_known
        return self.num_committed + self.policy.lookahead - self.num_fed if is_open else 0

    @property
    def least_fed(self) -> int:
        """Draft tokens that a step has to have for the round to get on. The head knows the log-probability of a draft
        token only where the row has it, and a policy of the host may need it."""
        if self.policy.is_decided_by_head or not self.policy.is_loose:
            return 0
        return 2 if self.has_begun else 1

    @property
    def num_forced_left(self) -> int:
        """Of the tokens that a grammar forces at the beginning, those that the target has not processed."""
        return max(0, self.num_forced - self.num_fed)

    def begin_draft(self, forced: Draft) -> None:
        """The draft begins with what a grammar forces; whatever a drafter has comes behind it."""
        self.is_guided, self.num_forced = True, len(forced.tokens)
        evidence = self.evidence
        evidence.draft, evidence.sources, evidence.scores = forced.tokens, forced.sources, forced.scores

    def take_draft(self, draft: Draft, num_asked: int) -> None:
        """Takes draft tokens that follow the committed ones; fewer than asked for mean that the draft ends there. A
        draft that was made as a whole, before any of it was needed, is then a shorter round; one that is made in parts
        may not be, for its first part was decided by the length that was asked for."""
        evidence, kept = self.evidence, self.num_committed
        evidence.has_ended = len(draft.tokens) < num_asked
        if kept:
            evidence.draft = np.concatenate([evidence.draft[:kept], draft.tokens])
            evidence.sources = np.concatenate([evidence.sources[:kept], draft.sources])
            evidence.scores = evidence.scores.first(kept).followed_by(draft.scores)
        else:
            evidence.draft, evidence.sources, evidence.scores = draft.tokens, draft.sources, draft.scores
        if evidence.has_ended and draft.is_whole:
            evidence.num_draft = len(evidence.draft)

    def feed(self, context: IntArray, num_tokens: int) -> Feed:
        """What it feeds to a step with rows of `num_tokens`, after the sequence's tokens that are not cached yet."""
        least = 0 if self.is_alone else self.least_fed
        if self.has_begun:
            count = max(1, least) if self.is_careful else num_tokens
            draft = self.draft[self.num_fed : min(self.num_fed + count, self.end)]
            return Feed(draft, takes_risks=len(draft) > 1)
        room = num_tokens - len(context)
        draft = self.draft[: min(least if self.is_careful else room, room, self.end)]
        return Feed(context, draft, len(context) - 1, takes_risks=len(draft) > 0)

    def take(
        self,
        feed: Feed,
        step: Step,
        row: int,
        choose: Choose | None,
        *,
        head_stops: frozenset[int],
        keeps_logits: bool,
    ) -> Verdict:
        """Takes what a step says of the tokens that were fed to this row of it, and decides what that decides.

        choose: how a request that samples or changes scores gets its choices; None takes the argmax. head_stops: what
        the engine's head never loosens, so that its verdict on a whole round holds where no more is forbidden.
        """
        positions = step.at(row, feed.first, feed.num_tokens)
        logits = None if step.logits is None else step.logits[row, positions]
        said = step.said(row, positions)
        if (self.policy.needs_top or self.needs_top) and step.top_ids is not None and step.top_logprobs is not None:
            said = said._replace(top_ids=step.top_ids[row, positions], top_logprobs=step.top_logprobs[row, positions])
        is_whole = not self.has_begun and len(said.choices) == self.num_draft + 1
        if choose is None and is_whole and self._head_decides(head_stops):
            self._add(said, logits)
            return Verdict(int(step.num_accepted[row]), int(step.next_token[row]))
        if choose is None:
            said = said.copy()  # the step's buffers are used again
            said.choices[np.isnan(said.entropy_topk)] = NO_CHOICE
            said.draft_logprob[-1] = np.nan  # what follows is no part of the row
            if self.least_fed and not self.is_alone and self._differs_last(said):
                said = said.but_last()
        else:
            assert logits is not None
            verified = self.num_verified
            said = choose(logits, self.draft[self.num_committed : verified], self.draft[verified:])
        self._add(said, logits[: len(said.choices)] if keeps_logits and logits is not None else None)
        self.is_alone = False
        verdict = self.policy.verdict(self.evidence, self.limits.never_loosened)
        if not self.policy.is_loose:
            return verdict
        limited = self.limits.apply(verdict, self.evidence)
        self.is_limited = limited is not verdict
        return limited

    def feed_less(self) -> None:
        """What was fed came to something that is not a number, and its draft tokens may be to blame."""
        self.is_alone = self.is_careful
        self.is_careful = True

    def go_on(self) -> None:
        """More steps follow: what is a view of this one's buffers becomes the round's own."""
        self.logits = self.logits.copy()

    def num_held(self, verdict: Verdict) -> int:
        """Tokens of the sequence and of the draft that the cache holds, and that are right to hold on to. Where nothing
        was verified yet, the last token of the sequence is to be fed again."""
        if verdict.next_token is None:
            return self.start + self.num_verified - 1
        return self.start + min(self.num_fed, verdict.num_accepted)

    def counts_of_drafter(self) -> tuple[int, bool]:
        """Of a round that is decided: the drafter's tokens that stood, and whether one did not. What a grammar forces
        is no drafter's; where the draft ended because it forbade a token, that one would have been rejected."""
        at, sources = self.num_committed, self.evidence.sources
        differs = at < self.end
        if not self.is_guided:
            return at, differs
        is_forced = sources == DraftSource.GRAMMAR
        is_drafters = differs and not is_forced[at : at + 1].any()
        return at - int(np.count_nonzero(is_forced[:at])), is_drafters or (self.is_cut and not differs)

    def window_counts(self) -> WindowCounts:
        """What the round shows of windows once it is decided; the same however it was cut."""
        at, stood = self.num_committed, self.evidence.num_loosened(self.num_committed)
        num_agreed, differs = self.counts_of_drafter()
        failed = (
            at < self.end
            and self.policy.opens_window(self.evidence, at, self.limits.never_loosened)
            and not self.limits.forbid(self.evidence, at)
        )
        return WindowCounts(num_agreed - stood, stood + differs, stood, int(failed))

    def _head_decides(self, head_stops: frozenset[int]) -> bool:
        """Whether the verdict of the engine's head is the policy's, and nothing is forbidden that it does not know."""
        if not self.policy.is_decided_by_head:
            return False
        limits = self.limits
        return not self.policy.is_loose or (limits.never_loosened <= head_stops and not limits.are_beyond_the_head)

    def _differs_last(self, said: Positions) -> bool:
        """Whether the last of these next positions has a draft token, and another one than the target's choice."""
        last = self.num_verified + len(said.choices) - 1
        return last < len(self.draft) and bool(self.draft[last] != said.choices[-1])

    def _add(self, said: Positions, logits: FloatArray | None) -> None:
        if logits is not None:
            self.logits = np.concatenate([self.logits, logits]) if self.has_begun else logits
        elif not self.has_begun:
            self.logits = NO_SCORES
        self.evidence.add(said)
