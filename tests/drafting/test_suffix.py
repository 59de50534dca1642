"""Suffix matches against a plain scan, the corpus within its bound and between threads, and who may use it."""

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.drafting import DraftRow, matches
from fly_trt.drafting.matches import BYTES_PER_TOKEN, END, LEAST_SHARE, SuffixCorpus, SuffixIndex
from fly_trt.drafting.suffix import Copies, SuffixDrafter
from fly_trt.verification import EXACT, AcceptancePolicy, DraftSource, TypicalPolicy
from loop_stack import make_request, make_stack
from table_engine import greedy, most_probable, spread_logits

FACTOR, MOST = 2.0, 15
NOTHING = ([], 0)


def scan(text: list[int], ending: list[int], factor: float = FACTOR, most: int = MOST) -> tuple[list[int], int]:
    """What followed in `text` where the longest end of `ending` occurred, before its end; and how long that is."""
    lengths = {}
    for place in range(len(text) - 1, 0, -1):
        length = 0
        while length < min(place, len(ending)) and text[place - 1 - length] == ending[-1 - length] != END:
            length += 1
        lengths[place] = length
    longest = max(lengths.values(), default=0)
    left = [place for place, length in lengths.items() if length == longest]
    text, draft, least = list(text), [], LEAST_SHARE * len(left)
    while longest and len(draft) < min(most, max(1, int(factor * longest))):
        tokens = [text[place] for place in left if text[place] != END]
        if not tokens or max(Counter(tokens).values()) < least:
            break
        draft.append(max(tokens, key=tokens.count))  # the first of equals: the latest place
        text.append(draft[-1])
        left = [place + 1 for place in left if text[place] == draft[-1]]
    return (draft, longest) if longest else NOTHING


def found(index: SuffixIndex | SuffixCorpus, ending: list[int], factor: float = FACTOR) -> tuple[list[int], int]:
    match = index.match(np.array(ending, np.int64), factor, MOST)
    return match.tokens.tolist(), match.length


def index_of(*parts: list[int]) -> SuffixIndex:
    index = SuffixIndex()
    for part in parts:
        index.extend(np.array(part, np.int64))
    return index


texts = st.lists(st.lists(st.integers(0, 3), max_size=20), min_size=1, max_size=6)


@pytest.mark.parametrize("block", [8, 20, 64])
def test_however_a_text_grows_the_longest_match_is_what_a_scan_finds(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matches, "BLOCK", block)
    monkeypatch.setattr(matches, "MAX_PLACES", 1000)
    monkeypatch.setattr(matches, "FIRST_CAPACITY", 8)

    @examples(200)
    @given(texts, st.sampled_from([0.5, 1, 2, 9]))
    def check(parts: list[list[int]], factor: float) -> None:
        index, text = index_of(), []
        for part in parts:
            index.extend(np.array(part, np.int64))
            text += part
            assert found(index, text, factor) == scan(text, text, factor)

    check()


def test_only_the_latest_places_of_a_common_token_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matches, "BLOCK", 8)
    monkeypatch.setattr(matches, "MAX_PLACES", 3)
    text = [9, 1, 5, *[1, 2] * 8, 7, 1]
    assert found(index_of(text), text) == ([2, 1], 1)
    assert found(index_of([8, *text, 8]), [*text, 8, 9, 1]) == ([5, 1, 2, 1, 2, 1], 3), (
        "a longer match has places of its own"
    )


def test_a_draft_is_as_long_as_its_match_is_worth() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3]
    assert found(index_of(text), text, 1) == ([4, 5], 2)
    assert found(index_of(text), text, 2.5) == ([4, 5, 6, 7, 8], 2)
    assert found(index_of(text), text, 0.1) == ([4], 2)


def test_the_most_frequent_continuation_is_taken_as_long_as_enough_places_agree() -> None:
    text = [1, 5, 6, 2, 1, 7, 3, 1, 5, 8, 4, 1, 5, 8, 0, 1]
    assert found(index_of(text), text, 9) == ([5, 8], 1), (
        "5 at three of four places, 8 at two, then none more than once"
    )


