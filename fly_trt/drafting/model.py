"""Drafting with a model, alone or with a level below that guesses for it, for all slots at once.

The level below, n-gram lookup (multi-level, arXiv 2511.22972, section 3.4) or another draft model (a chain, after arXiv
2510.19705), proposes a few tokens; the draft model verifies them in one step and adds one of its own, until there are
enough. By exact match the text is the draft model's greedy text whatever guesses, and only the number of its steps
differs.
"""

import time
from collections.abc import Sequence

from fly_trt.drafting.base import Draft, DraftParts, DraftRow, DraftSettings, exchange
from fly_trt.drafting.draft_slot import DraftSlot
from fly_trt.drafting.guess_trials import GuessTrials
from fly_trt.drafting.levels import INNER_ACCEPTANCE, Level, Lookup
from fly_trt.drafting.model_steps import ModelSteps
from fly_trt.engines.base import Engine
from fly_trt.tokens import NO_TOKENS, IntArray
from fly_trt.verification import EXACT, NO_DRAFT_SCORES, DraftScores, DraftSource

# A row with more context than this gets a step of its own: in a common one every other row would be padded to it.
MAX_SHARED_CONTEXT = 8
# Guesses lengthen every row of a step while the row with the fewest hits sets the number of steps, so they pay for a
# few rows only: as long as a step's cost hardly depends on its positions.
MAX_GUESSED_POSITIONS = 16


