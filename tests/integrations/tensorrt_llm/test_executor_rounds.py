"""A request's round as requests to two executors, on tokens alone."""

import random

import pytest

from fly_trt import EngineError
from fly_trt.drafting.ngram import NgramIndex
from fly_trt.integrations.tensorrt_llm.executor_rounds import UNGUESSED_TOKENS, Flight, Piece, RoundSettings
from fly_trt.outputs import RoundCounts
from fly_trt.verification import DraftSource
from loop_stack import make_request

LOOKUP = (4, 1, 6)


def settings(**changes: object) -> RoundSettings:
    usual = {
        "num_draft_tokens": 8,
        "max_seq_len": 100,
        "has_model": True,
        "lookup": LOOKUP,
        "max_guess": 8,
        "target_vocab_size": 32,
        "draft_vocab_size": 32,
    }
    return RoundSettings(**(usual | changes))  # type: ignore[arg-type]


def flight(prompt: list[int], num_draft: int = 8, lookup: tuple[int, int, int] | None = LOOKUP) -> Flight:
    return Flight(make_request(prompt), num_draft, 0, None if lookup is None else NgramIndex(*lookup[:2]))


def ask(of: Flight, rules: RoundSettings) -> Piece:
    of.piece = of.next_piece(rules)
    return of.piece


def test_a_guess_leaves_room_for_the_models_own_token() -> None:
    asked = ask(flight([5, 6, 7, 8, 9, 10, 11, 12, 13, 5, 6]), settings())
    assert (asked.is_verification, asked.draft, asked.max_tokens) == (False, [7, 8, 9, 10, 11, 12], 7)
    asked = ask(flight([5, 6, 7, 8, 9, 5, 6], num_draft=3), settings())
    assert (asked.draft, asked.max_tokens) == ([7, 8], 3)
    asked = ask(flight([5, 6, 7, 8, 9, 5, 6]), settings(max_guess=1))
    assert (asked.draft, asked.max_tokens) == ([7], 2)
    assert ask(flight([5, 6, 5], num_draft=1), settings())[2:] == ([], 1)


def test_without_a_guess_the_model_says_a_few_tokens_and_lookup_is_asked_again() -> None:
    of = flight([5, 6, 7])
    assert ask(of, settings())[2:] == ([], UNGUESSED_TOKENS)
    of.take_draft([5, 6], settings())
    asked = ask(of, settings())
    assert (asked.context.tolist(), asked.draft, asked.max_tokens) == ([5, 6, 7, 5, 6], [7, 5, 6], 4)


def test_without_lookup_the_model_is_asked_for_all_of_them_until_it_has_said_them() -> None:
    of, rules = flight([5, 5, 5], lookup=None), settings(lookup=None)
    assert ask(of, rules)[2:] == ([], 8)
    of.take_draft([6], rules)  # whatever the reason
    assert ask(of, rules)[2:] == ([], 7)
    of.take_draft(list(range(7, 20)), rules)
    asked = ask(of, rules)
    assert (asked.is_verification, asked.draft, asked.max_tokens) == (True, list(range(6, 14)), 9)


def test_a_model_that_says_nothing_ends_the_draft() -> None:
    of = flight([5, 6, 7])
    ask(of, settings())
    of.take_draft([], settings())
    asked = ask(of, settings())
    assert (asked.is_verification, asked.draft, asked.max_tokens) == (True, [], 1)


def test_a_draft_ends_before_a_token_that_the_target_does_not_have() -> None:
    of, rules = flight([5, 6, 7], lookup=None), settings(lookup=None, draft_vocab_size=40)
    ask(of, rules)
    of.take_draft([8, 33, 9], rules)
    assert ask(of, rules)[0] is True
    assert of.draft == [8]


def test_the_draft_model_reads_and_is_guessed_only_tokens_that_it_has() -> None:
    of, rules = flight([5, 6, 7, 31, 5, 6]), settings(draft_vocab_size=30)
    asked = ask(of, rules)
    assert asked.context.tolist() == [5, 6, 7, 29, 5, 6]
    assert asked.draft == [7]
    assert of.request.sequence.tokens.tolist() == [5, 6, 7, 31, 5, 6]


def test_copies_are_a_draft_of_their_own() -> None:
    rules = settings(has_model=False)
    of = flight([5, 6, 7, 8, 9, 5, 6])
    asked = ask(of, rules)
    assert (asked.is_verification, asked.draft, asked.max_tokens) == (True, [7, 8, 9, 5, 6], 6)
    asked = ask(flight([5, 6, 7]), rules)
    assert (asked.is_verification, asked.draft, asked.max_tokens) == (True, [], 1)
    assert rules.source is DraftSource.LOOKUP


def test_a_draft_ends_where_the_sequence_may_not_go_on() -> None:
    of = flight([5] * 97)
    assert ask(of, settings(lookup=None))[3] == 3
    of = flight([5] * 99)
    assert ask(of, settings(lookup=None))[3] == 1


def test_what_stands_is_the_beginning_of_the_draft_and_a_token() -> None:
    of = flight([5, 6, 7])
    of.draft = [8, 9, 10]
    assert of.take_verdict([8, 9, 10, 11]) == 3
    assert of.take_verdict([8, 11]) == 1
    assert of.take_verdict([11]) == 0
    for wrong in ([], [9, 9], [8, 9, 11, 11], [8, 9, 10, 11, 12]):
        with pytest.raises(EngineError, match="DRAFT_TOKENS_EXTERNAL"):
            of.take_verdict(wrong)


def test_counts_are_of_one_source_and_say_nothing_of_loosened_tokens() -> None:
    of = flight([5, 6, 7])
    of.draft = [8, 9, 10]
    assert of.end_round(2, DraftSource.MODEL) == RoundCounts(3, 2, 0, {"model": 3}, {"model": 2})
    assert of.draft == []
    of.draft = [8]
    assert of.end_round(0, DraftSource.LOOKUP) == RoundCounts(1, 0, 0, {"lookup": 1}, {})


@pytest.mark.parametrize("seed", range(20))
def test_lookup_looks_in_the_sequence_and_the_draft_whatever_was_rejected(seed: int) -> None:
    """Its guesses are those of an index that is made anew."""
    choose, rules = random.Random(seed), settings()
    of = flight([choose.randrange(4) for _ in range(6)])
    while len(of.request.sequence) < 60:
        asked = ask(of, rules)
        if asked.is_verification:
            stood = choose.randrange(len(of.draft) + 1)
            said = [*of.draft[:stood], choose.randrange(4)]
            of.take_verdict(said)
            of.request.sequence.append(said)
            of.end_round(stood, DraftSource.MODEL)
            continue
        fresh = NgramIndex(*LOOKUP[:2])
        fresh.extend(asked.context.tolist())
        if 8 - len(of.draft) > 1:
            assert asked.draft == fresh.propose(min(6, 8 - len(of.draft) - 1)).tolist()
        else:
            assert asked.draft == []
        of.take_draft([choose.randrange(4) for _ in range(choose.randrange(1, asked.max_tokens + 1))], rules)
