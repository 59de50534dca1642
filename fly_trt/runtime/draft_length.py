"""How many draft tokens a step verifies: as many as the measured costs and the recent acceptance say will pay.

What it decides changes speed and never tokens, so it may rest on clocks. It knows positions, seconds and rates; it
knows nothing of requests.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

SMOOTHING = 0.2  # weight of a new measurement
FIRST_RATE = 0.8  # acceptance of a draft token before any was seen
MEMORY = 0.95  # what a round leaves of the evidence before it
FADING = 0.97  # the same for a step without drafts
# Steps without drafts until speculation gets another chance: for each the draft model has to read what it missed, so
# that the next one comes later, unless speculation paid for some steps.
FIRST_WAIT, WAIT_GROWTH, MAX_WAIT = 32, 8, 16_384
PAYING_STEPS = 32
RENEWAL = 8  # steps for which looked-up costs are used again
MAX_KNOWN_STEPS = 256
DOUBT, SURE = 0.5, 5  # what is left at another chance of a cost that was measured fewer than SURE times
PRIOR_TOKENS = 4.0
# Tokens in which drafting has to make up for what the draft model must read first of a sequence that it fell behind.
CATCH_UP_TOKENS = 64


class CostCurve:
    """Seconds of a step by its positions (rows x tokens), from measurements, interpolated between powers of two."""

    def __init__(self) -> None:
        self.num_observed = 0
        self._positions: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._curve: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None

    def observe(self, num_positions: int, seconds: float) -> None:
        self.num_observed += 1
        bucket = (num_positions - 1).bit_length()
        if bucket not in self._seconds:
            self._positions[bucket], self._seconds[bucket] = num_positions, seconds
        else:
            self._positions[bucket] += SMOOTHING * (num_positions - self._positions[bucket])
            self._seconds[bucket] += SMOOTHING * (seconds - self._seconds[bucket])
        self._curve = None

    def __len__(self) -> int:
        return len(self._seconds)

    def __call__(self, num_positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Expected seconds, rising with the positions; beyond the largest measured step in proportion to it."""
        if self._curve is None:
            buckets = sorted(self._seconds)
            positions = np.array([self._positions[b] for b in buckets])
            seconds = np.maximum.accumulate([self._seconds[b] for b in buckets])
            self._curve = positions, seconds
        positions, seconds = self._curve
        known: npt.NDArray[np.float64] = np.interp(num_positions, positions, seconds)
        beyond: npt.NDArray[np.float64] = np.maximum(1.0, num_positions / positions[-1])
        return known * beyond


class AcceptanceRate:
    """How likely a draft token stands, from a request's recent rounds and from what other requests saw: where drafts
    hardly pay, a few rounds alone would switch them off and on."""

    __slots__ = ("_accepted", "_expected", "_rejected", "_weight")

    def __init__(self, expected: float) -> None:
        self._expected = expected
        self._weight = PRIOR_TOKENS  # of what was expected, in tokens
        self._accepted = self._rejected = 0.0

    @property
    def value(self) -> float:
        expected = self._weight * self._expected
        return (expected + self._accepted) / (self._weight + self._accepted + self._rejected)

    def observe(self, num_accepted: int, was_rejected: bool) -> None:
        self._accepted = MEMORY * self._accepted + num_accepted
        self._rejected = MEMORY * self._rejected + was_rejected

    def fade(self) -> None:
        """A step without drafts says nothing; what is known ages towards what was expected."""
        self._accepted *= FADING
        self._rejected *= FADING

    def forget(self) -> None:
        """Starts anew from the first guess, which a single round corrects."""
        self._expected, self._weight = FIRST_RATE, 1.0
        self._accepted = self._rejected = 0.0


