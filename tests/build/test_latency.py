"""The latency of a stack of models against a stack that is played through with random acceptance, and the search."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_build.latency import Stack, StepTime, best_lengths, best_stack, expected_tokens, time_per_token

TOKENS = 40_000


class PlayedLevel:
    """A model that asks the one below for tokens, verifies them and counts what all of that takes."""

    def __init__(
        self, step: StepTime, below: "PlayedLevel | None", chance: float, length: int, random: np.random.Generator
    ) -> None:
        self._step, self._below, self._chance, self._length, self._random = step, below, chance, length, random
        self._held = 0
        self.time = 0.0

    def take(self, num_tokens: int) -> float:
        """Writes so many tokens. Returns the time that it took; what was written beyond is kept for the next time."""
        time = 0.0
        while self._held < num_tokens:
            if self._below is None:
                time += self._step.of(1)
                self._held += 1
                continue
            time += self._below.take(self._length) + self._step.of(self._length + 1)
            stood = self._random.random(self._length) < self._chance
            self._held += 1 + int(np.cumprod(stood).sum())
        self._held -= num_tokens
        return time


def played(steps: Sequence[StepTime], acceptance: Sequence[float], lengths: Sequence[int]) -> float:
    level, random = None, np.random.default_rng(0)
    for step, chance, length in zip(steps, [0.0, *acceptance], [0, *lengths], strict=True):
        level = PlayedLevel(step, level, chance, length, random)
    assert level is not None
    return level.take(TOKENS) / TOKENS


@pytest.mark.parametrize("lengths", [(2, 3), (5, 12), (3, 2, 9)])
@pytest.mark.parametrize("acceptance", [0.3, 0.8, 0.95])
def test_the_latency_is_that_of_a_stack_with_independent_acceptance(
    lengths: tuple[int, ...], acceptance: float
) -> None:
    steps = [StepTime(single, 0.02 * single) for single in (0.02, 0.1, 0.3, 1.0)][-len(lengths) - 1 :]
    chances = [acceptance, 0.7, 0.9][: len(lengths)]
    assert time_per_token(steps, chances, lengths) == pytest.approx(played(steps, chances, lengths), rel=0.02)


def test_a_verification_brings_one_token_and_those_that_stand() -> None:
    assert expected_tokens(0.0, 7) == 1
    assert expected_tokens(1.0, 7) == 8
    assert expected_tokens(0.5, 2) == 1.75


rates = st.floats(0, 1)
times = st.builds(StepTime, st.floats(0.01, 1), st.floats(0, 0.05))


@examples(40)
@given(steps=st.lists(times, min_size=3, max_size=3), inner=rates, draft=rates, skip=rates)
def test_the_best_stack_is_the_best_of_all(steps: list[StepTime], inner: float, draft: float, skip: float) -> None:
    acceptance, longest = {(0, 1): inner, (1, 2): draft, (0, 2): skip}, [0, 4, 9]
    best = best_stack(steps, acceptance, longest)
    every = [Stack((2,), (), steps[2].single)]
    for first, second in itertools.product(range(2, 5), range(2, 10)):
        every += [
            Stack((1, 2), (second,), time_per_token(steps[1:], [draft], [second])),
            Stack((0, 2), (second,), time_per_token([steps[0], steps[2]], [skip], [second])),
            Stack((0, 1, 2), (first, second), time_per_token(steps, [inner, draft], [first, second])),
        ]
    assert best.time_per_token == min(stack.time_per_token for stack in every)
    assert best in every


def test_a_pair_of_which_nothing_is_known_is_left_out() -> None:
    steps = [StepTime(0.001, 0), StepTime(0.5, 0), StepTime(1, 0)]
    assert best_stack(steps, {(1, 2): 0.9}, [0, 9, 9]).models == (1, 2)
    assert best_stack(steps, {(0, 1): 0.9, (1, 2): 0.9}, [0, 9, 9]).models == (0, 1, 2)
    assert best_stack(steps, {(0, 1): 0.9, (1, 2): 0.9, (0, 2): 0.9}, [0, 9, 9]).models == (0, 2)


def test_lengths_keep_to_what_a_model_verifies() -> None:
    steps = [StepTime(0.001, 0), StepTime(0.1, 0), StepTime(1, 0)]
    acceptance = {(0, 1): 1.0, (1, 2): 1.0}
    assert best_lengths((0, 1, 2), steps, acceptance, [0, 15, 25]).lengths == (15, 25)
    assert best_lengths((0, 1, 2), steps, acceptance, [0, 1, 6]).lengths == (1, 6)
