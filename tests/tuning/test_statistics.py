"""Bounds of what is kept: they hold at the edges, where a bootstrap and a normal approximation promise everything."""

import math
import sys

import numpy as np
import pytest

from fly_trt import ConfigError
from fly_trt.tuning.result import RetentionBound
from fly_trt.tuning.statistics import Scores, retention_bound, speed_ratio

ASKED = {"min_retention": 0.99, "confidence": 0.95}


def right_and_wrong(kept: int, lost: int = 0, gained: int = 0, neither: int = 0) -> tuple[Scores, Scores]:
    """Scores of the target and of a candidate."""
    target = np.repeat([1.0, 1.0, 0.0, 0.0], [kept, lost, gained, neither])
    return target, np.repeat([1.0, 0.0, 1.0, 0.0], [kept, lost, gained, neither])


def checked(kept: int, lost: int = 0, gained: int = 0, neither: int = 0, **asked: float) -> RetentionBound:
    return retention_bound(*right_and_wrong(kept, lost, gained, neither), is_binary=True, **{**ASKED, **asked})


def test_no_loss_is_not_a_bound_of_one_and_the_bootstrap_beside_it_is_degenerate() -> None:
    bound = checked(160, num_resamples=200)
    assert bound.estimate == 1
    assert bound.bootstrap_lower == 1
    assert bound.lower == pytest.approx(0.045 ** (1 / 160))  # Clopper-Pearson's with nine tenths of the error rate
    assert (bound.method, bound.mcnemar_p) == ("exact", 1.0)


def test_the_number_that_would_do_without_a_loss_does_and_one_less_does_not() -> None:
    needed = checked(160).num_prompts_without_loss
    assert needed == checked(10).num_prompts_without_loss == math.ceil(math.log(0.045) / math.log(0.99)) == 309
    assert checked(needed).lower >= 0.99 > checked(needed - 1).lower


def test_of_prompts_that_the_target_gets_wrong_nothing_can_be_learnt() -> None:
    bound = checked(100, neither=100)
    assert bound.lower == checked(100).lower
    assert bound.num_prompts_without_loss == 2 * 309


def test_the_number_that_would_do_at_the_loss_that_was_seen_does() -> None:
    needed = checked(398, lost=2).num_prompts_needed
    assert needed is not None
    times = math.ceil(needed / 400)
    assert times > 1
    assert checked(398 * times, lost=2 * times).lower >= 0.99 > checked(398 * (times - 1), lost=2 * (times - 1)).lower


def test_where_less_is_kept_than_asked_for_no_number_would_do() -> None:
    bound = checked(300, lost=9)
    assert bound.num_prompts_needed is None
    assert bound.estimate < 0.99


def test_many_candidates_that_were_looked_at_need_more_prompts_each() -> None:
    alone, among = checked(160), checked(160, num_looks=3)
    assert among.lower < alone.lower
    assert among.num_prompts_without_loss == math.ceil(math.log(0.015) / math.log(0.99))
    assert among.confidence == 0.95


def test_gains_are_set_off_where_there_are_prompts_enough() -> None:
    """Two in a hundred are lost, and as many gained: of the losses alone nothing above 98 % could be claimed."""
    few, many = checked(88, 2, 2, 8), checked(17600, 400, 400, 1600)
    assert (few.method, many.method) == ("exact", "betting")
    assert many.estimate == 1
    assert many.lower > 0.985


def test_mcnemar_tells_losses_from_changes_that_go_both_ways() -> None:
    assert checked(100, lost=8, gained=7).mcnemar_p == pytest.approx(0.5)
    assert checked(100, lost=8, gained=0).mcnemar_p == pytest.approx(0.5**8)


@pytest.mark.parametrize("method", ["exact", "betting"])
def test_scores_between_zero_and_one_are_bounded_whatever_their_distribution(method: str) -> None:
    """One prompt in fifty loses all, which few prompts do not show: no bound of a sample without it may rule it out."""
    kept = np.full(100, 0.999)
    bound = retention_bound(np.ones(100), kept, **ASKED, is_binary=False)
    assert bound.estimate == pytest.approx(0.999)
    assert bound.lower < 0.98
    assert bound.method == "betting"
    assert bound.mcnemar_p is None
    more = retention_bound(np.ones(400), np.full(400, 0.999), **ASKED)
    assert more.lower > 0.99


def test_the_order_of_the_prompts_does_not_matter() -> None:
    random = np.random.default_rng(1)
    target, candidate = random.random(80), random.random(80)
    order = random.permutation(80)
    bound = retention_bound(target, candidate, **ASKED)
    assert retention_bound(target[order], candidate[order], **ASKED).lower == pytest.approx(bound.lower)


def test_what_differs_by_rounding_is_neither_lost_nor_gained() -> None:
    bound = retention_bound(np.full(10, 0.99999), np.array([*[0.99998] * 4, 1, *[0.9] * 5]), **ASKED)
    assert (bound.num_lost, bound.num_gained) == (5, 0)


def test_to_keep_everything_is_the_most_that_is_claimed() -> None:
    assert retention_bound(np.full(500, 0.2), np.full(500, 0.9), **ASKED).lower == 1


def test_a_target_that_gets_nothing_right_has_nothing_to_keep() -> None:
    with pytest.raises(ValueError, match="scores 0 on every prompt"):
        checked(0, neither=5)
    with pytest.raises(ValueError, match="no prompt"):
        checked(0)


def test_a_ratio_of_speeds_weighs_tokens_and_has_an_interval() -> None:
    random = np.random.default_rng(2)
    other = random.uniform(1, 2, 40)
    own = other / random.normal(2, 0.1, 40)
    tokens = np.full(40, 10.0)
    ratio = speed_ratio(own, tokens, other, tokens)
    assert ratio.estimate == pytest.approx(other.sum() / own.sum())
    assert 1.9 < ratio.lower < ratio.estimate < ratio.upper < 2.1
    assert speed_ratio(own, tokens / 2, other, tokens).estimate == pytest.approx(ratio.estimate / 2)


def test_the_speed_of_a_few_prompts_is_sure_of_nothing() -> None:
    one = np.ones(4)
    ratio = speed_ratio(one, 3 * one, one, one)
    assert (ratio.estimate, ratio.lower) == (3, 0)


@pytest.mark.parametrize("num_prompts", [5, 8, 30])
def test_what_is_as_fast_is_seldom_called_surely_faster_however_few_prompts(num_prompts: int) -> None:
    random = np.random.default_rng(4)
    num_draws, surely = 1000, 0
    for _ in range(num_draws):
        tokens = random.integers(30, 200, num_prompts).astype(float)
        own = tokens * random.lognormal(-(0.3**2) / 2, 0.3, num_prompts)
        surely += speed_ratio(own, tokens, tokens, tokens).lower > 1
    assert surely < 0.1 * num_draws  # 5 % in the limit; percentiles of a bootstrap: 18 % of five prompts


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match=r"scipy is not installed: pip install 'fly-trt\[tune\]'"):
        checked(10)