class DraftLength:
    """Chooses the draft tokens of the next step, the same number for all its rows: a row that drafted less would be
    padded to the longest and cost as much."""

    def __init__(self, max_draft_tokens: int, *, adaptive: bool) -> None:
        self.max_draft_tokens = max_draft_tokens
        self.adaptive = adaptive
        self._usual = AcceptanceRate(FIRST_RATE)
        self.target_cost = CostCurve()
        self._draft_seconds: dict[int, float] = {}  # of one more draft token, by rows
        self._num_measured: Counter[int] = Counter()  # by rows
        self._lengths = np.arange(max_draft_tokens + 1)
        self._num_rests = 0  # steps without drafts, all of them and since the last chance
        self._num_waited = 0
        self._wait = FIRST_WAIT
        self._num_paying = 0  # steps with drafts beyond those without since the last chance
        self._known_seconds: dict[tuple[int, int, int], tuple[int, list[float]]] = {}

    def observe_drafting(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """`seconds` to draft up to `num_tokens` tokens for each of `num_rows` rows."""
        each = seconds / num_tokens
        self._num_measured[num_rows] += 1
        weight = max(SMOOTHING, 1 / self._num_measured[num_rows])
        before = self._draft_seconds.get(num_rows, each)
        self._draft_seconds[num_rows] = before + weight * (each - before)

    def rest(self) -> bool:
        """A step without drafts, although some could have been made. True when it is time for another chance, at which
        costs that were hardly measured are doubted too."""
        self._num_rests += 1
        self._num_waited += 1
        self._num_paying = max(0, self._num_paying - 1)
        if self._num_waited < self._wait:
            return False
        for rows, num_measured in self._num_measured.items():
            if num_measured < SURE:
                self._draft_seconds[rows] *= DOUBT
        self._wait = min(self._wait * WAIT_GROWTH, MAX_WAIT)
        self._num_waited = self._num_paying = 0
        return True

    @property
    def usual_rate(self) -> float:
        """What a new request starts from: what the last rounds of all requests say."""
        return self._usual.value

    def observe_round(self, num_accepted: int, was_rejected: bool) -> None:
        """A request's round with drafts ended."""
        self._usual.observe(num_accepted, was_rejected)

    def choose(self, rates: Sequence[float], limits: Sequence[int], num_context: int, num_unread: int = 0) -> int:
        """Draft tokens 0 .. max(limits) for a step of len(rates) rows with `num_context` context tokens each: the
        number with the most expected tokens per second, where rates are the rows' acceptance rates and limits,
        0 .. max_draft_tokens, the draft tokens that each of them has at most. num_unread: tokens of the rows that the
        draft model has to read before it drafts."""
        longest = max(limits)
        if not self.adaptive or not len(self.target_cost) or not longest:
            return longest
        seconds = self._step_seconds(len(rates), len(rates) - limits.count(0), num_context)
        parts = _equal_parts(longest)
        expected = float(len(rates))  # tokens: the accepted prefixes and the target's own
        best, best_speed = 0, expected / seconds[0]
        reading = self._reading_seconds(num_unread) / CATCH_UP_TOKENS
        chances = [1.0] * len(rates)
        for length in range(1, longest + 1):
            chances = [
                chance * rate if length <= limit else 0.0
                for chance, rate, limit in zip(chances, rates, limits, strict=True)
            ]
            expected += sum(chances)
            if length in parts and expected > best_speed * (seconds[length] + reading):
                best, best_speed = length, expected / (seconds[length] + reading)
        self._num_paying += best > 0
        if self._num_paying >= PAYING_STEPS:
            self._wait = FIRST_WAIT
        return best

    def choose_forced(
        self, forced: Sequence[int], rates: Sequence[float], num_rows: int, num_draft: int, num_context: int
    ) -> int:
        """How many draft tokens that stand for sure pay in a step of `num_rows`: `forced` of each row that decodes,
        where other drafts stand at its rate. At least `num_draft`, which are part of the step as it is."""
        longest = max(forced)
        if not self.adaptive or not len(self.target_cost) or longest <= num_draft:
            return max(longest, num_draft)
        lengths = np.arange(num_draft, longest + 1)
        drafted = np.array([sum(rate**length for length in range(1, num_draft + 1)) for rate in rates])
        expected = len(forced) + np.maximum(drafted, np.minimum(np.array(forced), lengths[:, None])).sum(axis=1)
        drafting = self._draft_cost(len(forced)) * num_draft
        seconds = self.target_cost(num_rows * (num_context + lengths)) + drafting
        return int(lengths[np.argmax(expected / seconds)])

    def _step_seconds(self, num_rows: int, num_drafting: int, num_context: int) -> list[float]:
        """Expected seconds of drafting 0 .. max_draft_tokens tokens for `num_drafting` rows and verifying them in a
        step of `num_rows`; looked up for a few steps, because one measurement more hardly changes them."""
        num_changes = self.target_cost.num_observed + self._num_rests
        known = self._known_seconds.get((num_rows, num_drafting, num_context))
        if known is not None and num_changes - known[0] < RENEWAL:
            return known[1]
        drafting = self._draft_cost(num_drafting) * self._lengths
        verifying = self.target_cost(num_rows * (num_context + self._lengths))
        seconds: list[float] = (verifying + drafting).tolist()
        if len(self._known_seconds) > MAX_KNOWN_STEPS:
            self._known_seconds.clear()
        self._known_seconds[num_rows, num_drafting, num_context] = num_changes, seconds
        return seconds

    def _reading_seconds(self, num_tokens: int) -> float:
        """Expected seconds in which the draft model reads so many tokens: the target's cost of them, in proportion."""
        if not num_tokens:
            return 0.0
        one, all_ = self.target_cost(np.array([1, num_tokens]))
        return float(self._draft_cost(1) * all_ / one)

    def _draft_cost(self, num_rows: int) -> float:
        if not self._draft_seconds:
            return 0.0
        nearest = min(self._draft_seconds, key=lambda rows: abs(rows - num_rows))
        return self._draft_seconds[nearest] * max(1.0, num_rows / nearest)


@cache
def _equal_parts(num_draft: int) -> frozenset[int]:
    """Draft tokens of a step that verifies a loose round of `num_draft` whole or in equal parts: a short rest would be
    padded to the other rows' length."""
    whole = num_draft + 1
    return frozenset(-(-whole // num_parts) - 1 for num_parts in range(1, whole + 1))
