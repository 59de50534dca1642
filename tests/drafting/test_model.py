"""The model drafter on a table engine: its text is the draft's greedy text, however it gets there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.drafting import DraftRow, Level, Lookup, ModelDrafter
from loop_stack import CheckedModelDrafter
from rolling_engine import RollingEngine
from table_engine import VOCAB_SIZE, NextToken, TableEngine, greedy, hashed, sometimes_differs

LANGUAGE = hashed(8, 1)
PROMPT = [3, 4, 5] * 10
LOOKUPS = [None, Lookup(max_n=4, min_n=1, num_tokens=6), Lookup(max_n=2, min_n=2, num_tokens=3)]


def inner_model(language: NextToken, lookup: Lookup | None, num_tokens: int, **settings: Any) -> Level:
    """A smaller draft model that is wrong at one prefix in five guesses for the one that speaks the language. What it
    guesses is checked to be its own greedy text, which the text of the other does not show."""
    smaller = sometimes_differs(language, salt=1)
    engine = TableEngine(smaller, trim_block=settings.pop("trim_block", None))
    return Level(CheckedModelDrafter(smaller, engine, VOCAB_SIZE, lookup, **settings), num_tokens)


def make_drafter(
    language: NextToken, lookup: Lookup | None = None, **settings: Any
) -> tuple[TableEngine, ModelDrafter]:
    engine = TableEngine(language, max_num_tokens=settings.pop("max_num_tokens", 16), vocab_size=VOCAB_SIZE)
    return engine, ModelDrafter(engine, VOCAB_SIZE, lookup, **settings)


def propose(drafter: ModelDrafter, tokens: list[int], num_tokens: int, slot: int = 0) -> list[int]:
    (draft,) = drafter.propose([DraftRow(slot, np.array(tokens), num_tokens)])
    return draft.tokens.tolist()


def steps_of(engine: TableEngine, action: Callable[[], object]) -> list[tuple[int, int, int]]:
    before = engine.num_runs
    action()
    return engine.shapes[before:]


def test_of_what_the_draft_model_reads_it_speaks_of_the_last_token_alone() -> None:
    engine, drafter = make_drafter(LANGUAGE)
    assert propose(drafter, PROMPT, 5) == greedy(LANGUAGE, PROMPT, 5)
    assert propose(drafter, [*PROMPT, 3, 4], 5) == greedy(LANGUAGE, [*PROMPT, 3, 4], 5)
    assert {tokens for _, _, tokens in engine.shapes} > {1}
    assert set(engine.num_positions) == {1}


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_drafts_are_the_drafts_greedy_text_after_any_corrections(lookup: Lookup | None) -> None:
    @examples(40)
    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(2, 7)), max_size=8), st.integers(0, 3))
    def check(corrections: list[tuple[int, int]], salt: int) -> None:
        language = hashed(8, salt)
        drafter = ModelDrafter(TableEngine(language), VOCAB_SIZE, lookup)
        tokens = [3, 4, 5, 3, 4]
        for num_accepted, correction in corrections:
            draft = propose(drafter, tokens, 9)
            assert draft == greedy(language, tokens, 9)
            tokens += [*draft[:num_accepted], correction]

    check()


# --- several sequences at once ----------------------------------------------------------------------------------------

NUM_SLOTS = 4


class Sequences:
    """What a loop does with the slots of a drafter, and what the drafts must be: the draft model's greedy text."""

    def __init__(
        self,
        lookup: Lookup | None,
        inner: int,
        salt: int,
        *,
        reuse_cache: bool,
        trim_block: int | None,
        has_rollouts: bool,
    ) -> None:
        """inner: tokens that a smaller draft model guesses at a time; without one the lookup guesses."""
        self.language = hashed(8, salt, order=30)
        make = RollingEngine if has_rollouts else TableEngine
        self.engine = make(self.language, max_batch_size=NUM_SLOTS, trim_block=trim_block)
        level: Level | Lookup | None = lookup
        if inner:
            level = inner_model(self.language, lookup, inner, reuse_cache=reuse_cache, trim_block=trim_block)
        self.drafter = ModelDrafter(self.engine, VOCAB_SIZE, level, reuse_cache=reuse_cache)
        self.tokens: dict[int, list[int]] = {}

    def start(self, slot: int, tokens: list[int]) -> None:
        if slot in self.tokens:
            self.drafter.release(slot)
        self.tokens[slot] = list(tokens)

    def lend(self, source: int, slot: int, length: int, tail: list[int]) -> None:
        if source not in self.tokens or source == slot:
            return
        tokens = self.tokens[source][:length]
        self.start(slot, tokens + tail)
        self.drafter.copy(source, slot, len(tokens))

    def swap(self, first: int, second: int) -> None:
        if first == second:
            return
        self.drafter.swap(first, second)
        held = {second: self.tokens.pop(first, None), first: self.tokens.pop(second, None)}
        self.tokens |= {slot: tokens for slot, tokens in held.items() if tokens is not None}

    def trim(self) -> None:
        self.drafter.trim(max(map(len, self.tokens.values()), default=0))

    def draft(self, asked: dict[int, int], num_accepted: int, correction: int, *, prepared: bool) -> None:
        rows = [
            DraftRow(slot, np.array(self.tokens[slot]), count)
            for slot, count in sorted(asked.items())
            if slot in self.tokens
        ]
        if not rows:
            return
        if prepared:
            self.drafter.prepare(rows)
        for row, draft in zip(rows, self.drafter.propose(rows), strict=True):
            tokens = self.tokens[row.slot]
            assert draft.tokens.tolist() == greedy(self.language, tokens, row.num_tokens)
            accepted = draft.tokens[: (num_accepted + row.slot) % (row.num_tokens + 1)].tolist()
            tokens += accepted
            if len(accepted) < row.num_tokens:
                tokens.append(correction)


