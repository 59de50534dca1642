"""Drafts of an engine that makes several steps in one call beside those of one that cannot: the same."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.drafting import DRAFT_STOPS, Draft, DraftRow, Level, Lookup, ModelDrafter
from fly_trt.drafting.model_steps import MAX_CAREFUL_STEPS
from fly_trt.engines.rollouts import LONGEST_ROLLOUT
from fly_trt.verification import PRESETS
from rolling_engine import RollingEngine
from table_engine import VOCAB_SIZE, TableEngine, greedy, hashed

LANGUAGE = hashed(8, 1, order=30)
LOOKUP = Lookup(max_n=3, min_n=2, num_tokens=4)


def uncertain(salt: int) -> Callable[[tuple[int, ...]], float]:
    return lambda tokens: hash((salt, *tokens[-9:])) % 5 / 4


def one_or_the_other(**settings: Any) -> tuple[ModelDrafter, ModelDrafter, RollingEngine]:
    level = settings.pop("level", None)
    rolling = RollingEngine(LANGUAGE, **settings)
    return (
        ModelDrafter(TableEngine(LANGUAGE, **settings), VOCAB_SIZE, level),
        ModelDrafter(rolling, VOCAB_SIZE, level),
        rolling,
    )


def bits(draft: Draft, *, with_entropy: bool = True) -> list[bytes]:
    _, *others = scores = draft.scores
    return [draft.tokens.tobytes(), *(array.tobytes() for array in (scores if with_entropy else others))]


def test_a_draft_takes_as_few_calls_as_it_can() -> None:
    _, drafter, engine = one_or_the_other()
    (draft,) = drafter.propose([DraftRow(0, np.array([2, 3, 4]), 30)])
    assert draft.tokens.tolist() == greedy(LANGUAGE, [2, 3, 4], 30)
    assert engine.rollouts == [(0, 1, LONGEST_ROLLOUT), (0, 1, 29 - LONGEST_ROLLOUT)], "the prompt is a step of its own"


def test_rows_go_on_together_until_the_first_has_enough() -> None:
    _, drafter, engine = one_or_the_other()
    rows = [DraftRow(slot, np.array([slot + 2, 3]), count) for slot, count in enumerate((3, 9, 6))]
    drafts = drafter.propose(rows)
    assert engine.rollouts == [(0, 3, 2), (1, 2, 3), (1, 1, 3)]
    for row, draft in zip(rows, drafts, strict=True):
        assert draft.tokens.tolist() == greedy(LANGUAGE, row.tokens.tolist(), row.num_tokens)


def test_a_level_below_is_asked_again_after_a_few_steps_without_a_guess() -> None:
    _, drafter, engine = one_or_the_other(level=LOOKUP)
    (draft,) = drafter.propose([DraftRow(0, np.array([2, 3, 4]), 20)])
    assert draft.tokens.tolist() == greedy(LANGUAGE, [2, 3, 4], 20)
    assert engine.rollouts
    assert max(steps for *_, steps in engine.rollouts) == MAX_CAREFUL_STEPS


def test_a_loose_level_is_asked_before_each_step_for_what_it_lets_pass_is_part_of_the_draft() -> None:
    smaller = ModelDrafter(TableEngine(hashed(8, 2)), VOCAB_SIZE)
    _, drafter, engine = one_or_the_other(level=Level(smaller, 3, PRESETS["reference"]))
    drafter.propose([DraftRow(0, np.array([2, 3, 4]), 20)])
    assert engine.rollouts == []


def test_what_a_policy_wants_to_know_of_the_most_probable_tokens_comes_step_by_step() -> None:
    single, rolled, engine = one_or_the_other()
    row = DraftRow(0, np.array([2, 3, 4]), 9, wants_scores=True)
    assert bits(single.propose([row])[0]) == bits(rolled.propose([row])[0])
    assert engine.rollouts == []


@pytest.mark.parametrize("broken_at", range(4, 12))
def test_nothing_follows_what_is_not_a_number_and_the_slot_is_cleared(broken_at: int) -> None:
    entropy = lambda tokens: math.nan if tokens[0] == 2 and len(tokens) == broken_at else 0.5  # noqa: E731
    single, rolled, engine = one_or_the_other(entropy=entropy)
    rows = [DraftRow(0, np.array([2, 3, 4]), 12), DraftRow(1, np.array([2]), 20)]
    for drafter in (single, rolled):
        drafts = drafter.propose(rows)
        assert [len(draft.tokens) for draft in drafts] == [broken_at - 3, broken_at - 1]
        assert drafter.propose(rows)[0].tokens.tolist() == drafts[0].tokens.tolist(), "and it is not tried again"
    assert engine.rollouts
    assert all(len(slot) < broken_at for slot in engine.slots[:2])
    tokens = [5] * (broken_at + 3)
    for drafter in (single, rolled):
        drafter.release(0)
        assert len(drafter.propose([DraftRow(0, np.array(tokens), 5)])[0].tokens) == 5, "another sequence"


@examples(60)
@given(
    stop=st.sampled_from([None, ("confidence", 0.5), ("adaedl", 0.3), ("adasd", 0.6)]),
    level=st.sampled_from([None, LOOKUP]),
    salt=st.integers(0, 9),
    broken=st.integers(0, 60),
    rounds=st.lists(
        st.tuples(st.dictionaries(st.integers(0, 3), st.integers(1, 20), min_size=1), st.integers(0, 20)), max_size=6
    ),
)
def test_drafts_are_those_of_single_steps_to_the_bit(
    stop: tuple[str, float] | None, level: Lookup | None, salt: int, broken: int, rounds: list
) -> None:
    """With stops, with places that are not numbers, and several sequences that are drafted for together or not."""
    calm = uncertain(salt)
    entropy = lambda tokens: math.nan if hash((salt, *tokens)) % 60 == broken else calm(tokens)  # noqa: E731
    single, rolled, _ = one_or_the_other(entropy=entropy, level=level)
    texts = [[2 + slot, 3, 4] for slot in range(4)]
    for asked, num_accepted in rounds:
        rows = [
            DraftRow(slot, np.array(texts[slot]), count, stop=DRAFT_STOPS[stop[0]](stop[1]) if stop else None)
            for slot, count in asked.items()
        ]
        drafts = [drafter.propose(rows) for drafter in (single, rolled)]
        for row, ours, theirs in zip(rows, *drafts, strict=True):
            is_read = stop is not None and DRAFT_STOPS[stop[0]].needs_entropy  # else a step need not say it
            assert bits(ours, with_entropy=is_read) == bits(theirs, with_entropy=is_read)
            texts[row.slot] += [*ours.tokens[: num_accepted % (len(ours.tokens) + 1)].tolist(), 7]
