"""Guesses are asked for where a draft token with them takes less time, and now and then where it does not."""

from collections import Counter

import numpy as np
import pytest

from fly_trt.drafting import DraftRow, Lookup, ModelDrafter
from fly_trt.drafting.guess_trials import RETRY, GuessTrials
from fly_trt.engines.rollouts import LONGEST_ROLLOUT
from rolling_engine import RollingEngine
from table_engine import VOCAB_SIZE, TableEngine, greedy, hashed

LANGUAGE = hashed(8, 1, order=30)
LOOKUP = Lookup(max_n=3, min_n=1, num_tokens=4)


def run(trials: GuessTrials, count: int, seconds: dict[bool, float], num_rows: int = 1) -> Counter[bool]:
    """How often proposals of 10 tokens, which take so long by whether they have guesses, had them."""
    chosen: Counter[bool] = Counter()
    for _ in range(count):
        way = trials.choose(num_rows)
        chosen[way] += 1
        trials.observe(num_rows, 10, seconds[way], has_guesses=way)
    return chosen


@pytest.mark.parametrize("pays", [True, False])
def test_what_takes_less_is_chosen_and_the_other_tried_now_and_then(*, pays: bool) -> None:
    chosen = run(GuessTrials(), 2 + 10 * RETRY, {pays: 1.0, not pays: 1.3})
    assert chosen == {pays: 1 + 10 * (RETRY - 1), not pays: 1 + 10}


def test_it_follows_when_the_text_changes() -> None:
    trials = GuessTrials()
    run(trials, 100, {True: 1.3, False: 1.0})
    run(trials, 5 * RETRY, {True: 0.3, False: 1.0})
    assert run(trials, RETRY, {True: 0.3, False: 1.0})[True] == RETRY - 1


def test_as_many_rows_are_compared_with_as_many() -> None:
    trials = GuessTrials()
    run(trials, 40, {True: 1.0, False: 2.0}, num_rows=1)
    run(trials, 40, {True: 9.0, False: 8.0}, num_rows=4)
    assert run(trials, RETRY, {True: 1.0, False: 2.0}, num_rows=1)[True] == RETRY - 1
    assert run(trials, RETRY, {True: 9.0, False: 8.0}, num_rows=4)[True] == 1


@pytest.mark.parametrize("guesses", [True, False])
def test_drafts_are_the_same_with_guesses_and_without(monkeypatch: pytest.MonkeyPatch, *, guesses: bool) -> None:
    monkeypatch.setattr(GuessTrials, "choose", lambda self, num_rows: guesses)
    engine = RollingEngine(LANGUAGE)
    drafter = ModelDrafter(engine, VOCAB_SIZE, LOOKUP)
    text = [2, 3, 4, 2, 3, 4]
    for _ in range(4):
        (draft,) = drafter.propose([DraftRow(0, np.array(text), 30)])
        assert draft.tokens.tolist() == greedy(LANGUAGE, text, 30)
        text += [*draft.tokens[:9].tolist(), 7]
    is_long = max(steps for *_, steps in engine.rollouts) == LONGEST_ROLLOUT
    assert is_long != guesses, "where nobody guesses, as many steps as are wanted are one call"


def test_an_engine_that_steps_one_by_one_is_always_guessed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuessTrials, "choose", lambda self, num_rows: False)
    engine = TableEngine(lambda tokens: 5)
    ModelDrafter(engine, VOCAB_SIZE, LOOKUP).propose([DraftRow(0, np.array([5, 5, 5, 5]), 20)])
    assert engine.num_runs < 10