class ModelDrafter:
    """Greedy drafts of a draft model for a target of `target_vocab_size` tokens; tables may be padded differently.

    level: what guesses for the model, if anything does. reuse_cache: a sequence starts from what the slot's cache still
    holds of its prefix. It can be the level below another draft model, which is then its target.
    """

    is_free = False
    has_exact_copies = False

    def __init__(
        self, engine: Engine, target_vocab_size: int, level: Level | Lookup | None = None, *, reuse_cache: bool = True
    ) -> None:
        self._engine = engine
        self._level = level.level() if isinstance(level, Lookup) else level
        self._reuse_cache = reuse_cache
        self._target_vocab_size = target_vocab_size
        self._vocab_size = engine.info.vocab_size
        self._has_all_tokens = self._vocab_size >= target_vocab_size
        longest_guess = min(self._level.num_tokens, engine.info.max_draft_len) if self._level is not None else 0
        self._max_context = engine.info.max_num_tokens - longest_guess
        self._slots: dict[int, DraftSlot] = {}
        policy = EXACT if self._level is None else self._level.policy
        self._steps = ModelSteps(engine, self._slots, target_vocab_size, policy)
        has_choice = self._steps.rolls_out and self._level is not None and self._level.guesser.is_free
        self._trials = GuessTrials() if has_choice else None
        self._is_guessing = self._level is not None

    @property
    def num_preparations(self) -> int:
        below = self._level.guesser.num_preparations if self._level is not None else 0
        return self._engine.num_preparations + below

    def num_unread(self, slot: int, length: int) -> int:
        state = self._slots.get(slot)
        if state is not None and state.is_lost:
            return 0
        return length - min(length, state.num_cached) if state is not None and state.num_committed else length

    def prepare(self, rows: Sequence[DraftRow]) -> None:
        for row in rows:
            state = self._slots.get(row.slot)
            if state is None:
                state = self._slots[row.slot] = DraftSlot()
            state.stop, state.wants_scores, state.is_private = row.stop, row.wants_scores, row.is_private
            kept = state.follow(row.tokens, row.num_committed, self._steps.top_k)
            if kept is not None and self._level is not None:
                self._level.guesser.rewind(row.slot, kept)
            state.wanted = len(row.tokens) + row.num_tokens
            if state.is_pending:
                self._prefill(row.slot, state)

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        self.prepare(rows)
        pending = [row.slot for row in rows if self._slots[row.slot].is_pending]
        if pending and self._trials is not None:
            self._try(self._trials, pending)
        else:
            self._extend_all(pending)
        return [self._drafted(row) for row in rows]

    def release(self, slot: int) -> None:
        if self._level is not None:
            self._level.guesser.release(slot)
        if not self._reuse_cache:
            self._slots.pop(slot, None)
        elif (state := self._slots.get(slot)) is not None:
            state.num_committed = 0

    def rewind(self, slot: int, num_tokens: int) -> None:
        """Of the sequence in the slot nothing but the first `num_tokens` tokens is known to be left."""
        if (state := self._slots.get(slot)) is not None:
            state.num_committed = min(state.num_committed, num_tokens)

    def swap(self, first: int, second: int) -> None:
        if self._level is not None:
            self._level.guesser.swap(first, second)
        num_cached = [self._slots[slot].num_cached if slot in self._slots else 0 for slot in (first, second)]
        self._engine.swap_slots(first, second, max(num_cached))
        exchange(self._slots, first, second)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        if self._level is not None:
            self._level.guesser.copy(source, target, num_tokens)
        if (original := self._slots.get(source)) is None:
            return
        state = self._slots[target] = original.beginning(num_tokens)
        self._engine.copy_slot(source, target, state.num_cached)

    def reset(self) -> None:
        if self._level is not None:
            self._level.guesser.reset()
        self._slots.clear()

    def trim(self, num_tokens: int) -> None:
        if self._level is not None:
            self._level.guesser.trim(num_tokens)
        held = self._engine.trim(num_tokens)
        for state in self._slots.values():
            state.num_cached = min(state.num_cached, held)

    def _drafted(self, row: DraftRow) -> Draft:
        """What a slot holds behind the row's tokens."""
        state, start = self._slots[row.slot], len(row.tokens)
        tokens = state.held.tokens[start : start + row.num_tokens].copy()
        if self._vocab_size != self._target_vocab_size:
            tokens = _before(tokens, self._target_vocab_size)
        scores = NO_DRAFT_SCORES
        if state.is_scored:
            first = start - state.first_scored
            scores = DraftScores._make(array[first : first + len(tokens)] for array in state.scores)
        return Draft.of(tokens, DraftSource.MODEL, scores, is_whole=False)

    def _try(self, trials: GuessTrials, pending: list[int]) -> None:
        """With guesses or without: by exact match, the drafts are the same."""
        self._is_guessing = trials.choose(len(pending))
        if self._is_guessing:  # what was drafted without them is read once, and is no part of the trial
            assert self._level is not None
            self._level.guesser.prepare([DraftRow(slot, self._slots[slot].held.tokens, 0) for slot in pending])
        states = [self._slots[slot] for slot in pending]
        num_held = sum(len(state.held) for state in states)
        prepared, started = self._engine.num_preparations, time.perf_counter()
        self._extend_all(pending)
        seconds = time.perf_counter() - started
        num_tokens = sum(len(state.held) for state in states) - num_held
        if num_tokens and self._engine.num_preparations == prepared:
            trials.observe(len(pending), num_tokens, seconds, has_guesses=self._is_guessing)

    def _extend_all(self, pending: list[int]) -> None:
        while pending:
            self._steps.extend(pending, self._guess(pending))
            pending = [slot for slot in pending if self._slots[slot].is_pending]

    def _prefill(self, slot: int, state: DraftSlot) -> None:
        """Runs a long context in steps of its own; the last one brings the first draft tokens."""
        while len(state.context) > self._max_context and state.is_pending:
            self._steps.read(slot, self._max_context)
        if len(state.context) > MAX_SHARED_CONTEXT and state.is_pending:
            self._steps.extend([slot], self._guess([slot]))

    def _guess(self, slots: list[int]) -> list[IntArray] | None:
        """What the level below expects each slot's next tokens to be; None where it is not asked."""
        if self._level is None or not self._is_guessing:
            return None
        guesses = [NO_TOKENS] * len(slots)
        longest = min(self._level.num_tokens, MAX_GUESSED_POSITIONS // (max(slots) - min(slots) + 1) - 1)
        asked: dict[int, DraftRow] = {}
        for at, slot in enumerate(slots):
            state = self._slots[slot]
            num_tokens = min(longest, state.wanted - len(state.held) - 1)
            if num_tokens > 0 and state.may_guess:
                asked[at] = DraftRow(slot, state.held.tokens, num_tokens, is_private=state.is_private)
        if asked:
            for at, draft in zip(asked, self._level.guesser.propose(list(asked.values())), strict=True):
                guesses[at] = draft.tokens if self._has_all_tokens else _before(draft.tokens, self._vocab_size)
        return guesses


def draft_model(settings: DraftSettings, parts: DraftParts) -> ModelDrafter:
    return ModelDrafter(parts.load_draft_model(), parts.target_vocab_size, reuse_cache=parts.reuse_cache)


def multi_level(settings: DraftSettings, parts: DraftParts) -> ModelDrafter:
    engine = parts.load_draft_model()
    return ModelDrafter(engine, parts.target_vocab_size, _lookup(settings), reuse_cache=parts.reuse_cache)


def chain(settings: DraftSettings, parts: DraftParts) -> ModelDrafter:
    """The inner draft model, with lookup in front of it, guesses for the draft model."""
    engine = parts.load_draft_model()
    # It reads what the target committed and what the draft model added.
    vocab_size, reuse_cache = max(engine.info.vocab_size, parts.target_vocab_size), parts.reuse_cache
    inner = ModelDrafter(parts.load_inner_draft_model(), vocab_size, _lookup(settings), reuse_cache=reuse_cache)
    level = Level(inner, settings.inner_num_tokens, INNER_ACCEPTANCE[settings.inner_acceptance])
    return ModelDrafter(engine, parts.target_vocab_size, level, reuse_cache=reuse_cache)


def _lookup(settings: DraftSettings) -> Lookup:
    return Lookup(settings.prompt_lookup_max, settings.prompt_lookup_min, settings.prompt_lookup_num_tokens)


def _before(tokens: IntArray, vocab_size: int) -> IntArray:
    """The tokens before the first one that a vocabulary of this size does not have."""
    unknown = (tokens >= vocab_size).nonzero()[0]
    return tokens[: unknown[0]] if len(unknown) else tokens
