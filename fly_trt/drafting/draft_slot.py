"""What a draft model has of the sequence in one slot: the tokens, how many of them are committed and cached, and what
it said of those that it drafted. It knows no engine.
"""

import sys
from dataclasses import dataclass, field

from fly_trt.drafting.base import common_prefix
from fly_trt.drafting.stops import DraftStop
from fly_trt.tokens import IntArray, TokenSequence
from fly_trt.verification import NO_DRAFT_SCORES, DraftScores

NEVER = sys.maxsize


@dataclass(slots=True)
class DraftSlot:
    """`held` is committed tokens and the drafts after them, of which the engine's cache has the first `num_cached`; the
    first `num_committed` were committed when last seen; `wanted` is how long `held` shall become. Reading its first
    `lost_at` tokens came to something that is not a number, so that nothing follows them; one that `may_guess` no more
    had a guess that did. `stop` says where the draft ends, and has said it where it `has_stopped`. Where the row
    `wants_scores`, `scores` has what the model said of the tokens of `held` from `first_scored` on. The draft of a row
    that `is_private` is the model's own text; another's may have tokens that it only let pass, as it `has_loosened`."""

    held: TokenSequence = field(default_factory=lambda: TokenSequence([]))
    num_cached: int = 0
    num_committed: int = 0
    wanted: int = 0
    lost_at: int = NEVER
    may_guess: bool = True
    stop: DraftStop | None = None
    has_stopped: bool = False
    wants_scores: bool = False
    scores: DraftScores = NO_DRAFT_SCORES
    first_scored: int = 0
    is_private: bool = False
    has_loosened: bool = False

    @property
    def is_lost(self) -> bool:
        return self.lost_at <= len(self.held)

    @property
    def is_pending(self) -> bool:
        return len(self.held) < self.wanted and not self.is_lost and not self.has_stopped

    @property
    def is_scored(self) -> bool:
        return self.wants_scores or self.stop is not None

    @property
    def reads_entropy(self) -> bool:
        return self.wants_scores or (self.stop is not None and self.stop.needs_entropy)

    @property
    def context(self) -> IntArray:
        return self.held.tokens[self.num_cached :]

    def beginning(self, num_tokens: int) -> "DraftSlot":
        """That of a sequence which begins with its first `num_tokens` tokens, all of them drafts so far."""
        state = DraftSlot(num_cached=min(num_tokens, self.num_cached))
        state.held.append(self.held.tokens[:num_tokens])
        state.lost_at = self.lost_at if self.lost_at <= num_tokens else NEVER
        return state

    def follow(self, tokens: IntArray, num_committed: int, top_k: int) -> int | None:
        """Drops the drafts that the target did not take and adds what follows instead; returns how many tokens stayed
        where that changed anything. What a former sequence left behind is kept as cache only: its tokens are no drafts.
        top_k: most probable tokens of each position in its scores."""
        is_new = self.num_committed == 0
        kept = common_prefix(self.held.tokens, tokens, self.num_committed)
        # How much was let pass depended on whom the step was shared with, which a private draft must not.
        starts_anew = self.is_private and self.has_loosened
        has_changed = is_new or kept < len(tokens) or starts_anew
        if has_changed:
            self.held.truncate(kept)
            self.lost_at = self.lost_at if self.lost_at <= kept else NEVER
            self.held.append(tokens[kept:])
            self.num_cached = min(self.num_cached, kept)
            self.has_stopped = self.has_loosened = False
            self.first_scored = len(tokens)
            self.scores = DraftScores.none(0, top_k) if self.is_scored else NO_DRAFT_SCORES
        self.num_committed = num_committed
        self.may_guess = True
        self.num_cached = min(self.num_cached, len(self.held) - 1)
        return kept if has_changed else None

    def take_scores(self, scores: DraftScores) -> int:
        """Takes what the model said of the next tokens, and returns how many of them are part of the draft."""
        num_kept = len(scores.entropy)
        if self.stop is not None:
            for at, (entropy, logprob) in enumerate(zip(scores.entropy.tolist(), scores.logprob.tolist(), strict=True)):
                if self.stop.ends(entropy, logprob):
                    self.has_stopped, num_kept = True, at + 1
                    break
        self.scores = self.scores.followed_by(scores.first(num_kept))
        return num_kept

    def lose(self, *, num_read: int) -> None:
        """Reading so many tokens behind the cached ones came to something that is not a number."""
        self.lost_at, self.may_guess = self.num_cached + num_read, False
