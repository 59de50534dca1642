"""The self-drafter on table engines: which of its drafts a sequence has, and that slots keep it."""

from collections.abc import Sequence

import numpy as np
import pytest

from fly_trt.drafting import DRAFTERS, DraftParts, DraftRow
from fly_trt.drafting.self_draft import SelfDrafter, self_draft
from fly_trt.engines import Engine
from fly_trt.params import SpeculativeConfig
from table_engine import VOCAB_SIZE, NextToken, TableEngine, greedy, hashed

SHORT, LONG = [3, 4, 5], [3, 4, 5, 6, 7, 8, 9]
LEAST = 6
LANGUAGES = hashed(8, 1), hashed(8, 2)


def make_drafter(*engines: tuple[int, Engine], reuse_cache: bool = True) -> SelfDrafter:
    def no_draft_model() -> Engine:
        raise AssertionError("a self-draft needs no draft model")

    parts = DraftParts(no_draft_model, VOCAB_SIZE, reuse_cache, lambda: engines)
    drafter = self_draft(SpeculativeConfig(method="self"), parts)
    assert DRAFTERS["self"].make is self_draft
    return drafter


@pytest.fixture
def engines() -> tuple[TableEngine, TableEngine]:
    return TableEngine(LANGUAGES[0]), TableEngine(LANGUAGES[1])


@pytest.fixture
def drafter(engines: tuple[TableEngine, TableEngine]) -> SelfDrafter:
    return make_drafter((0, engines[0]), (LEAST, engines[1]))


def propose(drafter: SelfDrafter, rows: dict[int, Sequence[int]], num_tokens: int = 4) -> list[list[int]]:
    drafts = drafter.propose([DraftRow(slot, np.array(tokens), num_tokens) for slot, tokens in rows.items()])
    return [draft.tokens.tolist() for draft in drafts]


def check(drafter: SelfDrafter, rows: dict[int, tuple[Sequence[int], NextToken]]) -> None:
    drafts = propose(drafter, {slot: tokens for slot, (tokens, _) in rows.items()})
    assert drafts == [greedy(language, list(tokens), 4) for tokens, language in rows.values()]


def test_the_length_at_the_start_chooses_and_stays(drafter: SelfDrafter) -> None:
    check(drafter, {0: (SHORT, LANGUAGES[0]), 1: (LONG, LANGUAGES[1]), 2: (LONG[:LEAST], LANGUAGES[1])})
    check(drafter, {0: (SHORT + LONG, LANGUAGES[0])})
    drafter.release(0)
    check(drafter, {0: (LONG, LANGUAGES[1])})
    drafter.reset()
    check(drafter, {1: (SHORT, LANGUAGES[0])})


def test_sequences_of_one_draft_are_drafted_together(
    drafter: SelfDrafter, engines: tuple[TableEngine, TableEngine]
) -> None:
    rows = {0: (SHORT, LANGUAGES[0]), 1: (LONG, LANGUAGES[1]), 2: (SHORT[::-1], LANGUAGES[0])}
    check(drafter, rows)
    assert all(rows == 3 for _, rows, _ in engines[0].shapes)
    assert all(rows == 1 for _, rows, _ in engines[1].shapes)


def test_slots_keep_their_draft_when_they_change_places(drafter: SelfDrafter) -> None:
    check(drafter, {0: (SHORT, LANGUAGES[0]), 2: (LONG, LANGUAGES[1])})
    drafter.swap(0, 2)
    check(drafter, {2: (SHORT + LONG, LANGUAGES[0]), 0: ([*LONG, 5], LANGUAGES[1])})


@pytest.mark.parametrize("length", [LEAST - 1, LEAST + 4])
def test_a_copy_chooses_by_its_own_length_and_reads_only_what_is_new(
    drafter: SelfDrafter, engines: tuple[TableEngine, TableEngine], length: int
) -> None:
    original = [3, 4, 5, 6, 7]
    check(drafter, {0: (original, LANGUAGES[0])})
    tokens = (original + LONG)[:length]
    drafter.copy(0, 1, len(original))
    is_long = length >= LEAST
    assert drafter.num_unread(1, length) == length  # nothing of it has been asked for
    check(drafter, {1: (tokens, LANGUAGES[is_long])})
    assert engines[0].copies == [(0, 1, len(original))]


def test_what_is_unread_is_that_of_the_draft_that_the_sequence_has_or_would_have(drafter: SelfDrafter) -> None:
    assert drafter.num_unread(0, len(SHORT)) == len(SHORT)
    assert drafter.num_unread(0, len(LONG)) == len(LONG)
    propose(drafter, {0: SHORT, 1: LONG})
    assert drafter.num_unread(0, len(SHORT) + 20) <= 21
    assert drafter.num_unread(1, len(LONG)) <= 1
    assert drafter.num_preparations > 0


def test_neighbours_with_one_engine_are_one_draft(engines: tuple[TableEngine, TableEngine]) -> None:
    drafter = make_drafter((0, engines[0]), (4, engines[0]), (LEAST, engines[1]))
    propose(drafter, {0: SHORT, 1: LONG[:5]})
    assert len(engines[0].shapes) > 0
    assert all(rows == 2 for _, rows, _ in engines[0].shapes)


def test_it_forgets_with_its_engines(drafter: SelfDrafter, engines: tuple[TableEngine, TableEngine]) -> None:
    propose(drafter, {0: SHORT, 1: LONG})
    drafter.trim(8)
    assert [engine.trims for engine in engines] == [[8], [8]]
    check(drafter, {0: (SHORT, LANGUAGES[0]), 1: (LONG, LANGUAGES[1])})


def test_the_prompt_chooses_however_late_the_first_draft_is_asked_for(drafter: SelfDrafter) -> None:
    """A loose request may pause before it drafts, for as long as the load says."""
    row = DraftRow(0, np.array(LONG), 4, num_prompt=len(SHORT))
    assert drafter.propose([row])[0].tokens.tolist() == greedy(LANGUAGES[0], LONG, 4)