slots = st.integers(0, NUM_SLOTS - 1)
texts = st.lists(st.integers(2, 7), min_size=1, max_size=30)
actions = st.one_of(
    st.tuples(st.just("start"), slots, texts),
    st.tuples(st.just("lend"), slots, slots, st.integers(1, 30), st.lists(st.integers(2, 7), min_size=1, max_size=4)),
    st.tuples(st.just("swap"), slots, slots),
    st.tuples(st.just("trim")),
    st.tuples(
        st.just("draft"), st.dictionaries(slots, st.integers(1, 9)), st.integers(0, 9), st.integers(2, 7), st.booleans()
    ),
)


@examples(100)
@given(
    lookup=st.sampled_from(LOOKUPS),
    inner=st.sampled_from([0, 0, 2, 5, 15]),
    salt=st.integers(0, 5),
    reuse_cache=st.booleans(),
    trim_block=st.sampled_from([None, 1, 8]),
    has_rollouts=st.booleans(),
    first=st.lists(texts, min_size=NUM_SLOTS, max_size=NUM_SLOTS),
    todo=st.lists(actions, max_size=14),
)
def test_whatever_happens_to_the_slots_each_row_gets_the_drafts_greedy_text(
    lookup: Lookup | None,
    inner: int,
    salt: int,
    reuse_cache: bool,
    trim_block: int | None,
    has_rollouts: bool,
    first: list,
    todo: list,
) -> None:
    settings = {"reuse_cache": reuse_cache, "trim_block": trim_block, "has_rollouts": has_rollouts}
    sequences = Sequences(lookup, inner, salt, **settings)
    for slot, tokens in enumerate(first):
        sequences.start(slot, tokens)
    for name, *arguments in todo:
        if name == "draft":
            *most, prepared = arguments
            sequences.draft(*most, prepared=prepared)
        else:
            getattr(sequences, name)(*arguments)
    sequences.draft(dict.fromkeys(range(NUM_SLOTS), 5), 0, 2, prepared=False)


def test_rows_share_their_steps() -> None:
    engine, drafter = make_drafter(hashed(8, 1))
    rows = [DraftRow(slot, np.array([slot + 2, 3, 4]), 10) for slot in range(4)]
    assert steps_of(engine, lambda: drafter.propose(rows)) == [(0, 4, 3), *[(0, 4, 1)] * 9]


def test_a_row_that_wants_less_leaves_the_later_steps_to_the_others() -> None:
    language = hashed(8, 1)
    engine, drafter = make_drafter(language)
    rows = [DraftRow(slot, np.array([slot + 2, 3]), count) for slot, count in enumerate((2, 6, 4))]
    drafts = []
    steps = steps_of(engine, lambda: drafts.extend(drafter.propose(rows)))
    assert steps == [(0, 3, 2), (0, 3, 1), (1, 2, 1), (1, 2, 1), (1, 1, 1), (1, 1, 1)]
    assert [draft.tokens.tolist() for draft in drafts] == [
        greedy(language, row.tokens.tolist(), row.num_tokens) for row in rows
    ]


