"""Whether the mean quality of audited answers is what it should be: statistics that may be looked at after every audit.

Qualities are numbers in [0, 1], of any distribution. What is said of their mean holds at all audits at once, so that
looking often costs nothing. It knows numbers alone; nothing of requests, settings or clocks.

Both questions are bets on the mean being m. A bet with the share c of a capital of 1 multiplies it with
1 - c + c x / m at each quality x, or, on the mean being lower, with 1 - c + c (1 - x) / (1 - m). Where the mean is m or
worse for the bet, no capital grows on average, so that one of 1 / p is seen with probability p at most (Ville). Eight
shares are held at once (`SHARES`), as a portfolio. Source: Waudby-Smith and Ramdas, "Estimating means of bounded random
variables by betting", arXiv 2010.09686.

- A drop is found by capitals that are put in anew at every audit (Shiryaev-Roberts; arXiv 2203.03532), so that it is
  found as soon after months as at once. Together they have put in one a time, so that they are worth A / p at some time
  within A audits with probability p at most.
- That the quality is as it should be has to be shown within each period of so many audits (`audits_to_judge`) that a
  good one fails once in its share of the error rate. Two periods run half a length apart.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

ERROR_AUDITS = 100_000
"""The audits that an error rate is for."""
CONFIDENCE = 0.95
"""Of the lower bound."""
GOOD_SHARE = 0.25
"""Of the loss that min_quality allows: what a good setting loses at most."""

Floats = npt.NDArray[np.float64]
Verdict = Literal["dropped", "unproven"]
"""Why a quality is not what it should be: "dropped", its mean is certainly lower; "unproven", a period's audits did not
show that it is as high."""

SHARES: Floats = np.ldexp(1.0, -np.arange(8))
LOSSES: Floats = np.geomspace(0.0005, 0.9, 40)  # of the means that bounds are found among


def good_quality(min_quality: float) -> float:
    """The mean quality from which on a setting is good: the one that is not tripped beyond the error rate."""
    return 1 - GOOD_SHARE * (1 - min_quality)


def audits_to_trip(quality: float, min_quality: float, error_rate: float, sure: float = 0.99) -> int:
    """Audits until a mean quality below min_quality is found, with probability `sure` at least, whatever the
    distribution: the least N such that some y has

        N growth(y, min_quality) >= ln(8 ERROR_AUDITS 2 / error_rate)   and   N kl(y, quality) >= ln(1 / (1 - sure)),

    growth(y, m): the most that a capital of `SHARES` grows in nats an audit where qualities are 0 and 1 with mean y,
    which is within a few percent of kl(y, m), and for every other distribution at least as much. Above, for certain
    qualities: ln(...) / ln(largest of 1 - c + c (1 - quality) / (1 - min_quality)) audits.
    """
    return _least_audits(
        (quality, min_quality),
        lambda y: -math.log(1 - sure) / _kl(y, quality),
        lambda y: math.log(len(SHARES) * drop_capital(error_rate)) / _growth_below(y, min_quality),
    )


@cache
def audits_to_judge(min_quality: float, error_rate: float) -> int:
    """Audits of a period: as many as show a good quality to be above min_quality, whatever the distribution, but for
    the share of the error rate that a period has, since there are 2 ERROR_AUDITS / N of them. In the formula of
    `audits_to_trip` the mean is good_quality(min_quality), and the logarithms are ln(8 / (1 - CONFIDENCE)) and
    ln(4 ERROR_AUDITS / (N error_rate))."""
    good = good_quality(min_quality)

    def needed(num_audits: int) -> int:
        failing = min(0.5, num_audits * error_rate / (4 * ERROR_AUDITS))
        return _least_audits(
            (good, min_quality),
            lambda y: -math.log(failing) / _kl(y, good),
            lambda y: math.log(len(SHARES) / (1 - CONFIDENCE)) / _growth_above(y, min_quality),
        )

    most = needed(1)  # the longer a period, the fewer there are, and the more often each may fail
    return bisect_left(range(most), True, lo=2, key=lambda num_audits: needed(num_audits) <= num_audits)


@dataclass(slots=True)
class _Period:
    """log_capital [means, shares]: of bets on the mean being higher than each; highest: of all shares together, so
    far."""

    log_capital: Floats
    highest: Floats
    num_audits: int = 0
    total: float = 0.0


class QualityWatch:
    """The audits of one setting, from its beginning or from the last reset on.

    min_quality: in (0, 1). error_rate: the probability, at most, that a setting of good_quality(min_quality) or more
    gets a verdict within 100,000 audits.
    """

    def __init__(self, min_quality: float, error_rate: float) -> None:
        self.num_audits = 0
        self._total = 0.0
        self._min_quality = min_quality
        self._means = np.unique(np.append(1 - LOSSES, min_quality))
        self._at = int(np.searchsorted(self._means, min_quality))
        self._log_drop = math.log(len(SHARES) * drop_capital(error_rate))
        self._log_proof = math.log(len(SHARES) / (1 - CONFIDENCE))
        self._num_judged = audits_to_judge(min_quality, error_rate)
        self._below = np.full((len(self._means), len(SHARES)), -np.inf)
        self._periods = [self._new_period()]

    def observe(self, quality: float) -> Verdict | None:
        """Takes the quality of one more answer, and says what is certain then."""
        quality = min(1.0, max(0.0, quality))
        self.num_audits += 1
        self._total += quality
        means = self._means[:, None]
        with np.errstate(divide="ignore"):
            lower_bet = np.log1p(SHARES * ((1 - quality) / (1 - means) - 1))
            higher_bet = np.log1p(SHARES * (quality / means - 1))
        self._below = np.logaddexp(0.0, self._below) + lower_bet
        for period in self._periods:
            period.num_audits += 1
            period.total += quality
            period.log_capital += higher_bet
            np.maximum(period.highest, _log_sum(period.log_capital), out=period.highest)
        return "dropped" if self.upper <= self._min_quality else self._judge()

    @property
    def mean(self) -> float | None:
        """Of all audits; None before the first."""
        return self._total / self.num_audits if self.num_audits else None

    @property
    def lower(self) -> float:
        """What the mean quality of the older period is above, with `CONFIDENCE`; 0 where nothing is known."""
        shown = self._means[self._periods[0].highest >= self._log_proof]
        return float(shown[-1]) if len(shown) else 0.0

    @property
    def upper(self) -> float:
        """What the mean quality is below, of the latest audits where it has changed, with the certainty that a verdict
        of "dropped" needs; 1 where nothing is known."""
        shown = self._means[_log_sum(self._below) >= self._log_drop]
        return float(shown[0]) if len(shown) else 1.0

    def _judge(self) -> Verdict | None:
        """At the end of a period; the next one begins at its middle."""
        first = self._periods[0]
        if first.num_audits == self._num_judged // 2 and len(self._periods) == 1:
            self._periods.append(self._new_period())
        if first.num_audits < self._num_judged:
            return None
        is_proven = first.highest[self._at] >= self._log_proof
        self._periods = [*self._periods[1:], self._new_period()]
        return None if is_proven else "unproven"

    def _new_period(self) -> _Period:
        shape = len(self._means), len(SHARES)
        return _Period(np.zeros(shape), np.full(shape[0], -np.inf))


def drop_capital(error_rate: float) -> float:
    """What a bet on a drop must be worth: half of the error rate is its share."""
    return 2 * ERROR_AUDITS / error_rate


def _log_sum(log_capital: Floats) -> Floats:
    """[means]: of all shares."""
    total: Floats = np.logaddexp.reduce(log_capital, axis=1)
    return total


def _kl(y: float, mean: float) -> float:
    """The divergence of a coin of y from one of `mean`, in nats."""
    parts = [(y, mean), (1 - y, 1 - mean)]
    return sum(p * math.log(p / q) if q > 0 else math.inf for p, q in parts if p > 0)


def _growth_below(y: float, mean: float) -> float:
    """Of bets on a mean below `mean`, where qualities are 0 and 1 with mean y."""
    return _growth(y, -SHARES, SHARES / (1 - mean) - SHARES)


def _growth_above(y: float, mean: float) -> float:
    return _growth(y, SHARES / mean - SHARES, -SHARES)


def _growth(y: float, at_one: Floats, at_zero: Floats) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.log1p(gain) * chance for gain, chance in ((at_one, y), (at_zero, 1 - y)) if chance > 0]
    return max(float(np.max(sum(parts))), 1e-12)


def _least_audits(
    between: tuple[float, float], first: Callable[[float], float], second: Callable[[float], float]
) -> int:
    """The least of max(first(y), second(y)), where `first` falls from y = between[0], where nothing is enough for it,
    to between[1], where nothing is for `second`."""
    near, far = between
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (near, middle) if first(middle) < second(middle) else (middle, far)
    return math.ceil(max(first(far), second(near)))
