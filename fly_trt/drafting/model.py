"""Drafting with a model, alone or with a level below that guesses for it, for all slots at once.

The level below, n-gram lookup (multi-level, arXiv 2511.22972, section 3.4) or another draft model (a chain, after arXiv
2510.19705), proposes a few tokens; the draft model verifies them in one step and adds one of its own, until there are
enough. By exact match the text is the draft model's greedy text whatever guesses, and only the number of its steps
differs.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fly_trt.drafting.base import Draft, DraftParts, DraftRow, DraftSettings, common_prefix, exchange
from fly_trt.drafting.levels import INNER_ACCEPTANCE, Level, Lookup
from fly_trt.drafting.stops import DraftStop
from fly_trt.engines.base import Engine, Step
from fly_trt.engines.rollouts import LONGEST_ROLLOUT, Rollout, RollsOut
from fly_trt.tokens import NO_TOKENS, IntArray, TokenSequence
from fly_trt.verification import (
    EXACT,
    EXACT_WITH_ENTROPY,
    NO_DRAFT_SCORES,
    AcceptancePolicy,
    DraftScores,
    DraftSource,
    Evidence,
    Positions,
)

# A row with more context than this gets a step of its own: in a common one every other row would be padded to it.
MAX_SHARED_CONTEXT = 8
# Guesses lengthen every row of a step while the row with the fewest hits sets the number of steps, so they pay for a
# few rows only: as long as a step's cost hardly depends on its positions.
MAX_GUESSED_POSITIONS = 16
# Steps of one call where a draft may stop at any of them, and where the level below may know more after some: those
# behind are wasted then, or worth a guess.
MAX_CAREFUL_STEPS = 4

NEVER = sys.maxsize


@dataclass(slots=True)
class _Slot:
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
    def context(self) -> IntArray:
        return self.held.tokens[self.num_cached :]


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
        self._top_k = engine.info.entropy_top_k if engine.info.has_top_tokens else 0
        self._has_all_tokens = self._vocab_size >= target_vocab_size
        longest_guess = min(self._level.num_tokens, engine.info.max_draft_len) if self._level is not None else 0
        self._max_context = engine.info.max_num_tokens - longest_guess
        self._rolls = engine if isinstance(engine, RollsOut) and engine.has_rollouts else None
        self._slots: dict[int, _Slot] = {}

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
                state = self._slots[row.slot] = _Slot()
            state.stop, state.wants_scores, state.is_private = row.stop, row.wants_scores, row.is_private
            self._follow(row.slot, state, row.tokens, row.num_committed)
            state.wanted = len(row.tokens) + row.num_tokens
            if state.is_pending:
                self._prefill(row.slot, state)

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        self.prepare(rows)
        pending = [row.slot for row in rows]
        while pending := [slot for slot in pending if self._slots[slot].is_pending]:
            self._extend(pending)
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
        state = self._slots[target] = _Slot()
        state.held.append(original.held.tokens[:num_tokens])
        state.num_cached = min(num_tokens, original.num_cached)
        state.lost_at = original.lost_at if original.lost_at <= num_tokens else NEVER
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

    def _follow(self, slot: int, state: _Slot, tokens: IntArray, num_committed: int) -> None:
        """Drops the drafts that the target did not take and adds what follows instead. What a former sequence
        left behind is kept as cache only: its tokens are no drafts."""
        is_new = state.num_committed == 0
        kept = common_prefix(state.held.tokens, tokens, state.num_committed)
        # How much was let pass depended on whom the step was shared with, which a private draft must not.
        starts_anew = state.is_private and state.has_loosened
        if is_new or kept < len(tokens) or starts_anew:
            state.held.truncate(kept)
            state.lost_at = state.lost_at if state.lost_at <= kept else NEVER
            state.held.append(tokens[kept:])
            state.num_cached = min(state.num_cached, kept)
            if self._level is not None:
                self._level.guesser.rewind(slot, kept)
            state.has_stopped = state.has_loosened = False
            state.first_scored = len(tokens)
            state.scores = DraftScores.none(0, self._top_k) if state.is_scored else NO_DRAFT_SCORES
        state.num_committed = num_committed
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
        guesses = self._guess(slots)
        if (num_steps := self._num_rolled(slots, guesses)) > 1:
            self._roll_out(slots, num_steps)
            return
        contexts = [self._slots[slot].context for slot in slots]
        for slot, (new, scores) in zip(slots, self._run(slots, contexts, guesses), strict=True):
            state = self._slots[slot]
            if scores is not None:
                new = new[: self._take_scores(state, scores)]
            state.held.append(new)
            state.num_cached = min(state.num_cached, len(state.held))

    def _num_rolled(self, slots: list[int], guesses: list[IntArray]) -> int:
        """Steps of one token a row that one call may make: as many as all slots want, where nothing is guessed. A
        loose level is asked before each step, as what it lets pass is part of the draft."""
        states = [self._slots[slot] for slot in slots]
        is_loose = self._level is not None and self._level.policy.is_loose
        if self._rolls is None or is_loose or any(map(len, guesses)):
            return 1
        if any(state.num_cached < len(state.held) - 1 or (state.wants_scores and self._top_k) for state in states):
            return 1
        is_careful = self._level is not None or any(state.stop is not None for state in states)
        most = MAX_CAREFUL_STEPS if is_careful else LONGEST_ROLLOUT
        return min(most, *(state.wanted - len(state.held) for state in states))

    def _roll_out(self, slots: list[int], num_steps: int) -> None:
        """Steps the slots from the first to the last of `slots` so many times, as `_extend` would without guesses. The
        steps behind one that came to something that is not a number, or that a draft stopped at, count for nothing."""
        assert self._rolls is not None
        first, last = min(slots), max(slots)
        rollout = self._rolls.rollout(first, last - first + 1, num_steps)
        if len(slots) <= last - first:
            for slot in range(first, last + 1):
                rollout.set_idle(slot - first, self._slots[slot].num_cached if slot in self._slots else 0)
        for slot in slots:
            state = self._slots[slot]
            token = min(int(state.held.tokens[-1]), self._vocab_size - 1)
            rollout.set_row(slot - first, state.num_cached, token)
        self._rolls.run_rollout(rollout)
        is_number = ~np.isnan(rollout.entropy_topk[:, :, 0])
        for slot in slots:
            state, row = self._slots[slot], slot - first
            num_sound = num_steps if is_number[:, row].all() else int(is_number[:, row].argmin())
            num_kept = num_sound
            if state.is_scored:
                num_kept = self._take_scores(state, _rolled_scores(rollout, row, num_sound, self._top_k))
            state.held.append(rollout.argmax[:num_kept, row, 0])
            state.num_cached += num_kept
            if num_sound < num_steps:
                self._engine.clear_slot(slot, state.num_cached)
                if not state.has_stopped:
                    state.lost_at, state.may_guess = state.num_cached + 1, False

    def _take_scores(self, state: _Slot, scores: DraftScores) -> int:
        """Takes what the model said of the next tokens, and returns how many of them are part of the draft."""
        num_kept = len(scores.entropy)
        if state.stop is not None:
            for at, (entropy, logprob) in enumerate(zip(scores.entropy.tolist(), scores.logprob.tolist(), strict=True)):
                if state.stop.ends(entropy, logprob):
                    state.has_stopped, num_kept = True, at + 1
                    break
        state.scores = state.scores.followed_by(scores.first(num_kept))
        return num_kept

    def _guess(self, slots: list[int]) -> list[IntArray]:
        """What the level below expects each slot's next tokens to be."""
        guesses = [NO_TOKENS] * len(slots)
        if self._level is None:
            return guesses
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

    def _run(
        self, slots: list[int], contexts: list[IntArray], guesses: list[IntArray]
    ) -> list[tuple[list[int], DraftScores | None]]:
        """Steps the slots from the first to the last of `slots`; those between them that are not asked for write where
        nothing is held. Returns the guesses that stand with the token after them and, where they are wanted, the scores
        of these tokens; or no tokens where something is not a number."""
        first, last = min(slots), max(slots)
        num_tokens = max(len(context) + len(guess) for context, guess in zip(contexts, guesses, strict=True))
        with_top = self._top_k > 0 and any(self._slots[slot].wants_scores for slot in slots)
        asked = 1 + max(len(guess) for guess in guesses)  # of what it knows already nobody asks
        step = self._engine.step(first, last - first + 1, num_tokens, num_positions=asked, with_top=with_top)
        if len(slots) <= last - first:
            for slot in range(first, last + 1):
                step.set_idle(slot - first, self._slots[slot].num_cached if slot in self._slots else 0)
        for slot, context, guess in zip(slots, contexts, guesses, strict=True):
            if not self._has_all_tokens:
                context = np.minimum(context, self._vocab_size - 1)
            cached, policy = self._slots[slot].num_cached, self._head_policy(slot)
            step.set_row(slot - first, cached, context, guess, policy, first=len(context) - 1)
        self._engine.run(step)
        results: list[tuple[list[int], DraftScores | None]] = []
        for slot, context, guess in zip(slots, contexts, guesses, strict=True):
            state = self._slots[slot]
            said = step.at(slot - first, len(context) - 1, len(context) + len(guess))
            if np.isnan(step.entropy_topk[slot - first, said]).any():
                self._engine.clear_slot(slot, state.num_cached)
                if not len(guess):
                    state.lost_at = state.num_cached + len(context)
                state.may_guess = False
                results.append(([], None))
                continue
            new = self._decide(step, slot, len(context) - 1, guess)
            state.num_cached += len(context) + len(new) - 1
            scores = self._scores(step, slot - first, len(context) - 1, new) if state.is_scored else None
            results.append((new, scores))
        return results

    def _head_policy(self, slot: int) -> AcceptancePolicy:
        state = self._slots[slot]
        reads_entropy = state.wants_scores or (state.stop is not None and state.stop.needs_entropy)
        return EXACT_WITH_ENTROPY if reads_entropy else EXACT

    def _decide(self, step: Step, slot: int, start: int, guess: IntArray) -> list[int]:
        """The guesses that stand and the token after them; the model speaks of them from position `start` on. A loose
        level is decided here, so that the head's entropies are those that the draft's stop asks for."""
        row, state = slot - step.first_slot, self._slots[slot]
        if self._level is None or state.is_private or not len(guess) or not self._level.policy.is_loose:
            return [*guess[: int(step.num_accepted[row])].tolist(), int(step.next_token[row])]
        at = step.at(row, start, start + len(guess) + 1)
        said = Positions(
            step.argmax[row, at],
            step.entropy[row, at],
            step.entropy_topk[row, at],
            step.argmax_logprob[row, at],
            step.token_logprob[row, at],
        )
        evidence = Evidence(len(guess), has_ended=True, draft=guess, target=said)
        verdict = self._level.policy.verdict(evidence, self._engine.info.stop_token_ids)
        assert verdict.next_token is not None, "the whole guess was verified"
        state.has_loosened |= evidence.num_loosened(verdict.num_accepted) > 0
        return [*guess[: verdict.num_accepted].tolist(), verdict.next_token]

    def _scores(self, step: Step, row: int, start: int, new: list[int]) -> DraftScores:
        """Of the tokens that were drafted from position `start` on; its buffers are used again."""
        at = step.at(row, start, start + len(new))
        scores = DraftScores.none(len(new), self._top_k)
        scores.entropy[:] = step.entropy[row, at]
        scores.logprob[:] = np.where(
            step.argmax[row, at] == new, step.argmax_logprob[row, at], step.token_logprob[row, at]
        )
        if step.top_ids is not None and step.top_logprobs is not None:
            scores.top_ids[:] = step.top_ids[row, at]
            scores.top_logprobs[:] = step.top_logprobs[row, at]
        return scores


def _rolled_scores(rollout: Rollout, row: int, num_tokens: int, top_k: int) -> DraftScores:
    scores = DraftScores.none(num_tokens, top_k)
    scores.entropy[:] = rollout.entropy[:num_tokens, row, 0]
    scores.logprob[:] = rollout.argmax_logprob[:num_tokens, row, 0]
    return scores


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
