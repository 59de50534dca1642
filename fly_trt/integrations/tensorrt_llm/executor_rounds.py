"""A request's round as requests to two Executors: a draft, in one of them or several, and its verification.

To TensorRT-LLM each is a new request that begins with all tokens so far, whose cache it finds in the blocks of the ones
before; one that has draft tokens ends after a single step. A guess of n-gram lookup is a draft of the draft model's, as
that one's text is a draft of the target's (multi-level, arXiv 2511.22972, section 3.4). This module knows tokens, and
nothing of executors, threads or settings.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fly_trt.drafting.ngram import NgramIndex
from fly_trt.errors import EngineError
from fly_trt.outputs import RoundCounts
from fly_trt.runtime.request import Request
from fly_trt.tokens import IntArray
from fly_trt.verification import DraftSource

# The draft model says so many tokens where lookup has no guess, before it is asked again. A request costs more than a
# step alone, by how much is not known; with the demo pair 2 save the draft model a sixth of its steps, and 6 a tenth.
UNGUESSED_TOKENS = 2


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """has_model: a draft model drafts, else lookup does. lookup: match lengths, longest and shortest, and how many
    tokens a match proposes; None without lookup. max_guess: draft tokens of the draft model's engine. Sizes in tokens;
    a vocabulary's is that of the model's table."""

    num_draft_tokens: int
    max_seq_len: int
    has_model: bool
    lookup: tuple[int, int, int] | None
    max_guess: int
    target_vocab_size: int
    draft_vocab_size: int

    @property
    def source(self) -> DraftSource:
        """Where draft tokens of the target come from."""
        return DraftSource.MODEL if self.has_model else DraftSource.LOOKUP


class Piece(NamedTuple):
    """What is asked of the draft model, or of the target where it `is_verification`: at most max_tokens tokens after
    `context`, of which the first ones may be those of `draft`."""

    is_verification: bool
    context: IntArray
    draft: list[int]
    max_tokens: int


@dataclass(slots=True, eq=False)
class Flight:
    """A request that runs. `num_draft`: draft tokens of its rounds. `draft` so far, which `has_ended` where there is
    nothing more to propose. `index` has the sequence and the draft, of which the first `num_indexed` tokens are still
    right when a round ends. `piece` is what it waits for, None where it waits for nothing."""

    request: Request
    num_draft: int
    seed: int
    index: NgramIndex | None = None
    draft: list[int] = field(default_factory=list)
    has_ended: bool = False
    num_indexed: int = 0
    num_reused_blocks: int = 0
    piece: Piece | None = None

    @property
    def is_first(self) -> bool:
        """Whether the target has not been asked yet."""
        return not self.request.output_token_ids

    def next_piece(self, settings: RoundSettings) -> Piece:
        """What is to be asked next."""
        tokens = self.request.sequence.tokens
        if not self.num_draft:
            return Piece(True, tokens, [], self.request.max_tokens - len(self.request.output_token_ids))
        wanted = min(self.num_draft, settings.max_seq_len - len(tokens))
        if not settings.has_model and not self.draft and not self.has_ended:
            self.draft, self.has_ended = self._look_up(tokens, wanted), True
        if self.has_ended or len(self.draft) >= wanted:
            return Piece(True, tokens, self.draft, len(self.draft) + 1)
        context = np.append(tokens, self.draft) if self.draft else tokens
        missing, guess = wanted - len(self.draft), []
        if settings.lookup is not None and missing > 1:
            # The model adds a token of its own to those that stand.
            guess = self._look_up(context, min(settings.lookup[2], settings.max_guess, missing - 1))
        if settings.draft_vocab_size < settings.target_vocab_size:
            guess = _known(guess, settings.draft_vocab_size)
            context = np.minimum(context, settings.draft_vocab_size - 1)
        if settings.lookup is not None and not guess:
            missing = min(missing, UNGUESSED_TOKENS)
        return Piece(False, context, guess, len(guess) + 1 if guess else missing)

    def take_draft(self, tokens: list[int], settings: RoundSettings) -> None:
        """Tokens of the draft model that follow the draft; it may say fewer than were asked for, and say more later."""
        assert self.piece is not None
        known = _known(tokens[: self.piece.max_tokens], settings.target_vocab_size)
        self.draft += known
        self.has_ended = not tokens or len(known) < len(tokens)

    def take_verdict(self, tokens: list[int]) -> int:
        """The target's answer to the draft: the tokens that stand and one of its own. Returns how many stand. Raises
        EngineError for what cannot be an answer to it."""
        num_accepted = len(tokens) - 1
        if not 0 <= num_accepted <= len(self.draft) or tokens[:num_accepted] != self.draft[:num_accepted]:
            raise EngineError(
                f"request {self.request.request_id}: to {len(self.draft)} draft tokens the target answered {tokens}, "
                "expected the beginning of the draft and one more: is it built with speculative_decoding_mode "
                "DRAFT_TOKENS_EXTERNAL, by TensorRT-LLM 1.2?"
            )
        return num_accepted

    def end_round(self, num_kept: int, source: DraftSource) -> RoundCounts:
        """The next one begins with no draft. num_kept: draft tokens that were emitted. Which of them the target had not
        chosen itself, nobody is told."""
        num_draft, name = len(self.draft), source.name.lower()
        self.draft, self.has_ended = [], False
        if self.index is not None:
            self.index.truncate(self.num_indexed)
        return RoundCounts(num_draft, num_kept, 0, {name: num_draft}, {name: num_kept} if num_kept else {})

    def _look_up(self, context: IntArray, num_tokens: int) -> list[int]:
        assert self.index is not None
        self.index.sync(context, len(self.index))
        self.num_indexed = len(self.request.sequence)
        return [int(token) for token in self.index.propose(num_tokens)]


def _known(tokens: list[int], vocab_size: int) -> list[int]:
    """Those before the first one that a vocabulary of this size does not have."""
    return tokens[: next((at for at, token in enumerate(tokens) if token >= vocab_size), len(tokens))]
