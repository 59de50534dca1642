"""Drafting with a model, alone or with n-gram lookup in front of it (multi-level), for all slots at once.

Multi-level: an n-gram match proposes a few tokens, the draft model verifies them by exact match in one step and adds
one of its own, until there are enough. The text is the draft model's greedy text either way; only the number of its
steps differs. Source: arXiv 2511.22972, section 3.4.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fly_trt.drafting.base import DraftParts, DraftRow, DraftSettings, common_prefix, exchange
from fly_trt.drafting.ngram import NgramIndex
from fly_trt.engines.base import Engine
from fly_trt.tokens import NO_TOKENS, IntArray, TokenSequence
from fly_trt.verification import DraftSource

# A row with more context than this gets a step of its own: in a common one every other row would be padded to it.
MAX_SHARED_CONTEXT = 8
# Guesses lengthen every row of a step while the row with the fewest hits sets the number of steps, so they pay for a
# few rows only: as long as a step's cost hardly depends on its positions.
MAX_GUESSED_POSITIONS = 16

NEVER = sys.maxsize
IDLE_CONTEXT: IntArray = np.zeros(1, np.int64)


@dataclass(frozen=True, slots=True)
class Lookup:
    """N-gram lookup in front of the draft model: match lengths, and tokens proposed per match."""

    max_n: int
    min_n: int
    num_tokens: int


@dataclass(slots=True)
class _Slot:
    """`held` is committed tokens and the drafts after them, of which the engine's cache has the first `num_cached`;
    the first `num_committed` were committed when last seen; `wanted` is how long `held` shall become. Reading its first
    `lost_at` tokens came to something that is not a number, so that nothing follows them; one that `may_guess` no more
    had a guess that did."""

    index: NgramIndex | None
    held: TokenSequence = field(default_factory=lambda: TokenSequence([]))
    num_cached: int = 0
    num_committed: int = 0
    wanted: int = 0
    lost_at: int = NEVER
    may_guess: bool = True

    @property
    def is_lost(self) -> bool:
        return self.lost_at <= len(self.held)

    @property
    def is_pending(self) -> bool:
        return len(self.held) < self.wanted and not self.is_lost

    @property
    def context(self) -> IntArray:
        return self.held.tokens[self.num_cached :]


class ModelDrafter:
    """Greedy drafts of a draft model for a target of `target_vocab_size` tokens; tables may be padded differently.

    reuse_cache: a sequence starts from what the slot's cache still holds of its prefix.
    """

    is_free = False
    source = DraftSource.MODEL

    def __init__(
        self, engine: Engine, target_vocab_size: int, lookup: Lookup | None = None, *, reuse_cache: bool = True
    ) -> None:
        self._engine = engine
        self._lookup = lookup
        self._reuse_cache = reuse_cache
        self._target_vocab_size = target_vocab_size
        self._vocab_size = engine.info.vocab_size
        self._has_all_tokens = self._vocab_size >= target_vocab_size
        longest_guess = min(lookup.num_tokens, engine.info.max_draft_len) if lookup else 0
        self._max_context = engine.info.max_num_tokens - longest_guess
        self._slots: dict[int, _Slot] = {}

    @property
    def num_preparations(self) -> int:
        return self._engine.num_preparations

    def num_unread(self, slot: int, length: int) -> int:
        state = self._slots.get(slot)
        if state is not None and state.is_lost:
            return 0
        return length - min(length, state.num_cached) if state is not None and state.num_committed else length

    def prepare(self, rows: Sequence[DraftRow]) -> None:
        for slot, tokens, num_tokens in rows:
            state = self._slots.get(slot)
            if state is None:
                state = self._slots[slot] = self._new_slot()
            self._follow(state, tokens)
            state.wanted = len(tokens) + num_tokens
            if state.is_pending:
                self._prefill(slot, state)

    def propose(self, rows: Sequence[DraftRow]) -> list[IntArray]:
        self.prepare(rows)
        pending = [row.slot for row in rows]
        while pending := [slot for slot in pending if self._slots[slot].is_pending]:
            self._extend(pending)
        drafts = []
        for slot, tokens, num_tokens in rows:
            draft = self._slots[slot].held.tokens[len(tokens) : len(tokens) + num_tokens].copy()
            has_same_tokens = self._vocab_size == self._target_vocab_size
            drafts.append(draft if has_same_tokens else _before(draft, self._target_vocab_size))
        return drafts

    def release(self, slot: int) -> None:
        if not self._reuse_cache:
            self._slots.pop(slot, None)
        elif (state := self._slots.get(slot)) is not None:
            state.num_committed = 0

    def swap(self, first: int, second: int) -> None:
        num_cached = [self._slots[slot].num_cached if slot in self._slots else 0 for slot in (first, second)]
        self._engine.swap_slots(first, second, max(num_cached))
        exchange(self._slots, first, second)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        if (original := self._slots.get(source)) is None:
            return
        state = self._slots[target] = self._new_slot()
        state.held.append(original.held.tokens[:num_tokens])
        state.num_cached = min(num_tokens, original.num_cached)
        state.lost_at = original.lost_at if original.lost_at <= num_tokens else NEVER
        self._engine.copy_slot(source, target, state.num_cached)

    def reset(self) -> None:
        self._slots.clear()

    def trim(self, num_tokens: int) -> None:
        held = self._engine.trim(num_tokens)
        for state in self._slots.values():
            state.num_cached = min(state.num_cached, held)

    def _new_slot(self) -> _Slot:
        return _Slot(NgramIndex(self._lookup.max_n, self._lookup.min_n) if self._lookup is not None else None)

    def _follow(self, state: _Slot, tokens: IntArray) -> None:
        """Drops the drafts that the target did not take and adds what it committed instead. What a former sequence
        left behind is kept as cache only: its tokens are no drafts."""
        is_new = state.num_committed == 0
        kept = common_prefix(state.held.tokens, tokens, state.num_committed)
        if is_new or kept < len(tokens):
            state.held.truncate(kept)
            state.lost_at = state.lost_at if state.lost_at <= kept else NEVER
            state.held.append(tokens[kept:])
            state.num_cached = min(state.num_cached, kept)
            if state.index is not None:
                state.index.sync(state.held.tokens, min(kept, len(state.index)))
        state.num_committed = len(tokens)
        state.may_guess = True
        state.num_cached = min(state.num_cached, len(state.held) - 1)

    def _prefill(self, slot: int, state: _Slot) -> None:
        """Runs a long context in steps of its own; the last one brings the first draft tokens."""
        while len(state.context) > self._max_context and state.is_pending:
            self._run([slot], [state.context[: self._max_context]], [NO_TOKENS])
        if len(state.context) > MAX_SHARED_CONTEXT and state.is_pending:
            self._extend([slot])

    def _extend(self, slots: list[int]) -> None:
        """One step of the draft model: each slot gets at least one token more, at most what it still wants; but none
        where what it read came to something that is not a number."""
        longest_guess = MAX_GUESSED_POSITIONS // (max(slots) - min(slots) + 1) - 1
        guesses = [self._guess(self._slots[slot], longest_guess) for slot in slots]
        contexts = [self._slots[slot].context for slot in slots]
        for slot, guess, (accepted, next_token) in zip(
            slots, guesses, self._run(slots, contexts, guesses), strict=True
        ):
            state = self._slots[slot]
            if next_token < 0:
                continue
            new = [*guess[:accepted].tolist(), next_token]
            state.held.append(new)
            if state.index is not None:
                state.index.extend(new)

    def _guess(self, state: _Slot, longest: int) -> IntArray:
        if state.index is None or self._lookup is None or not state.may_guess:
            return NO_TOKENS
        num_tokens = min(self._lookup.num_tokens, state.wanted - len(state.held) - 1, longest)
        if num_tokens <= 0:
            return NO_TOKENS
        guess = state.index.propose(num_tokens)
        return guess if self._has_all_tokens else _before(guess, self._vocab_size)

    def _run(self, slots: list[int], contexts: list[IntArray], guesses: list[IntArray]) -> list[tuple[int, int]]:
        """Steps the slots from the first to the last of `slots`; those between them that are not asked for write where
        nothing is held. Returns accepted tokens and next token of each, or -1 where that is not a number."""
        first, last = min(slots), max(slots)
        num_tokens = max(len(context) + len(guess) for context, guess in zip(contexts, guesses, strict=True))
        step = self._engine.step(first, last - first + 1, num_tokens)
        if len(slots) <= last - first:
            for slot in range(first, last + 1):
                step.set_row(slot - first, self._slots[slot].num_cached if slot in self._slots else 0, IDLE_CONTEXT)
        for slot, context, guess in zip(slots, contexts, guesses, strict=True):
            if not self._has_all_tokens:
                context = np.minimum(context, self._vocab_size - 1)
            step.set_row(slot - first, self._slots[slot].num_cached, context, guess)
        self._engine.run(step)
        results = []
        for slot, context, guess in zip(slots, contexts, guesses, strict=True):
            state = self._slots[slot]
            if np.isnan(step.entropy_topk[slot - first, : len(context) + len(guess)]).any():
                self._engine.clear_slot(slot, state.num_cached)
                if not len(guess):
                    state.lost_at = state.num_cached + len(context)
                state.may_guess = False
                results.append((0, -1))
                continue
            accepted = int(step.num_accepted[slot - first])
            state.num_cached += len(context) + accepted
            results.append((accepted, int(step.next_token[slot - first])))
        return results


def draft_model(settings: DraftSettings, parts: DraftParts, lookup: Lookup | None = None) -> ModelDrafter:
    engine = parts.load_draft_model()
    return ModelDrafter(engine, parts.target_vocab_size, lookup, reuse_cache=parts.reuse_cache)


def multi_level(settings: DraftSettings, parts: DraftParts) -> ModelDrafter:
    lookup = Lookup(settings.prompt_lookup_max, settings.prompt_lookup_min, settings.prompt_lookup_num_tokens)
    return draft_model(settings, parts, lookup)


def _before(tokens: IntArray, vocab_size: int) -> IntArray:
    """The tokens before the first one that a vocabulary of this size does not have."""
    unknown = (tokens >= vocab_size).nonzero()[0]
    return tokens[: unknown[0]] if len(unknown) else tokens
