"""The steps of a draft model: one that verifies guesses and adds a token, or several of one token each in one call.
They change what the slots hold of drafts and cache. Whose tokens these are, and who guesses, is the drafter's to know.
"""

from collections.abc import Mapping

import numpy as np

from fly_trt.drafting.draft_slot import DraftSlot
from fly_trt.engines.base import Engine, Step
from fly_trt.engines.rollouts import LONGEST_ROLLOUT, Rollout, RollsOut
from fly_trt.tokens import NO_TOKENS, IntArray
from fly_trt.verification import EXACT, EXACT_WITH_ENTROPY, AcceptancePolicy, DraftScores, Evidence

# Steps of one call where a draft may stop at any of them, and where the level below may know more after some: those
# behind are wasted then, or worth a guess.
MAX_CAREFUL_STEPS = 4


class ModelSteps:
    """Steps of `engine` over `slots`, whose tokens may be larger than its vocabulary: it reads those as its last one.
    policy: which guesses stand."""

    def __init__(
        self, engine: Engine, slots: Mapping[int, DraftSlot], target_vocab_size: int, policy: AcceptancePolicy
    ) -> None:
        self._engine = engine
        self._slots = slots
        self._policy = policy
        self._last_token = engine.info.vocab_size - 1
        self._reads_all_tokens = engine.info.vocab_size >= target_vocab_size
        self._rolls = engine if isinstance(engine, RollsOut) and engine.has_rollouts else None
        self.rolls_out = self._rolls is not None and not policy.is_loose
        self.top_k = engine.info.entropy_top_k if engine.info.has_top_tokens else 0

    def read(self, slot: int, num_tokens: int) -> None:
        """So many tokens of a slot that are not cached yet, for nothing but the cache."""
        self._run([slot], [self._slots[slot].context[:num_tokens]], [NO_TOKENS])

    def extend(self, slots: list[int], guesses: list[IntArray] | None) -> None:
        """Each slot gets at least one token more, at most what it still wants; but none where what it read came to
        something that is not a number. `guesses` are what its next tokens may be, None where nobody guesses."""
        if (num_steps := self._num_rolled(slots, guesses)) > 1:
            self._roll_out(slots, num_steps)
            return
        guesses = guesses or [NO_TOKENS] * len(slots)
        contexts = [self._slots[slot].context for slot in slots]
        for slot, (new, scores) in zip(slots, self._run(slots, contexts, guesses), strict=True):
            state = self._slots[slot]
            if scores is not None:
                new = new[: state.take_scores(scores)]
            state.held.append(new)
            state.num_cached = min(state.num_cached, len(state.held))

    def _num_rolled(self, slots: list[int], guesses: list[IntArray] | None) -> int:
        """Steps of one token a row that one call may make: as many as all slots want, where nothing is guessed. A
        loose level is asked before each step, as what it lets pass is part of the draft."""
        if not self.rolls_out or (guesses is not None and any(map(len, guesses))):
            return 1
        states = [self._slots[slot] for slot in slots]
        if any(state.num_cached < len(state.held) - 1 or (state.wants_scores and self.top_k) for state in states):
            return 1
        is_careful = guesses is not None or any(state.stop is not None for state in states)
        most = MAX_CAREFUL_STEPS if is_careful else LONGEST_ROLLOUT
        return min(most, *(state.wanted - len(state.held) for state in states))

    def _roll_out(self, slots: list[int], num_steps: int) -> None:
        """Steps the slots from the first to the last of `slots` so many times, as `extend` would without guesses. The
        steps behind one that came to something that is not a number, or that a draft stopped at, count for nothing."""
        assert self._rolls is not None
        first, last = min(slots), max(slots)
        rollout = self._rolls.rollout(first, last - first + 1, num_steps)
        if len(slots) <= last - first:
            for slot in range(first, last + 1):
                rollout.set_idle(slot - first, self._num_cached(slot))
        for slot in slots:
            state = self._slots[slot]
            rollout.set_row(slot - first, state.num_cached, min(int(state.held.tokens[-1]), self._last_token))
        self._rolls.run_rollout(rollout)
        is_number = ~np.isnan(rollout.entropy_topk[:, :, 0])
        for slot in slots:
            state, row = self._slots[slot], slot - first
            num_sound = num_steps if is_number[:, row].all() else int(is_number[:, row].argmin())
            num_kept = num_sound
            if state.is_scored:
                num_kept = state.take_scores(_rolled_scores(rollout, row, num_sound, self.top_k))
            state.held.append(rollout.argmax[:num_kept, row, 0])
            state.num_cached += num_kept
            if num_sound < num_steps:
                self._engine.clear_slot(slot, state.num_cached)
                if not state.has_stopped:
                    state.lose(num_read=1)

    def _run(
        self, slots: list[int], contexts: list[IntArray], guesses: list[IntArray]
    ) -> list[tuple[list[int], DraftScores | None]]:
        """Steps the slots from the first to the last of `slots`; those between them that are not asked for write where
        nothing is held. Returns the guesses that stand with the token after them and, where they are wanted, the scores
        of these tokens; or no tokens where something is not a number."""
        first, last = min(slots), max(slots)
        num_tokens = max(len(context) + len(guess) for context, guess in zip(contexts, guesses, strict=True))
        with_top = self.top_k > 0 and any(self._slots[slot].wants_scores for slot in slots)
        asked = 1 + max(len(guess) for guess in guesses)  # of what it knows already nobody asks
        step = self._engine.step(first, last - first + 1, num_tokens, num_positions=asked, with_top=with_top)
        if len(slots) <= last - first:
            for slot in range(first, last + 1):
                step.set_idle(slot - first, self._num_cached(slot))
        for slot, context, guess in zip(slots, contexts, guesses, strict=True):
            if not self._reads_all_tokens:
                context = np.minimum(context, self._last_token)
            state = self._slots[slot]
            policy = EXACT_WITH_ENTROPY if state.reads_entropy else EXACT
            step.set_row(slot - first, state.num_cached, context, guess, policy, first=len(context) - 1)
        self._engine.run(step)
        return [
            self._settle(step, slot, len(context), guess)
            for slot, context, guess in zip(slots, contexts, guesses, strict=True)
        ]

    def _settle(self, step: Step, slot: int, num_context: int, guess: IntArray) -> tuple[list[int], DraftScores | None]:
        """What a step brought one of its slots, which has its context cached then, and what stands of its guess."""
        state, row, start = self._slots[slot], slot - step.first_slot, num_context - 1
        if np.isnan(step.entropy_topk[row, step.at(row, start, num_context + len(guess))]).any():
            self._engine.clear_slot(slot, state.num_cached)
            if not len(guess):
                state.lose(num_read=num_context)
            state.may_guess = False
            return [], None
        new = self._decide(step, slot, start, guess)
        state.num_cached += start + len(new)
        return new, self._scores(step, row, start, new) if state.is_scored else None

    def _decide(self, step: Step, slot: int, start: int, guess: IntArray) -> list[int]:
        """The guesses that stand and the token after them; the model speaks of them from position `start` on. A loose
        level is decided here, so that the head's entropies are those that the draft's stop asks for."""
        row, state = slot - step.first_slot, self._slots[slot]
        if state.is_private or not len(guess) or not self._policy.is_loose:
            return [*guess[: int(step.num_accepted[row])].tolist(), int(step.next_token[row])]
        said = step.said(row, step.at(row, start, start + len(guess) + 1))
        evidence = Evidence(len(guess), has_ended=True, draft=guess, target=said)
        verdict = self._policy.verdict(evidence, self._engine.info.stop_token_ids)
        assert verdict.next_token is not None, "the whole guess was verified"
        state.has_loosened |= evidence.num_loosened(verdict.num_accepted) > 0
        return [*guess[: verdict.num_accepted].tolist(), verdict.next_token]

    def _scores(self, step: Step, row: int, start: int, new: list[int]) -> DraftScores:
        """Of the tokens that were drafted from position `start` on; its buffers are used again."""
        at = step.at(row, start, start + len(new))
        scores = DraftScores.none(len(new), self.top_k)
        scores.entropy[:] = step.entropy[row, at]
        scores.logprob[:] = np.where(
            step.argmax[row, at] == new, step.argmax_logprob[row, at], step.token_logprob[row, at]
        )
        if step.top_ids is not None and step.top_logprobs is not None:
            scores.top_ids[:] = step.top_ids[row, at]
            scores.top_logprobs[:] = step.top_logprobs[row, at]
        return scores

    def _num_cached(self, slot: int) -> int:
        return self._slots[slot].num_cached if slot in self._slots else 0


def _rolled_scores(rollout: Rollout, row: int, num_tokens: int, top_k: int) -> DraftScores:
    scores = DraftScores.none(num_tokens, top_k)
    scores.entropy[:] = rollout.entropy[:num_tokens, row, 0]
    scores.logprob[:] = rollout.argmax_logprob[:num_tokens, row, 0]
    return scores
