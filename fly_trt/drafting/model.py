"""Drafting with a model, alone or with n-gram lookup in front of it (multi-level).

Multi-level: an n-gram match proposes a few tokens, the draft model verifies them by exact match in one step and adds
one of its own, until there are enough. The text is the draft model's greedy text either way; only the number of its
steps differs. Source: arXiv 2511.22972, section 3.4.
"""

from dataclasses import dataclass, field

import numpy as np

from fly_trt.drafting.base import common_prefix
from fly_trt.drafting.ngram import NgramIndex
from fly_trt.engines.base import NO_TOKENS, Engine, IntArray
from fly_trt.sequence import TokenSequence


@dataclass(frozen=True, slots=True)
class Lookup:
    """N-gram lookup in front of the draft model: match lengths, and tokens proposed per match."""

    max_n: int
    min_n: int
    num_tokens: int


@dataclass(slots=True)
class _Slot:
    """`held` is committed tokens and the drafts after them, of which the engine's cache has the first `num_cached`;
    the first `num_committed` were committed when last seen."""

    held: TokenSequence = field(default_factory=lambda: TokenSequence([]))
    num_cached: int = 0
    num_committed: int = 0
    index: NgramIndex | None = None


class ModelDrafter:
    """Greedy drafts of a draft model for a target of `target_vocab_size` tokens; tables may be padded differently."""

    def __init__(self, engine: Engine, target_vocab_size: int, lookup: Lookup | None = None) -> None:
        self._engine = engine
        self._lookup = lookup
        self._target_vocab_size = target_vocab_size
        self._vocab_size = engine.info.vocab_size
        longest_guess = min(lookup.num_tokens, engine.info.max_draft_len) if lookup else 0
        self._max_context = engine.info.max_num_tokens - longest_guess
        self._slots: dict[int, _Slot] = {}

    def propose(self, slot: int, tokens: IntArray, num_tokens: int) -> IntArray:
        state = self._slots.get(slot)
        if state is None:
            state = self._slots[slot] = _Slot()
            if self._lookup is not None:
                state.index = NgramIndex(self._lookup.max_n, self._lookup.min_n)
        self._follow(state, tokens)
        self._prefill(slot, state)
        while len(state.held) < len(tokens) + num_tokens:
            self._extend(slot, state, len(tokens) + num_tokens - len(state.held))
        draft = state.held.tokens[len(tokens) : len(tokens) + num_tokens].copy()
        return _before(draft, self._target_vocab_size)

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def _follow(self, state: _Slot, tokens: IntArray) -> None:
        """Drops the drafts that the target did not take and adds what it committed instead."""
        kept = common_prefix(state.held.tokens, tokens, state.num_committed)
        state.held.truncate(kept)
        state.held.append(tokens[kept:])
        state.num_committed = len(tokens)
        state.num_cached = min(state.num_cached, kept, len(tokens) - 1)
        if state.index is not None:
            state.index.sync(tokens, kept)

    def _prefill(self, slot: int, state: _Slot) -> None:
        """Runs all context but the last tokens, which ride with the first proposal."""
        chunk = self._max_context
        while len(state.held) - state.num_cached > chunk:
            context = state.held.tokens[state.num_cached : state.num_cached + chunk]
            self._run(slot, state, context, NO_TOKENS)

    def _extend(self, slot: int, state: _Slot, num_missing: int) -> None:
        """One step of the draft model: at least one token more, at most `num_missing`."""
        guess = NO_TOKENS
        if state.index is not None and self._lookup is not None and num_missing > 1:
            guess = _before(state.index.propose(min(self._lookup.num_tokens, num_missing - 1)), self._vocab_size)
        accepted, next_token = self._run(slot, state, state.held.tokens[state.num_cached :], guess)
        new = [*guess[:accepted].tolist(), next_token]
        state.held.append(new)
        if state.index is not None:
            state.index.extend(new)

    def _run(self, slot: int, state: _Slot, context: IntArray, guess: IntArray) -> tuple[int, int]:
        step = self._engine.step(slot, 1, len(context) + len(guess))
        step.set_row(0, state.num_cached, np.minimum(context, self._vocab_size - 1), guess)
        self._engine.run(step)
        accepted = int(step.num_accepted[0])
        state.num_cached += len(context) + accepted
        return accepted, int(step.next_token[0])


def _before(tokens: IntArray, vocab_size: int) -> IntArray:
    """The tokens before the first one that a vocabulary of this size does not have."""
    unknown = (tokens >= vocab_size).nonzero()[0]
    return tokens[: unknown[0]] if len(unknown) else tokens