@examples(60)
@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=12), st.integers(1, 40))
def test_a_corpus_has_the_latest_outputs_that_fit(outputs: list[list[int]], max_tokens: int) -> None:
    corpus, kept = SuffixCorpus(max_tokens), []
    for output in outputs:
        corpus.add(np.array(output, np.int64))
        output = [*output[max(0, len(output) + 1 - max_tokens) :], END]
        if sum(map(len, kept)) + len(output) > max_tokens:
            while kept and sum(map(len, kept)) > max(0, max_tokens * 3 // 4 - len(output)):
                kept.pop(0)
        kept.append(output)
        assert len(corpus) == sum(map(len, kept)) <= max_tokens
        ending = [1, 2, 3, 0, 1]
        assert found(corpus, ending) == scan([token for one in kept for token in one], ending)


def test_a_corpus_never_takes_more_memory_than_it_says() -> None:
    rng, corpus, most = np.random.default_rng(0), SuffixCorpus(5000), 0
    for _ in range(60):
        corpus.add(rng.integers(0, 50_000, rng.integers(1, 700)))
        most = max(most, corpus.nbytes)
    assert most == 8192 * BYTES_PER_TOKEN
    assert BYTES_PER_TOKEN == 36, "as SpeculativeConfig says"


def test_a_corpus_may_be_used_by_any_number_of_threads() -> None:
    corpus, failures = SuffixCorpus(2000), []
    period = 7

    def use(first: int) -> None:
        try:
            for number in range(150):
                corpus.add(np.arange(first + number, first + number + 40) % period)
                match = corpus.match(np.arange(first, first + 8) % period, 2, 10)
                following = (first + 8 + np.arange(len(match.tokens))) % period
                assert match.tokens.tolist() == following.tolist(), "no output is seen half written"
                assert len(corpus) <= 2000
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- by slot ----------------------------------------------------------------------------------------------------------


def make_drafter(corpus_tokens: int = 1000) -> SuffixDrafter:
    return SuffixDrafter(Copies(FACTOR, MOST, SuffixCorpus(corpus_tokens) if corpus_tokens else None))


def propose(drafter: SuffixDrafter, tokens: list[int], count: int = 6, slot: int = 0, **row: object) -> list[int]:
    (draft,) = drafter.propose([DraftRow(slot, np.array(tokens), count, **row)])
    return draft.tokens.tolist()


def test_a_sequence_copies_what_an_earlier_one_emitted_and_says_so() -> None:
    drafter = make_drafter()
    assert propose(drafter, [1, 2, 3]) == []
    drafter.read_output(0, np.array([4, 5, 6, 7]))
    drafter.release(0)
    (draft,) = drafter.propose([DraftRow(0, np.array([8, 4, 5]), 6)])
    assert (draft.tokens.tolist(), set(draft.sources)) == ([6, 7], {DraftSource.CORPUS})


def test_its_own_text_comes_first_where_it_matches_as_well() -> None:
    drafter = make_drafter()
    drafter.read_output(0, np.array([4, 5, 6, 7]))
    (draft,) = drafter.propose([DraftRow(0, np.array([4, 5, 9, 4, 5]), 2)])
    assert (draft.tokens.tolist(), set(draft.sources)) == ([9, 4], {DraftSource.LOOKUP})


def test_a_private_row_and_a_corpus_of_no_tokens_see_the_sequence_alone() -> None:
    drafter, closed = make_drafter(), make_drafter(0)
    for one in (drafter, closed):
        one.read_output(0, np.array([4, 5, 6, 7]))
    assert propose(drafter, [8, 4, 5], is_private=True) == []
    assert propose(closed, [8, 4, 5]) == []


def test_a_round_goes_on_with_its_draft_whatever_is_committed_or_comes_to_the_corpus() -> None:
    drafter = make_drafter()
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    whole = propose(drafter, text, 9)
    assert whole == [3, 4, 5, 6]
    drafter.read_output(1, np.array([1, 2, 3, 9, 9]))
    assert propose(drafter, text, 2) == whole[:2]
    assert propose(drafter, [*text, 3], 9, round_start=len(text)) == whole[1:]
    assert propose(drafter, [*text, *whole], 9, round_start=len(text)) == []


def test_sequences_take_their_text_along_and_leave_it_when_they_end() -> None:
    drafter = make_drafter(0)
    assert propose(drafter, [1, 2, 1], slot=0) == [2, 1]
    assert propose(drafter, [7, 8, 7], slot=2) == [8, 7]
    drafter.swap(0, 2)
    assert propose(drafter, [1, 2, 1, 2], 1, slot=2) == [1]
    assert propose(drafter, [7, 8, 7, 8], 1, slot=0) == [7]
    drafter.release(0)
    assert propose(drafter, [5, 6, 5], slot=0) == [6, 5]
    drafter.reset()
    assert propose(drafter, [3, 4], slot=2) == []


def test_how_a_text_grew_makes_no_difference() -> None:
    """A private row's draft must follow from its text."""
    rng = np.random.default_rng(5)
    text = [*rng.integers(0, 3, 150), *[1, 2] * 60]
    whole = index_of(text)
    for _ in range(5):
        cuts = np.sort(rng.integers(0, len(text), 12))
        parts = index_of(*[part.tolist() for part in np.split(np.array(text), cuts)])
        for ending in ([0], [1, 2], [2, 2, 1], text):
            assert found(parts, ending) == found(whole, ending)


@pytest.mark.parametrize("salt", range(6))
def test_whatever_the_corpus_holds_a_loose_request_has_its_own_text_and_an_exact_one_plain_decodings(salt: int) -> None:
    logits = spread_logits(salt, 3)
    target = most_probable(logits)
    prompt = np.random.default_rng(salt).integers(2, 5, 20).tolist()

    def served(policy: AcceptancePolicy, others: tuple[int, ...] = (), **settings: Any) -> list[int]:
        stack = make_stack(target, make_drafter(500), logits=logits, num_slots=4, num_draft_tokens=6, **settings)
        stack.run(*[make_request(prompt[:length], request_id=str(length), max_tokens=30) for length in others])
        request = make_request(prompt, policy=policy, ignore_eos=True, max_tokens=16)
        stack.run(request)
        return request.output_token_ids

    loose = TypicalPolicy(use_full_entropy=True, threshold=0.02)
    alone = served(loose)
    for others, lengths in (((20, 11), [6]), ((20, 19, 7), [2, 0]), ((), [1])):
        assert served(loose, others, draft_lengths=lengths) == alone
        assert served(EXACT, others, draft_lengths=lengths) == greedy(target, prompt, 16)
