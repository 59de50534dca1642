"""Where a draft ends by what the draft model says of its own tokens, against the definitions."""

import math
from typing import Any

import numpy as np
import pytest

import policy_oracles as oracles
from fly_trt.drafting.stops import DRAFT_STOPS

NUM_CASES = 10_000


def random_tokens(seed: int, num: int = NUM_CASES) -> list[tuple[float, float]]:
    """Entropies and log-probabilities as single-precision numbers on a coarse grid, with ties and ends of the range."""
    rng = np.random.default_rng(seed)
    entropy = np.where(rng.random(num) < 0.1, 0, rng.choice([0.3, 2.0, 8.0], num) * rng.random(num))
    logprob = np.where(rng.random(num) < 0.1, 0, -rng.exponential(0.7, num))
    logprob[rng.random(num) < 0.02] = -np.inf
    numbers = [np.round(array * 16).astype(np.float32) / 16 for array in (entropy, logprob)]
    return list(zip(numbers[0].tolist(), numbers[1].tolist(), strict=True))


def assert_answers(got: Any, want: oracles.Answer, seen: object) -> None:
    assert want is None or bool(got) is want, seen


def test_the_table_has_the_three_rules() -> None:
    assert set(DRAFT_STOPS) >= {"adasd", "confidence", "adaedl"}


def test_adasd_ends_where_the_entropy_exceeds_the_mean_of_the_rejected() -> None:
    rng = np.random.default_rng(1)
    stop, rejected, num_ended = DRAFT_STOPS["adasd"](None), [], 0
    for case, (entropy, logprob) in enumerate(random_tokens(2)):
        if case % 200 == 0:  # a new request
            stop, rejected = DRAFT_STOPS["adasd"](None), []
        ends = stop.ends(entropy, logprob)
        assert_answers(ends, oracles.adasd_stop(entropy, rejected), (entropy, rejected))
        num_ended += bool(ends)
        if rng.random() < 0.2:
            stop.observe(entropy)
            rejected.append(entropy)
    assert NUM_CASES / 10 < num_ended < NUM_CASES * 0.9


def test_adasd_never_ends_a_draft_before_the_first_rejection() -> None:
    stop = DRAFT_STOPS["adasd"](None)
    assert not any(stop.ends(entropy, -1.0) for entropy in (0.0, 5.0, 1e6))
    stop.observe(2.0)
    assert not stop.ends(2.0, -1.0), "the mean itself does not exceed it"
    assert stop.ends(float(np.nextafter(np.float32(2), np.float32(3))), -1.0)


def test_adasd_with_a_threshold_keeps_it() -> None:
    stop = DRAFT_STOPS["adasd"](1.5)
    for entropy, logprob in random_tokens(3, 1000):
        assert bool(stop.ends(entropy, logprob)) is (entropy > 1.5)
        stop.observe(entropy)


def test_adasd_keeps_what_it_learned_to_itself() -> None:
    learned, fresh = DRAFT_STOPS["adasd"](None), DRAFT_STOPS["adasd"](None)
    learned.observe(0.5)
    assert learned.ends(1.0, -1.0)
    assert not fresh.ends(1.0, -1.0)


def test_adasd_of_a_stream_that_stays_the_same_does_not_drift() -> None:
    entropies = np.random.default_rng(4).exponential(1.0, NUM_CASES)
    stop, ended = DRAFT_STOPS["adasd"](None), []
    for entropy in entropies.tolist():
        ended.append(bool(stop.ends(entropy, -1.0)))
        stop.observe(entropy)
    assert np.mean(ended[-2000:]) == pytest.approx(math.exp(-1), abs=0.04)
    assert np.mean(ended[:2000]) == pytest.approx(np.mean(ended[-2000:]), abs=0.05)


@pytest.mark.parametrize("threshold", [None, 0.3, 0.95])
def test_confidence_ends_under_a_probability(threshold: float | None) -> None:
    stop, num_ended = DRAFT_STOPS["confidence"](threshold), 0
    for entropy, logprob in random_tokens(5):
        ends = stop.ends(entropy, logprob)
        assert_answers(ends, oracles.confidence_stop(logprob, threshold or 0.7), logprob)
        num_ended += bool(ends)
        stop.observe(entropy)
    assert 0 < num_ended < NUM_CASES


@pytest.mark.parametrize("threshold", [None, 0.05, 0.5])
def test_adaedl_ends_where_its_bound_of_the_acceptance_is_low(threshold: float | None) -> None:
    stop, num_ended = DRAFT_STOPS["adaedl"](threshold), 0
    for entropy, logprob in random_tokens(6):
        ends = stop.ends(entropy, logprob)
        assert_answers(ends, oracles.adaedl_stop(entropy, threshold or 0.2), entropy)
        num_ended += bool(ends)
        stop.observe(entropy)
    assert 0 < num_ended < NUM_CASES


def test_a_threshold_itself_ends_nothing() -> None:
    assert not DRAFT_STOPS["confidence"](1.0).ends(0.0, 0.0)
    assert not DRAFT_STOPS["adaedl"](0.5).ends(0.5, -1.0)
    assert DRAFT_STOPS["adaedl"](0.5).ends(0.5000001, -1.0)
    assert not DRAFT_STOPS["adasd"](0.5).ends(0.5, -1.0)


@pytest.mark.parametrize("name", ["adasd", "confidence", "adaedl"])
def test_certainty_ends_no_draft(name: str) -> None:
    stop = DRAFT_STOPS[name](None)
    stop.observe(1.0)
    for rounding in (0.0, -1e-7):
        assert not stop.ends(rounding, 0.0)


@pytest.mark.parametrize(
    ("name", "sooner_to_later"),
    [("adasd", [0.1, 0.5, 2.0]), ("confidence", [0.9, 0.7, 0.2]), ("adaedl", [0.6, 0.2, 0.05])],
)
def test_a_later_setting_never_ends_sooner(name: str, sooner_to_later: list[float]) -> None:
    stops = [DRAFT_STOPS[name](threshold) for threshold in sooner_to_later]
    totals = np.zeros(len(stops), np.int64)
    for entropy, logprob in random_tokens(7, 2000):
        ends = [bool(stop.ends(entropy, logprob)) for stop in stops]
        assert ends == sorted(ends, reverse=True), (entropy, logprob)
        totals += ends
    assert (np.diff(totals) < 0).all()
