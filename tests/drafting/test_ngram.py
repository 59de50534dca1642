"""The incremental n-gram index against a plain scan for the earliest, longest match."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fly_trt.drafting import DraftRow
from fly_trt.drafting.ngram import NgramDrafter, NgramIndex

MAX_N, MIN_N = 4, 1


def scan(tokens: list[int], num_tokens: int, max_n: int = MAX_N, min_n: int = MIN_N) -> list[int]:
    for n in range(max_n, min_n - 1, -1):
        for start in range(len(tokens) - n):
            if n <= len(tokens) and tokens[start : start + n] == tokens[len(tokens) - n :]:
                return tokens[start + n : start + n + num_tokens]
    return []


def test_the_docstrings_example_holds() -> None:
    index = NgramIndex(4, 1)
    index.extend([1, 2, 3, 4, 1, 2, 3])
    assert index.propose(6).tolist() == [4, 1, 2, 3]


def test_the_earliest_of_several_matches_is_copied() -> None:
    index = NgramIndex(4, 1)
    index.extend([5, 8, 5, 9, 5])
    assert index.propose(2).tolist() == [8, 5]


def test_a_token_that_never_occurred_before_proposes_nothing() -> None:
    index = NgramIndex(4, 1)
    index.extend([1, 2, 3])
    assert index.propose(6).tolist() == []
    assert NgramIndex(4, 1).propose(6).tolist() == []


def test_the_shortest_match_can_be_limited() -> None:
    index = NgramIndex(4, 2)
    index.extend([1, 2, 3, 4, 2])
    assert index.propose(6).tolist() == []
    index.extend([3])
    assert index.propose(6).tolist() == [4, 2, 3]


@given(st.data())
def test_any_history_of_additions_and_rewinds_finds_what_a_scan_finds(data: st.DataObject) -> None:
    index, tokens = NgramIndex(MAX_N, MIN_N), []
    for _ in range(data.draw(st.integers(1, 8))):
        if tokens and data.draw(st.booleans()):
            length = data.draw(st.integers(0, len(tokens)))
            index.truncate(length)
            tokens = tokens[:length]
        more = data.draw(st.lists(st.integers(0, 3), max_size=10))
        index.extend(more)
        tokens += more
        num_tokens = data.draw(st.integers(1, 8))
        assert index.propose(num_tokens).tolist() == scan(tokens, num_tokens)
        assert len(index) == len(tokens)


def propose(drafter: NgramDrafter, slot: int, tokens: list[int], num_tokens: int) -> list[int]:
    (draft,) = drafter.propose([DraftRow(slot, np.array(tokens), num_tokens)])
    return draft.tokens.tolist()


def test_each_slot_has_its_own_sequence_until_it_is_released() -> None:
    drafter = NgramDrafter(4, 1)
    rows = [DraftRow(0, np.array([1, 2, 3, 1]), 2), DraftRow(1, np.array([7, 8, 7]), 2)]
    assert [draft.tokens.tolist() for draft in drafter.propose(rows)] == [[2, 3], [8, 7]]
    drafter.release(0)
    assert propose(drafter, 0, [4, 1], 2) == []
    assert propose(drafter, 1, [7, 8, 7, 9, 8], 1) == [7]


def test_sequences_that_change_slots_take_their_matches_along() -> None:
    drafter = NgramDrafter(4, 1)
    assert propose(drafter, 0, [1, 2, 3, 1], 1) == [2]
    assert propose(drafter, 2, [7, 8, 7], 1) == [8]
    drafter.swap(0, 2)
    assert propose(drafter, 2, [1, 2, 3, 1, 2], 1) == [3]
    assert propose(drafter, 0, [7, 8, 7, 8], 1) == [7]
    drafter.swap(0, 1)
    assert propose(drafter, 1, [7, 8, 7, 8, 9, 8], 1) == [7]
    assert propose(drafter, 0, [5, 6, 5], 1) == [6]
    drafter.swap(0, 3)
    assert propose(drafter, 3, [5, 6, 5], 1) == [6]


def test_a_copied_beginning_is_matched_like_ones_own() -> None:
    drafter = NgramDrafter(4, 1)
    propose(drafter, 0, [1, 2, 3, 4], 1)
    drafter.copy(0, 1, 3)
    assert propose(drafter, 1, [1, 2, 3, 9, 1, 2], 2) == [3, 9]


def test_preparing_changes_no_proposal() -> None:
    drafter = NgramDrafter(4, 1)
    row = DraftRow(0, np.array([1, 2, 3, 1]), 2)
    drafter.prepare([row])
    drafter.prepare([row])
    assert drafter.propose([row])[0].tokens.tolist() == [2, 3]
