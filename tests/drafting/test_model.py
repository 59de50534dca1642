"""The model drafter on a table engine: its text is the draft's greedy text, however it gets there."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_trt.drafting import Lookup, ModelDrafter
from table_engine import VOCAB_SIZE, TableEngine, greedy, hashed

LOOKUPS = [None, Lookup(max_n=4, min_n=1, num_tokens=6), Lookup(max_n=2, min_n=2, num_tokens=3)]


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_drafts_are_the_drafts_greedy_text_after_any_corrections(lookup: Lookup | None) -> None:
    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(2, 7)), max_size=8), st.integers(0, 3))
    def check(corrections: list[tuple[int, int]], salt: int) -> None:
        language = hashed(8, salt)
        drafter = ModelDrafter(TableEngine(language), VOCAB_SIZE, lookup)
        tokens = [3, 4, 5, 3, 4]
        for num_accepted, correction in corrections:
            draft = drafter.propose(0, np.array(tokens), 9)
            assert draft.tolist() == greedy(language, tokens, 9)
            tokens += [*draft[:num_accepted].tolist(), correction]

    check()


def test_lookup_saves_steps_on_repetitive_text() -> None:
    cycle = {(2 + i): 2 + (i + 1) % 6 for i in range(6)}
    engines = [TableEngine(lambda tokens: cycle[tokens[-1]]) for _ in range(2)]
    prompt = np.array([2, 3, 4, 5, 6, 7, 2])
    plain = ModelDrafter(engines[0], VOCAB_SIZE).propose(0, prompt, 15)
    multi_level = ModelDrafter(engines[1], VOCAB_SIZE, LOOKUPS[1]).propose(0, prompt, 15)
    assert plain.tolist() == multi_level.tolist()
    assert (engines[0].num_runs, engines[1].num_runs) == (15, 3)


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    language = hashed(16, 1)
    engine = TableEngine(language, max_num_tokens=16)
    prompt = list(range(2, 30)) * 2
    draft = ModelDrafter(engine, VOCAB_SIZE).propose(0, np.array(prompt), 3)
    assert draft.tolist() == greedy(language, prompt, 3)
    assert engine.num_runs == 3 + 3


def test_a_draft_token_that_the_target_does_not_know_ends_the_draft() -> None:
    language = greedy_counter(limit=40)
    drafter = ModelDrafter(TableEngine(language, vocab_size=48), target_vocab_size=35)
    assert drafter.propose(0, np.array([30, 31]), 8).tolist() == [32, 33, 34]


def test_a_target_token_that_the_draft_does_not_know_is_no_error() -> None:
    drafter = ModelDrafter(TableEngine(hashed(16, 0), vocab_size=16), target_vocab_size=32)
    assert len(drafter.propose(0, np.array([3, 31, 4]), 5)) == 5


def test_a_looked_up_token_that_the_draft_does_not_know_is_not_proposed_to_it() -> None:
    drafter = ModelDrafter(TableEngine(hashed(10, 0), vocab_size=10), target_vocab_size=20, lookup=LOOKUPS[1])
    assert len(drafter.propose(0, np.array([5, 15, 3, 5]), 6)) == 6


def test_a_lookup_longer_than_a_step_still_drafts() -> None:
    language = hashed(8, 5)
    engine = TableEngine(language, max_num_tokens=40)
    prompt = [2 + i % 6 for i in range(100)]
    drafter = ModelDrafter(engine, VOCAB_SIZE, Lookup(max_n=4, min_n=1, num_tokens=600))
    assert drafter.propose(0, np.array(prompt), 9).tolist() == greedy(language, prompt, 9)


def test_a_released_slot_starts_anew() -> None:
    language = hashed(8, 2)
    drafter = ModelDrafter(TableEngine(language), VOCAB_SIZE, LOOKUPS[1])
    drafter.propose(0, np.array([2, 3, 4, 5, 6]), 9)
    drafter.release(0)
    assert drafter.propose(0, np.array([6, 5]), 9).tolist() == greedy(language, [6, 5], 9)


def greedy_counter(limit: int):
    return lambda tokens: min(tokens[-1] + 1, limit)
