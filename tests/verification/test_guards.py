"""What no rule may loosen, and the regions of a text in which nothing is."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_trt import ConfigError
from fly_trt.verification import (
    DraftSource,
    Evidence,
    Guards,
    GuardSettings,
    Limits,
    Positions,
    Verdict,
    check_regions,
    make_guards,
)
from fly_trt.verification.regions import make_region

NUM_DRAFT = 8
# Text of the tokens 0 .. 9, letters but for these.
TEXTS = ["a", "b", "c", "d", "e", "f", "g", "7", "```", "{"]


def piece(token: int) -> str:
    return TEXTS[token]


def evidence(draft: Sequence[int], choices: Sequence[int], sources: Sequence[int] | None = None) -> Evidence:
    """A round that was verified whole."""
    said = Positions(np.array(choices), *np.full((4, len(choices)), -1.0, np.float32))
    kinds = np.array(sources if sources is not None else [DraftSource.MODEL] * len(draft), np.uint8)
    return Evidence(len(draft), draft=np.array(draft), sources=kinds, target=said)


def everything(seen: Evidence) -> Verdict:
    """What a rule says that accepts whatever it is shown."""
    return Verdict(len(seen.draft), int(seen.choices[-1]))


def limited(seen: Evidence, limits: Limits) -> Verdict:
    return limits.apply(everything(seen), seen)


@pytest.fixture
def round_() -> Evidence:
    """Draft tokens 1, 3 and 5 are not the target's choices."""
    return evidence([0, 1, 2, 3, 4, 5, 6, 0], [0, 2, 2, 4, 4, 6, 6, 0, 1])


@pytest.mark.parametrize(
    ("never", "stops_at"), [(set(), 8), ({1}, 1), ({2}, 1), ({3}, 3), ({5}, 5), ({6}, 5), ({0}, 8), ({9}, 8)]
)
def test_a_stop_token_is_loosened_neither_as_a_draft_token_nor_as_a_choice(
    round_: Evidence, never: set[int], stops_at: int
) -> None:
    want = Verdict(stops_at, int(round_.choices[stops_at]))
    assert limited(round_, Limits(frozenset(never))) == want


def test_a_token_without_probability_is_not_loosened(round_: Evidence) -> None:
    round_.target.draft_logprob[3] = -np.inf
    assert limited(round_, Limits(frozenset())) == Verdict(3, 4)
    round_.target.draft_logprob[3] = np.nan  # which promises nothing
    assert limited(round_, Limits(frozenset())).num_accepted == NUM_DRAFT


@pytest.mark.parametrize(("exact_copies", "ends"), [(False, [8, 8, 3, 3]), (True, [8, 3, 3, 3])])
def test_copies_of_others_and_forced_tokens_are_never_loosened_and_own_copies_where_a_model_drafts_too(
    exact_copies: bool, ends: list[int]
) -> None:
    for source, end in zip(DraftSource, ends, strict=True):
        sources = [DraftSource.MODEL] * 3 + [source] * 5
        seen = evidence([0, 1, 2, 3, 4, 5, 6, 0], [0, 2, 2, 4, 4, 6, 6, 0, 1], sources)
        assert limited(seen, Limits(frozenset(), exact_copies=exact_copies)).num_accepted == end


def guarded(seen: Evidence, output: Sequence[int] = (), **settings: object) -> Verdict:
    guards = make_guards(GuardSettings(**settings), piece)
    assert guards is not None
    guards.start_round(list(output))
    return limited(seen, Limits(frozenset(), guards))


@pytest.mark.parametrize(("first", "num_output", "end"), [(0, 0, 8), (1, 0, 8), (2, 0, 1), (3, 2, 8), (6, 2, 1)])
def test_the_first_tokens_of_the_output_are_exact(round_: Evidence, first: int, num_output: int, end: int) -> None:
    if not first:
        assert make_guards(GuardSettings(exact_first=0), piece) is None
    else:
        assert guarded(round_, [0] * num_output, exact_first=first).num_accepted == end


