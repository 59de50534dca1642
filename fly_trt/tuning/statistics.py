"""How much of the target's quality a candidate keeps at least, from paired scores, and how many prompts that takes.

It knows arrays of scores and nothing of where they come from. Prompts are taken as drawn at random from those that the
setting will be used on. Bounds hold for every number of prompts and every distribution of scores in 0..1; none of them
rests on a normal approximation, which promises too much where nearly all prompts are won:

- `exact`, for answers that are right or wrong: of the prompts that the target gets right, the share that the candidate
  loses has the Clopper-Pearson bound. Gains are not set off.
- `betting` (Waudby-Smith and Ramdas, arXiv 2010.09686): the retention r is refused where a gambler who bets that the
  candidate's score is more than r times the target's has won 1 / error. The bet is a mixture of fixed stakes, so that
  the order of the prompts does not matter. Gains are set off.

Right and wrong answers have the greater of the two, with most of the error rate for the first.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fly_trt.errors import ConfigError
from fly_trt.tuning.result import RetentionBound, SpeedRatio

Scores = npt.NDArray[np.float64]

EXACT, BETTING = "exact", "betting"
SHARE_OF_EXACT = 0.9  # of the error rate, where both are looked at
# Of the greatest stake that cannot lose more than everything. That one pays most where nothing is lost, and has half of
# the money; those next to it pay where little is lost, the small ones where losses and gains nearly cancel.
STAKES = np.array([1, *(1 - 0.5**k for k in (4, 3, 2)), *(0.5**k for k in range(1, 8))])
MONEY = np.array([0.5, *[0.05] * 10])
MOST_PROMPTS = 10_000_000  # where a claim would take more, no number is named
STEPS = 40  # of a bisection
INTERVAL = 0.9  # of a ratio of speeds
NOISE = 1e-4  # scores that differ by less are counted as the same: likelihoods are sums of rounded numbers
LEAST_PROMPTS = 5  # fewer say nothing of how much it varies
NO_PROMPTS = "no prompt is left to judge by"


def load_scipy_stats() -> Any:
    """Raises ConfigError where SciPy is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise ConfigError("fly-tune: scipy is not installed: pip install 'fly-trt[tune]'") from None
    return stats


def retention_bound(
    target: Scores,
    candidate: Scores,
    *,
    min_retention: float,
    confidence: float,
    num_looks: int = 1,
    is_binary: bool = False,
    num_resamples: int = 0,
    seed: int = 0,
) -> RetentionBound:
    """The candidate's mean score relative to the target's, from the scores [n] of both on the same n prompts.

    With `confidence` the lower bounds of `num_looks` candidates hold all at once (Bonferroni). is_binary: scores are 0
    or 1 by their nature, not by chance. num_resamples: of the paired bootstrap that is reported beside it; 0 leaves it
    out. Raises ValueError where the target's mean score is 0: nothing could be kept of it.
    """
    if not len(target) or not target.any():
        raise ValueError("the target scores 0 on every prompt" if len(target) else NO_PROMPTS)
    error = (1 - confidence) / num_looks
    lost, gained = (int((sign * (candidate - target) > NOISE).sum()) for sign in (-1, 1))
    bounds = _bounds(target, candidate, error, is_binary)
    method = max(bounds, key=lambda name: bounds[name])
    return RetentionBound(
        estimate=float(candidate.mean() / target.mean()),
        lower=bounds[method],
        confidence=confidence,
        num_looks=num_looks,
        num_prompts=len(target),
        num_lost=lost,
        num_gained=gained,
        num_prompts_without_loss=_needed(target, target, min_retention, error, is_binary),
        num_prompts_needed=_needed(target, candidate, min_retention, error, is_binary),
        method=method,
        mcnemar_p=_mcnemar(lost, gained) if is_binary else None,
        bootstrap_lower=_bootstrap_lower(target, candidate, 1 - error, num_resamples, seed) if num_resamples else None,
    )


def speed_ratio(seconds: Scores, tokens: Scores, other_seconds: Scores, other_tokens: Scores) -> SpeedRatio:
    """Tokens per second relative to another candidate's, each [n] on the same n prompts or blocks of some, whose times
    are neighbours.

    The interval is Student's, of the logarithm of the ratio, linear in each prompt's share of the four sums. Over few
    prompts a bootstrap's percentiles are too sure: of eight, what is as fast is called faster in 15 % of the draws
    instead of 5. Of fewer than five the interval begins at 0: they are sure of nothing.
    """
    samples = ((1, tokens), (-1, seconds), (-1, other_tokens), (1, other_seconds))
    estimate = float(tokens.sum() / seconds.sum() / (other_tokens.sum() / other_seconds.sum()))
    count = len(seconds)
    if count < LEAST_PROMPTS:
        return SpeedRatio(estimate, 0.0, estimate)
    shares = sum((sign * sample / sample.mean() for sign, sample in samples), np.zeros(count))
    quantile = float(load_scipy_stats().t.ppf((1 + INTERVAL) / 2, count - 1))
    width = math.exp(quantile * shares.std(ddof=1) / math.sqrt(count))
    return SpeedRatio(estimate, estimate / width, estimate * width)


