"""A grammar over the tokens of a table engine: what may follow is a function of the last two tokens of the output.

It is asked as `GrammarMatcher` is. Where it forces a token there may be another spelling of it, which it allows too. It
asserts that no draft has a token that it forbids.
"""

import numpy as np

from fly_trt.grammar.masks import TokenMasks, words_of
from fly_trt.tokens import NO_TOKENS, IntArray
from table_engine import STOP_TOKEN, VOCAB_SIZE

MOST_FORCED = 20


class ToyGrammar:
    """forces: of the places, how many have no choice. ends: whether the end token may come where there is a choice."""

    def __init__(self, salt: int, *, forces: float = 0.5, spells_twice: bool = True, ends: bool = False) -> None:
        self._salt = salt
        self._forces = forces
        self._spells_twice = spells_twice
        self._ends = ends
        self._places: dict[tuple[int, ...], tuple[list[int], bool]] = {}
        self.num_asked = 0  # for what is forced

    def may_follow(self, tokens: list[int]) -> tuple[list[int], bool]:
        """The tokens that may follow these of an output, and whether the first of them is forced, in one spelling or
        another."""
        place = tuple(tokens[-2:])
        if place not in self._places:
            self._places[place] = self._draw(place)
        return self._places[place]

    def _draw(self, place: tuple[int, ...]) -> tuple[list[int], bool]:
        rng = np.random.default_rng([self._salt, *place])
        several = rng.permutation(np.arange(STOP_TOKEN + 1, VOCAB_SIZE)).tolist()
        if rng.random() < self._forces:
            return several[: 1 + (self._spells_twice and rng.random() < 0.3)], True
        return several[: VOCAB_SIZE // 2] + [STOP_TOKEN] * self._ends, False

    def masks(self, output: IntArray, ahead: IntArray, first: int = 0) -> TokenMasks:
        assert self.num_allowed(output, ahead) == len(ahead), "drafts have only what the grammar allows"
        tokens, rows = output.tolist(), []
        for token in [*ahead.tolist(), STOP_TOKEN]:
            rows.append(words_of(np.array(self.may_follow(tokens)[0]), VOCAB_SIZE))
            tokens.append(token)
        return TokenMasks(np.array(rows[first:]), VOCAB_SIZE)

    def num_allowed(self, output: IntArray, ahead: IntArray) -> int:
        tokens = output.tolist()
        for count, token in enumerate(ahead.tolist()):
            if token not in self.may_follow(tokens)[0]:
                return count
            tokens.append(token)
        return len(ahead)

    def follow(self, output: IntArray, ahead: IntArray, proposed: IntArray) -> tuple[int, IntArray]:
        tokens = [*output.tolist(), *ahead.tolist()]
        for count, token in enumerate(proposed.tolist()):
            following, is_forced = self.may_follow(tokens)
            if token not in following[: 1 if is_forced else None]:
                return count, self.forced(np.array(tokens))
            tokens.append(token)
        return len(proposed), self.forced(np.array(tokens))

    def forced(self, output: IntArray) -> IntArray:
        self.num_asked += 1
        tokens, forced = output.tolist(), []
        while len(forced) < MOST_FORCED:
            following, is_forced = self.may_follow(tokens + forced)
            if not is_forced:
                break
            forced.append(following[0])
        return np.array(forced, np.int64)


class SilentGrammar(ToyGrammar):
    """The same, and it does not say what it forces."""

    def follow(self, output: IntArray, ahead: IntArray, proposed: IntArray) -> tuple[int, IntArray]:
        return self.num_allowed(np.concatenate([output, ahead]), proposed), NO_TOKENS

    def forced(self, output: IntArray) -> IntArray:
        return NO_TOKENS