def test_tokens_that_are_named_are_neither_loosened_nor_replaced(round_: Evidence) -> None:
    assert guarded(round_, exact_token_ids=frozenset({3})).num_accepted == 3
    assert guarded(round_, exact_token_ids=frozenset({4})).num_accepted == 3
    assert guarded(round_, exact_token_ids=frozenset({0, 9})).num_accepted == NUM_DRAFT


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=15), min_size=1, max_size=60),
    st.integers(0, 5),
)
def test_among_any_hundred_tokens_no_more_are_loosened_than_asked(rounds: list[list[bool]], most: int) -> None:
    """Rounds of draft tokens, each the target's choice or not, under a rule that accepts everything."""
    guards = Guards(GuardSettings(max_loosened_per_100=most), piece)
    output: list[int] = []
    loosened: list[bool] = []
    for agrees in rounds:
        seen = evidence([0] * len(agrees), [0 if same else 1 for same in agrees] + [0])
        guards.start_round(output)
        verdict = limited(seen, Limits(frozenset(), guards))
        guards.end_round(seen, verdict.num_accepted)
        emitted = [not same for same in agrees[: verdict.num_accepted]] + [False]
        if verdict.num_accepted < len(agrees):  # as many before it as there may be
            assert not agrees[verdict.num_accepted]
            assert sum([*loosened, *emitted[:-1]][-99:]) >= most
        loosened += emitted
        output += [0] * len(emitted)
    for end in range(len(loosened) + 1):
        assert sum(loosened[max(0, end - 100) : end]) <= most


@pytest.mark.parametrize(
    ("within", "output", "draft", "choices", "end"),
    [
        ("digits", [], [0, 7, 2], [0, 1, 2, 0], 1),
        ("digits", [], [0, 1, 2], [0, 7, 2, 0], 1),
        ("digits", [7, 7], [0, 1, 2], [0, 3, 2, 0], 3),
        ("code", [8, 0], [0, 1, 2], [0, 3, 2, 0], 1),
        ("code", [8, 0, 8], [0, 1, 2], [0, 3, 2, 0], 3),
        ("code", [0], [8, 1, 2], [8, 3, 2, 0], 1),  # the draft opens it
        ("code", [0], [8, 8, 1], [8, 8, 2, 0], 3),  # and closes it
        ("json", [9], [1, 0, 0], [2, 0, 0, 0], 0),
        ("before:c", [0], [1, 2, 3], [2, 2, 4, 0], 0),
        ("before:c", [0], [1, 2, 3], [1, 2, 4, 0], 3),
        ("after:c", [0], [1, 2, 3], [2, 2, 4, 0], 2),
        ("after:bc", [1, 2], [1, 2, 3], [2, 2, 4, 0], 0),  # spread over two tokens
        ("after:bc", [1, 0, 2], [1, 0, 3], [2, 0, 4, 0], 3),
    ],
)
def test_a_region_is_exact_wherever_its_marks_are(
    within: str, output: list[int], draft: list[int], choices: list[int], end: int
) -> None:
    assert guarded(evidence(draft, choices), output, exact_within=(within,)).num_accepted == end


def test_a_token_that_waits_for_its_window_is_decided_at_once_where_it_must_not_stand() -> None:
    seen = evidence([0, 1, 2], [0, 2])
    waiting = Verdict(1, None)
    assert Limits(frozenset()).apply(waiting, seen) == waiting
    assert Limits(frozenset({1})).apply(waiting, seen) == Verdict(1, 2)


@pytest.mark.parametrize(
    ("name", "text", "inside"),
    [
        ("code", "ab```c``d```e", ".....xxxxxxx."),
        ("json", 'a{"}":{1}}b', "..xxxxxxxx.."),
        ("json", r'{"\"}"}c', ".xxxxxx."),
        ("json", '}"{" {', "...xxxx"),
        ("before:</t>", "ab</t>c", "xxxxxx.."),
        ("after:</t>", "ab</t>c", "......xx"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_region_reads_its_text_in_whatever_pieces_it_comes(name: str, text: str, inside: str, size: int) -> None:
    """`inside` says for each character, and for the end, whether what comes there is in the region."""
    region = make_region(name)
    for start in range(0, len(text), size):
        assert region.has("x") == (inside[start] == "x"), start
        before = region.copy()
        region.read(text[start : start + size])
        assert before.has("x") == (inside[start] == "x"), "a copy stays where it was"
    if len(inside) > len(text):
        assert region.has("x") == (inside[len(text)] == "x")


@pytest.mark.parametrize("name", ["", "Code", "after:", "between:x", "xml"])
def test_a_region_that_there_is_not_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=f"exact_within '{name}': expected code, json, digits, before:TAG or after"):
        check_regions([name])
