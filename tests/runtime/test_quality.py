"""What is said of the mean quality of audited answers holds after every audit, and is said in time."""

import numpy as np
import pytest

from fly_trt.runtime.quality import QualityWatch, audits_to_judge, audits_to_trip, good_quality

MIN_QUALITY, ERROR_RATE = 0.8, 0.01
PERIOD = audits_to_judge(MIN_QUALITY, ERROR_RATE)


def audits_until(verdict, qualities, watch=None):
    """The number of the audit that brings this verdict, the first that there is."""
    watch = watch or QualityWatch(MIN_QUALITY, ERROR_RATE)
    for number, quality in enumerate(qualities, start=1):
        if (said := watch.observe(quality)) is not None:
            assert said == verdict
            return number
    raise AssertionError("no verdict")


def test_nothing_is_known_before_the_first_audit():
    watch = QualityWatch(MIN_QUALITY, ERROR_RATE)
    assert (watch.num_audits, watch.mean, watch.lower, watch.upper) == (0, None, 0.0, 1.0)


def test_bounds_close_in_on_the_mean_from_both_sides():
    rng, watch, widths = np.random.default_rng(1), QualityWatch(0.3, ERROR_RATE), []
    for _ in range(900):
        assert watch.observe(rng.uniform(0.6, 0.8)) is None
        widths.append(watch.upper - watch.lower)
    assert 0.2 > widths[-1] < widths[50] < widths[10]
    assert 0.55 < watch.lower < watch.mean < watch.upper < 0.8


def test_what_is_always_exact_is_shown_to_be_good_in_as_many_audits_as_the_quality_allows_at_most():
    """Each multiplies a bet on a higher mean by 1 / min_quality at most."""
    watch = QualityWatch(MIN_QUALITY, ERROR_RATE)
    while watch.lower < MIN_QUALITY:
        assert watch.observe(1.0) is None
    least = np.log(1 / (1 - 0.95)) / np.log(1 / MIN_QUALITY)
    assert least < watch.num_audits < 2 * least


@pytest.mark.parametrize(("quality", "most"), [(0.0, 12), (0.4, 18), (0.6, 28)])
def test_a_quality_that_is_certainly_too_low_is_found_within_a_few_audits(quality, most):
    assert audits_until("dropped", [quality] * 50) <= most


def test_a_drop_after_many_good_audits_is_found_as_soon_as_at_the_beginning():
    at_once = audits_until("dropped", [0.4] * 50)
    watch = QualityWatch(MIN_QUALITY, ERROR_RATE)
    for _ in range(3 * PERIOD // 2):
        assert watch.observe(1.0) is None
    assert audits_until("dropped", [0.4] * 50, watch) <= at_once + 1


def test_a_quality_that_is_neither_certainly_low_nor_shown_to_be_high_ends_with_the_period():
    assert audits_until("unproven", [MIN_QUALITY] * (PERIOD + 1)) == PERIOD


def test_what_was_shown_once_has_to_be_shown_anew_in_every_period():
    watch = QualityWatch(MIN_QUALITY, ERROR_RATE)
    for _ in range(PERIOD):
        assert watch.observe(1.0) is None
    assert audits_until("unproven", [MIN_QUALITY] * (2 * PERIOD), watch) <= 1.5 * PERIOD + 1


def test_the_lower_bound_is_never_forgotten_between_two_periods():
    watch = QualityWatch(MIN_QUALITY, ERROR_RATE)
    for number in range(2 * PERIOD):
        watch.observe(1.0)
        assert number < PERIOD // 2 or watch.lower > MIN_QUALITY


def test_the_upper_bound_is_of_late_audits_and_recovers():
    watch = QualityWatch(0.1, ERROR_RATE)
    for _ in range(60):
        watch.observe(0.4)
    assert watch.upper < 0.6
    for _ in range(400):
        watch.observe(1.0)
    assert watch.upper > 0.95


@pytest.mark.parametrize("quality", [-0.5, 0.0, 1.0, 1.0 + 1e-12, 2.0])
def test_qualities_at_the_ends_and_a_rounding_error_beyond_are_numbers_like_others(quality):
    watch = QualityWatch(MIN_QUALITY, ERROR_RATE)
    with np.errstate(all="raise", under="ignore", divide="ignore"):
        watch.observe(quality)
    assert 0 <= watch.lower <= watch.upper <= 1


@pytest.mark.parametrize("min_quality", [0.5, 0.8, 0.9, 0.95, 0.98, 0.99])
def test_a_worse_quality_is_found_sooner_and_a_stricter_bound_takes_longer_periods(min_quality):
    trips = [audits_to_trip(quality, min_quality, ERROR_RATE) for quality in (0.1, 0.2, 0.4)]
    assert trips == sorted(trips)
    assert audits_to_judge(min_quality, ERROR_RATE) < audits_to_judge((1 + min_quality) / 2, ERROR_RATE)
    assert audits_to_judge(min_quality, ERROR_RATE) < audits_to_judge(min_quality, ERROR_RATE / 100)


def test_the_formula_is_that_of_its_docstring():
    """With the divergence of two coins in place of the growth that eight shares reach."""

    def kl(y, m):
        return y * np.log(y / m) + (1 - y) * np.log((1 - y) / (1 - m))

    y = np.linspace(0.5001, 0.9499, 20000)
    needed = np.maximum(np.log(8 * 2e5 / ERROR_RATE) / kl(y, 0.95), np.log(100) / kl(y, 0.5))
    assert min(needed) <= audits_to_trip(0.5, 0.95, ERROR_RATE) <= 1.1 * min(needed)


def test_good_is_what_loses_a_quarter_of_what_may_be_lost():
    assert good_quality(0.9) == pytest.approx(0.975)