def test_a_row_between_those_asked_for_keeps_its_sequence() -> None:
    language = hashed(8, 1, order=30)
    engine, drafter = make_drafter(language)
    texts = [[2, 3, 4], [4, 3, 2], [5, 6, 7]]
    drafter.propose([DraftRow(slot, np.array(text), 4) for slot, text in enumerate(texts)])
    for slot in (0, 2):
        texts[slot] = [*greedy(language, texts[slot], 4), 7]
    drafter.propose([DraftRow(slot, np.array(texts[slot]), 4) for slot in (0, 2)])
    follow_up = [*texts[1], *greedy(language, texts[1], 4)]
    steps = steps_of(engine, lambda: propose(drafter, follow_up, 3, slot=1))
    assert steps == [(1, 1, 1)] * 3, "nothing of the sequence is read again"
    assert propose(drafter, follow_up, 3, slot=1) == greedy(language, follow_up, 3)


def test_a_long_prompt_does_not_pad_the_other_rows() -> None:
    engine, drafter = make_drafter(hashed(8, 1), max_num_tokens=64)
    rows = [DraftRow(0, np.array([2, 3]), 4), DraftRow(1, np.arange(40) % 6 + 2, 4)]
    assert steps_of(engine, lambda: drafter.propose(rows)) == [(1, 1, 40), (0, 2, 2), (0, 2, 1), (0, 2, 1), (0, 1, 1)]


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_preparing_reads_the_prompts_and_changes_no_draft(lookup: Lookup | None) -> None:
    language = hashed(8, 1)
    engine, drafter = make_drafter(language, lookup)
    prompts = [[2 + (slot + i) % 6 for i in range(50)] for slot in range(2)]
    rows = [DraftRow(slot, np.array(prompt), 5) for slot, prompt in enumerate(prompts)]
    drafter.prepare(rows)
    drafts: list[np.ndarray] = []
    steps = steps_of(engine, lambda: drafts.extend(drafter.propose(rows)))
    assert sum(num_rows * num_tokens for _, num_rows, num_tokens in steps) < 50
    assert [draft.tokens.tolist() for draft in drafts] == [greedy(language, prompt, 5) for prompt in prompts]


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_asking_again_for_more_goes_on_with_the_same_draft(lookup: Lookup | None) -> None:
    language = hashed(8, 1)
    engine, drafter = make_drafter(language, lookup)
    tokens = [3, 4, 5]
    assert propose(drafter, tokens, 3) == greedy(language, tokens, 3)
    steps = steps_of(engine, lambda: propose(drafter, tokens, 8))
    assert len(steps) <= 5
    assert propose(drafter, tokens, 8) == greedy(language, tokens, 8)
    assert steps_of(engine, lambda: propose(drafter, tokens, 8)) == []


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_after_a_part_was_committed_the_draft_goes_on(lookup: Lookup | None) -> None:
    language = hashed(8, 1)
    engine, drafter = make_drafter(language, lookup)
    tokens = [3, 4, 5]
    tokens += propose(drafter, tokens, 6)[:4]
    assert steps_of(engine, lambda: propose(drafter, tokens, 2)) == []
    assert propose(drafter, tokens, 4) == greedy(language, tokens, 4)


# --- sequences that end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("reuse_cache", [False, True])
def test_the_text_of_a_sequence_that_ended_is_no_draft(lookup: Lookup | None, reuse_cache: bool) -> None:
    language = hashed(8, 2)
    _, drafter = make_drafter(language, lookup, reuse_cache=reuse_cache)
    prompt = [2, 3, 4, 5, 6]
    answer = [(token - 1) % 6 + 2 for token in greedy(language, prompt, 12)]
    propose(drafter, prompt + answer, 4)
    drafter.release(0)
    assert propose(drafter, prompt, 9) == greedy(language, prompt, 9) != answer[:9]


