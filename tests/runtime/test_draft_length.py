"""How many draft tokens a step verifies, from costs and acceptance rates that are given here instead of measured."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_trt.runtime.draft_length import (
    FIRST_RATE,
    FIRST_WAIT,
    MAX_WAIT,
    PAYING_STEPS,
    WAIT_GROWTH,
    AcceptanceRate,
    CostCurve,
    DraftLength,
)

K = 15

Cost = Callable[[int], float]


def measured(cost: Cost, upto: int = 512) -> CostCurve:
    curve = CostCurve()
    for exponent in range(upto.bit_length()):
        curve.observe(2**exponent, cost(2**exponent))
    return curve


def chosen(
    cost: Cost,
    rates: Sequence[float],
    limits: Sequence[int] = (),
    *,
    draft_seconds: float = 0.0,
    num_context: int = 1,
) -> int:
    lengths = DraftLength(K, adaptive=True)
    lengths.target_cost = measured(cost)
    if draft_seconds:
        for num_rows in range(1, 33):
            lengths.observe_drafting(num_rows, 10, 10 * draft_seconds)
    return lengths.choose(rates, limits or [K] * len(rates), num_context)


def forced(cost: Cost, numbers: Sequence[int], num_draft: int = 0, rate: float = 0.5) -> int:
    lengths = DraftLength(K, adaptive=True)
    lengths.target_cost = measured(cost)
    return lengths.choose_forced(numbers, [rate] * len(numbers), len(numbers), num_draft, 1)


def proportional(positions: int) -> float:
    return 0.01 * positions


def free(positions: int) -> float:
    return 0.01


def at(curve: CostCurve, *positions: int) -> list[float]:
    return curve(np.array(positions)).tolist()


# --- the cost of a step -----------------------------------------------------------------------------------------------


def test_a_cost_between_measured_ones_is_interpolated() -> None:
    curve = CostCurve()
    curve.observe(2, 0.010)
    curve.observe(8, 0.040)
    assert at(curve, 2, 5, 8) == pytest.approx([0.010, 0.025, 0.040])


def test_fewer_positions_than_measured_cost_what_the_fewest_do() -> None:
    curve = CostCurve()
    curve.observe(4, 0.010)
    assert at(curve, 1, 4) == pytest.approx([0.010, 0.010])


def test_more_positions_than_measured_cost_in_proportion() -> None:
    curve = CostCurve()
    curve.observe(4, 0.010)
    curve.observe(16, 0.030)
    assert at(curve, 32, 64) == pytest.approx([0.060, 0.120])


@given(
    st.lists(st.tuples(st.integers(1, 600), st.floats(1e-4, 1.0)), min_size=1, max_size=30),
    st.lists(st.integers(1, 2000), min_size=2, max_size=20),
)
def test_more_positions_never_cost_less_whatever_was_measured(
    measurements: list[tuple[int, float]], asked: list[int]
) -> None:
    curve = CostCurve()
    for positions, seconds in measurements:
        curve.observe(positions, seconds)
    costs = at(curve, *sorted(asked))
    assert costs == sorted(costs)
    assert costs[0] >= min(seconds for _, seconds in measurements) * (1 - 1e-9)


def test_a_cost_follows_new_measurements() -> None:
    curve = CostCurve()
    for seconds in [0.1] + [0.01] * 60:
        curve.observe(8, seconds)
    assert at(curve, 8) == pytest.approx([0.01], rel=0.01)


def test_a_single_slow_step_changes_little() -> None:
    curve = measured(free)
    curve.observe(8, 0.1)
    assert at(curve, 8)[0] < 0.03


# --- the acceptance of drafts -----------------------------------------------------------------------------------------


def test_a_new_request_starts_from_what_others_saw() -> None:
    assert AcceptanceRate(0.35).value == pytest.approx(0.35)


def test_a_rate_follows_the_recent_rounds() -> None:
    rate = AcceptanceRate(0.8)
    for _ in range(60):
        rate.observe(0, was_rejected=True)
    assert rate.value < 0.2
    for _ in range(60):
        rate.observe(15, was_rejected=False)
    assert rate.value > 0.95


def test_a_rate_ages_towards_what_was_expected_without_drafts() -> None:
    rate = AcceptanceRate(0.6)
    for _ in range(60):
        rate.observe(0, was_rejected=True)
    before = rate.value
    for _ in range(300):
        rate.fade()
    assert before < rate.value == pytest.approx(0.6, abs=0.01)


def test_a_rate_that_was_forgotten_is_the_first_guess_until_the_next_round() -> None:
    rate = AcceptanceRate(0.8)
    for _ in range(30):
        rate.observe(0, was_rejected=True)
    rate.forget()
    assert rate.value == pytest.approx(FIRST_RATE)
    rate.observe(0, was_rejected=True)
    assert rate.value < FIRST_RATE / 1.9


# --- the choice -------------------------------------------------------------------------------------------------------


def test_nothing_is_drafted_when_a_position_costs_as_much_as_a_step() -> None:
    assert chosen(proportional, [0.3]) == 0
    assert chosen(proportional, [0.9] * 8) == 0


def test_the_maximum_is_drafted_when_positions_are_free() -> None:
    for rate in (0.2, 0.5, 0.99):
        assert chosen(free, [rate]) == K


def test_a_draft_model_that_costs_more_than_it_brings_is_left_alone() -> None:
    assert chosen(free, [0.6], draft_seconds=0.02) == 0
    assert chosen(free, [0.6], draft_seconds=0.00001) >= 8


def test_better_acceptance_never_drafts_less() -> None:
    numbers = [chosen(lambda p: 0.01 + 0.002 * p, [rate], draft_seconds=0.0005) for rate in np.linspace(0, 0.99, 30)]
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert numbers[-1] == K


def test_more_rows_draft_less_when_positions_cost() -> None:
    cost: Cost = lambda positions: max(0.02, 0.002 * positions)  # noqa: E731
    numbers = [chosen(cost, [0.7] * num_rows) for num_rows in (1, 2, 4, 8, 16)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > 5
    assert numbers[-1] == 0


def test_a_row_that_drafts_well_outvotes_one_that_does_not() -> None:
    cost: Cost = lambda positions: 0.01 + 0.001 * positions  # noqa: E731
    alone, mixed = chosen(cost, [0.1]), chosen(cost, [0.1, 0.95])
    assert alone < mixed


def test_nobody_drafts_more_than_the_row_that_may_draft_most() -> None:
    for limit in range(K + 1):
        assert chosen(free, [0.9], [limit]) == limit, "also where it is no equal part of the longest round"
        assert chosen(free, [0.9, 0.9], [0, limit]) == limit


def test_a_row_that_may_not_draft_counts_as_one_whose_drafts_never_stand() -> None:
    """With the same costs, an acceptance rate of its own must not matter."""
    cost: Cost = lambda positions: 0.01 + 0.001 * positions  # noqa: E731
    assert chosen(cost, [0.7, 0.99], [K, 0]) == chosen(cost, [0.7, 0.0]) < chosen(cost, [0.7, 0.99])


def test_a_row_brings_nothing_beyond_its_own_limit() -> None:
    cost: Cost = lambda positions: 0.01 + 0.0002 * positions  # noqa: E731
    assert chosen(cost, [0.1, 0.99]) == K
    assert chosen(cost, [0.1, 0.99], [K, 3]) == 3


def test_drafting_is_paid_for_the_rows_that_draft() -> None:
    lengths = DraftLength(K, adaptive=True)
    lengths.target_cost = measured(free)
    lengths.observe_drafting(1, 1, 0.0001)
    lengths.observe_drafting(8, 1, 1.0)
    assert lengths.choose([0.9] * 8, [K] * 8, 1) == 0
    assert lengths.choose([0.9] * 8, [K] + [0] * 7, 1) > 0


@given(
    rates=st.lists(st.floats(0, 1), min_size=1, max_size=16),
    base=st.floats(1e-5, 0.1),
    each=st.floats(0, 0.01),
    draft=st.floats(0, 0.01),
    num_context=st.integers(1, 4),
)
def test_the_choice_is_always_a_number_of_draft_tokens(
    rates: list[float], base: float, each: float, draft: float, num_context: int
) -> None:
    choice = chosen(lambda p: base + each * p, rates, draft_seconds=draft, num_context=num_context)
    assert 0 <= choice <= K


def test_what_the_draft_model_must_read_first_counts() -> None:
    """A request that was decoded without drafts for long does not draft again for a small gain."""
    lengths = DraftLength(K, adaptive=True)
    lengths.target_cost = measured(lambda positions: 0.01 + 0.001 * positions)
    lengths.observe_drafting(1, 10, 10 * 0.003)
    assert lengths.choose([0.5], [K], 1, num_unread=1) > 0
    assert lengths.choose([0.5], [K], 1, num_unread=500) == 0
    assert lengths.choose([0.95], [K], 1, num_unread=500) > 0


def test_switched_off_the_maximum_is_drafted_whatever_it_costs() -> None:
    lengths = DraftLength(K, adaptive=False)
    lengths.target_cost = measured(proportional)
    assert lengths.choose([0.01] * 8, [4] * 7 + [9], 1) == 9
    assert lengths.choose([0.01] * 8, [K] * 8, 1) == K


def test_before_anything_was_measured_the_maximum_is_drafted() -> None:
    assert DraftLength(K, adaptive=True).choose([0.5], [K], 1) == K


def test_without_a_drafter_nothing_is_drafted() -> None:
    lengths = DraftLength(0, adaptive=True)
    lengths.target_cost = measured(free)
    assert lengths.choose([0.9], [0], 1) == 0


def test_speculation_gets_another_chance() -> None:
    """A slow first measurement of the draft model, or a bad beginning of a text, is not for ever."""
    lengths = DraftLength(K, adaptive=True)
    lengths.target_cost = measured(lambda positions: 0.01 + 0.0001 * positions)
    lengths.observe_drafting(1, 10, 0.2)
    rate = AcceptanceRate(0.8)
    for _ in range(20):
        rate.observe(0, was_rejected=True)
    num_steps = 0
    while lengths.choose([rate.value], [K], 1) == 0:
        if lengths.rest():
            rate.forget()
        num_steps += 1
        assert num_steps < 1000
    assert num_steps >= FIRST_WAIT


def test_the_next_chance_comes_later_unless_speculation_paid_in_between() -> None:
    lengths = DraftLength(K, adaptive=True)

    def wait() -> int:
        return next(steps for steps in range(1, MAX_WAIT + 1) if lengths.rest())

    waits = [wait() for _ in range(6)]
    assert waits == [min(FIRST_WAIT * WAIT_GROWTH**n, MAX_WAIT) for n in range(6)]
    lengths.target_cost = measured(free)
    for _ in range(PAYING_STEPS):
        assert lengths.choose([0.9], [K], 1) > 0
    assert wait() == FIRST_WAIT


def test_what_requests_saw_is_what_new_ones_start_from() -> None:
    lengths = DraftLength(K, adaptive=True)
    assert lengths.usual_rate == FIRST_RATE
    for _ in range(100):
        lengths.observe_round(1, True)
    assert lengths.usual_rate == pytest.approx(0.5, abs=0.05)


# --- what a grammar forces --------------------------------------------------------------------------------------------


def nearly_free(positions: int) -> float:
    return 0.01 + 0.001 * positions


def test_forced_tokens_are_verified_where_the_wider_step_pays() -> None:
    assert forced(nearly_free, [9]) == 9
    assert forced(nearly_free, [9] * 8) == 9
    assert forced(proportional, [9]) == 0, "a step of ten tokens costs ten steps of one, and brings as much"
    assert forced(nearly_free, [9] + [0] * 31) == 0, "the others' rows would be padded to ten tokens"


def test_forced_tokens_are_no_fewer_than_the_step_drafts_anyway() -> None:
    assert forced(proportional, [9, 0], 6) == 6
    assert forced(nearly_free, [3, 0], 6) == 6
    assert forced(nearly_free, [0, 0], 2) == 2


def test_without_measurements_all_forced_tokens_are_verified() -> None:
    for lengths in (DraftLength(K, adaptive=True), DraftLength(K, adaptive=False)):
        assert lengths.choose_forced([2, 7, 0], [0.1] * 3, 3, 4, 1) == 7