def _bounds(target: Scores, candidate: Scores, error: float, is_binary: bool) -> dict[str, float]:
    """By method; each holds, and so does the greatest."""
    if not is_binary:
        return {BETTING: _betting_bound(target, candidate, error)}
    return {
        EXACT: _exact_bound(target, candidate, error * SHARE_OF_EXACT),
        BETTING: _betting_bound(target, candidate, error * (1 - SHARE_OF_EXACT)),
    }


def _exact_bound(target: Scores, candidate: Scores, error: float) -> float:
    right = int(target.sum())
    lost = math.ceil((target * (1 - candidate)).sum())
    losses = load_scipy_stats().binomtest(lost, right, alternative="less")
    return 1 - float(losses.proportion_ci(1 - error, method="exact").high)


def _betting_bound(target: Scores, candidate: Scores, error: float) -> float:
    """The least retention that is not refused, 1 at most: nobody needs the claim that more than everything is kept."""
    wealth, goal = _Wealth(target, candidate), -math.log(error)
    if wealth.log(1.0) >= goal:
        return 1.0
    refused, held = 0.0, 1.0
    for _ in range(STEPS):
        middle = (refused + held) / 2
        refused, held = (middle, held) if wealth.log(middle) >= goal else (refused, middle)
    return refused


class _Wealth:
    """Of a gambler who began with 1. Where the true retention is no greater than what is bet on, its expectation is at
    most 1. A stake's factor for a prompt is 1 + stake (candidate / retention - target), which is at least 0."""

    def __init__(self, target: Scores, candidate: Scores) -> None:
        # Most prompts are of a few kinds.
        kinds, self._counts = np.unique(np.stack([target, candidate]), axis=1, return_counts=True)
        self._target, self._candidate = kinds

    def log(self, retention: float, times: float = 1.0) -> float:
        """If the prompts had come `times` times."""
        gains = self._candidate / retention - self._target
        with np.errstate(divide="ignore"):
            logs = np.log1p(STAKES[:, None] * gains) @ self._counts
        return float(np.logaddexp.reduce(np.log(MONEY) + times * logs))


def _needed(target: Scores, candidate: Scores, min_retention: float, error: float, is_binary: bool) -> int | None:
    """Prompts like these, with as many losses and gains by prompt, that claim `min_retention`. None where not even very
    many do."""
    claims = [_betting_claims(target, candidate, min_retention, error * (1 - SHARE_OF_EXACT if is_binary else 1))]
    if is_binary:
        claims.append(_exact_claims(target, candidate, min_retention, error * SHARE_OF_EXACT))

    def is_claimed(count: int) -> bool:
        return any(claim(count / len(target)) for claim in claims)

    numbers = range(1, MOST_PROMPTS + 1)
    place = bisect_left(numbers, True, key=is_claimed)
    return numbers[place] if place < len(numbers) else None


def _betting_claims(target: Scores, candidate: Scores, min_retention: float, error: float) -> Callable[[float], bool]:
    wealth, goal = _Wealth(target, candidate), -math.log(error)
    return lambda times: wealth.log(min_retention, times) >= goal


def _exact_claims(target: Scores, candidate: Scores, min_retention: float, error: float) -> Callable[[float], bool]:
    """Clopper-Pearson's bound of the losses, asked the other way round and of any share of a prompt: the beta law's
    quantile is at most 1 - min_retention where its distribution function has reached 1 - error there."""
    load_scipy_stats()
    from scipy.special import betainc

    right, lost = target.sum(), (target * (1 - candidate)).sum()
    return lambda times: bool(betainc(times * lost + 1, times * (right - lost), 1 - min_retention) >= 1 - error)


def _mcnemar(lost: int, gained: int) -> float:
    """The exact p-value of as many losses among the prompts that changed, if each were a gain as likely."""
    if lost + gained == 0:
        return 1.0
    return float(load_scipy_stats().binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue)


def _bootstrap_lower(target: Scores, candidate: Scores, confidence: float, num_resamples: int, seed: int) -> float:
    def ratio(own: Any, other: Any, axis: int = -1) -> Any:
        means = other.mean(axis)
        return own.mean(axis) / np.where(means > 0, means, np.inf)

    found = load_scipy_stats().bootstrap(
        (candidate, target),
        ratio,
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        alternative="greater",
        method="percentile",
        n_resamples=num_resamples,
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low)