@pytest.mark.parametrize(("reuse_cache", "positions"), [(False, 30), (True, 10)])
def test_what_the_slot_still_holds_of_a_prompt_is_read_only_where_reuse_is_off(
    reuse_cache: bool, positions: int
) -> None:
    engine, drafter = make_drafter(hashed(8, 2), reuse_cache=reuse_cache, max_num_tokens=64)
    prompt = [2 + i % 6 for i in range(20)]
    propose(drafter, [*prompt, 2, 2, 2], 1)
    drafter.release(0)
    steps = steps_of(engine, lambda: propose(drafter, [*prompt, *range(3, 13)], 1))
    assert sum(num_tokens for _, _, num_tokens in steps) == positions


def test_a_copied_beginning_is_not_read_again() -> None:
    language = hashed(8, 2, order=30)
    engine, drafter = make_drafter(language, max_num_tokens=64)
    prompt = [2 + i % 6 for i in range(40)]
    propose(drafter, prompt, 3, slot=2)
    drafter.copy(2, 0, 30)
    tokens = [*prompt[:30], 7, 7]
    drafts = []
    assert steps_of(engine, lambda: drafts.extend(propose(drafter, tokens, 1))) == [(0, 1, 2)]
    assert drafts == greedy(language, tokens, 1)


def test_a_copy_of_a_slot_that_never_drafted_is_no_error() -> None:
    language = hashed(8, 2)
    _, drafter = make_drafter(language)
    drafter.copy(1, 0, 3)
    assert propose(drafter, [2, 3, 4, 5], 4) == greedy(language, [2, 3, 4, 5], 4)


def test_a_released_slot_starts_anew() -> None:
    language = hashed(8, 2)
    _, drafter = make_drafter(language, LOOKUPS[1])
    propose(drafter, [2, 3, 4, 5, 6], 9)
    drafter.release(0)
    assert propose(drafter, [6, 5], 9) == greedy(language, [6, 5], 9)


# --- steps and vocabularies -------------------------------------------------------------------------------------------


def test_lookup_saves_steps_on_repetitive_text() -> None:
    cycle = {(2 + i): 2 + (i + 1) % 6 for i in range(6)}
    engines = [TableEngine(lambda tokens: cycle[tokens[-1]]) for _ in range(2)]
    prompt = [2, 3, 4, 5, 6, 7, 2]
    plain = propose(ModelDrafter(engines[0], VOCAB_SIZE), prompt, 15)
    multi_level = propose(ModelDrafter(engines[1], VOCAB_SIZE, LOOKUPS[1]), prompt, 15)
    assert plain == multi_level
    assert (engines[0].num_runs, engines[1].num_runs) == (15, 3)


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    language = hashed(16, 1)
    engine = TableEngine(language, max_num_tokens=16)
    prompt = list(range(2, 30)) * 2
    assert propose(ModelDrafter(engine, VOCAB_SIZE), prompt, 3) == greedy(language, prompt, 3)
    assert engine.num_runs == 3 + 3


def test_a_draft_token_that_the_target_does_not_know_ends_the_draft() -> None:
    language = greedy_counter(limit=40)
    drafter = ModelDrafter(TableEngine(language, vocab_size=48), target_vocab_size=35)
    assert propose(drafter, [30, 31], 8) == [32, 33, 34]


def test_a_target_token_that_the_draft_does_not_know_is_no_error() -> None:
    drafter = ModelDrafter(TableEngine(hashed(16, 0), vocab_size=16), target_vocab_size=32)
    assert len(propose(drafter, [3, 31, 4], 5)) == 5


def test_a_looked_up_token_that_the_draft_does_not_know_is_not_proposed_to_it() -> None:
    drafter = ModelDrafter(TableEngine(hashed(10, 0), vocab_size=10), 20, LOOKUPS[1])
    assert len(propose(drafter, [5, 15, 3, 5], 6)) == 6


def test_a_lookup_longer_than_a_step_still_drafts() -> None:
    language = hashed(8, 5)
    engine = TableEngine(language, max_num_tokens=40)
    prompt = [2 + i % 6 for i in range(100)]
    drafter = ModelDrafter(engine, VOCAB_SIZE, Lookup(max_n=4, min_n=1, num_tokens=600))
    assert propose(drafter, prompt, 9) == greedy(language, prompt, 9)


def greedy_counter(limit: int) -> NextToken:
    return lambda tokens: min(tokens[-1] + 1, limit)
