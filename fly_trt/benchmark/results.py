"""From exchanges to figures: one `Round` of a mode, and over the rounds of all modes a `Row` of the report each.

Every figure is a median over the rounds with the least and the greatest, which say how noisy the machine was. Those
that compare two modes do it within each round, since modes take turns and a slow moment slows both.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fly_trt.benchmark.checks import is_right
from fly_trt.benchmark.client import Exchange, Load
from fly_trt.benchmark.modes import AUTOREGRESSIVE, EXACT
from fly_trt.benchmark.step_log import NotedStep
from fly_trt.benchmark.workload import BenchmarkPrompt
from fly_trt.drafting.base import common_prefix
from fly_trt.outputs import RequestMetrics

CONFIDENCE = 1.959964  # standard deviations around the mean of a normal distribution that hold 95 % of it


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure of each round, and their median, least and greatest."""

    median: float
    min: float
    max: float
    rounds: list[float]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """None when a round has no such figure."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        return cls(statistics.median(known), min(known), max(known), known)


@dataclass(slots=True)
class Round:
    """One mode in one round: its exchanges by prompt, the seconds that they took, and, where a log is kept, the steps
    of the engines."""

    exchanges: list[Exchange]
    seconds: float
    steps: list[NotedStep] = field(default_factory=list)

    def metrics(self) -> RequestMetrics:
        """Counts over all requests."""
        first, *others = [exchange.metrics for exchange in self.exchanges]
        return first.merged(others)

    def tokens_per_second(self) -> float:
        return self.num_output_tokens() / self.seconds

    def num_output_tokens(self) -> int:
        return sum(len(exchange.token_ids) for exchange in self.exchanges)

    def mean_acceptance_length(self) -> float | None:
        return self.metrics().mean_acceptance_length or None

    def accepted_by_source(self) -> dict[str, float]:
        """Emitted draft tokens by round of speculation, from each source that drafted."""
        counts = self.metrics()
        accepted = counts.num_accepted_tokens_by_source
        return {source: accepted.get(source, 0) / counts.num_spec_steps for source in counts.num_draft_tokens_by_source}

    def time_to_first_token_ms(self) -> float:
        return 1e3 * statistics.median(exchange.time_to_first_token for exchange in self.exchanges)

    def inter_token_latency_ms(self, percentile: float) -> float | None:
        gaps = [gap for exchange in self.exchanges for gap in exchange.inter_token_latencies]
        return 1e3 * float(np.percentile(gaps, percentile)) if gaps else None

    def time_per_output_token_ms(self) -> float | None:
        known = [time for exchange in self.exchanges if (time := exchange.time_per_output_token) is not None]
        return 1e3 * statistics.fmean(known) if known else None

    def num_right(self, prompts: Sequence[BenchmarkPrompt]) -> int | None:
        """None without a check."""
        pairs = zip(prompts, self.exchanges, strict=True)
        verdicts = [is_right(prompt.check, exchange.text) for prompt, exchange in pairs if prompt.check is not None]
        return sum(verdicts) if verdicts else None

    def loosened_per_100(self) -> float:
        """Loosened tokens by 100 output tokens."""
        return 100 * self.metrics().num_loosened_tokens / self.num_output_tokens()

    def nll_per_token(self) -> float | None:
        """-ln p of the output tokens under the target, in nats, mean over the tokens of all requests."""
        known = [exchange.log_likelihood for exchange in self.exchanges]
        if None in known:
            return None
        return -sum(value for value in known if value is not None) / self.num_output_tokens()

    def nll_deviation(self) -> float | None:
        """Standard deviation of it over the requests."""
        known = [nll for exchange in self.exchanges if (nll := exchange.nll_per_token) is not None]
        return statistics.pstdev(known) if len(known) == len(self.exchanges) else None

    def share_of_common_prefixes(self, other: "Round") -> float:
        """How much of an output, of 1, is as in `other` up to the first difference; mean over the requests."""
        shares = []
        for a, b in zip(self.exchanges, other.exchanges, strict=True):
            kept = common_prefix(np.array(a.token_ids), np.array(b.token_ids))
            shares.append(kept / max(len(a.token_ids), len(b.token_ids)))
        return statistics.fmean(shares)

    def share_of_same_outputs(self, other: "Round") -> float:
        """How many of the prompts, of 1, have the tokens that they have in `other`."""
        pairs = zip(self.exchanges, other.exchanges, strict=True)
        return statistics.fmean(a.token_ids == b.token_ids for a, b in pairs)


@dataclass(frozen=True, slots=True)
class Row:
    """One mode under one load. Every Spread is over the rounds; None means that there is no such figure.

    tokens_per_second: output tokens of all requests by the time they took together, prompts included.
    speed_up_over_autoregressive, speed_up_over_exact: ratios of it within each round.
    mean_acceptance_length: 1 + emitted draft tokens by round of speculation, as RequestMetrics has it.
    accepted_by_source: the emitted draft tokens by round of speculation, by where they came from.
    loosened_tokens: emitted draft tokens that the target did not choose; loosened_per_100: by 100 output tokens.
    time_to_first_token_ms: median over the requests, from sending a request to its first chunk of output.
    inter_token_latency_ms_p50, _p99: percentiles over all gaps between two consecutive chunks of a request; a chunk is
    what a step brought, several tokens at once with speculation. time_per_output_token_ms: mean over the requests of
    the time from the first chunk to the last by output token but the first.
    right_answers: prompts whose check passes, of `num_checks`. right_answers_interval: the 95 % interval (Wilson's) of
    the share that the median of them is. accuracy_retention: right answers relative to autoregressive.
    same_as_autoregressive: share of the prompts with the same tokens. common_prefix_with_autoregressive: tokens before
    the first difference by those of the longer output, mean over the prompts.
    nll_per_token: -ln p(token) of the output tokens under the target, in nats, mean over all of them. nll_deviation:
    standard deviation over the prompts of each one's mean. perplexity_over_autoregressive: exp of what nll_per_token
    is above autoregressive's.
    acceptance_histogram[a]: rounds of speculation that emitted `a` draft tokens, over all rounds of the benchmark.
    """

    mode: str
    load: Load
    num_checks: int
    tokens_per_second: Spread | None
    speed_up_over_autoregressive: Spread | None
    speed_up_over_exact: Spread | None
    mean_acceptance_length: Spread | None
    accepted_by_source: dict[str, Spread]
    loosened_tokens: Spread | None
    loosened_per_100: Spread | None
    time_to_first_token_ms: Spread | None
    inter_token_latency_ms_p50: Spread | None
    inter_token_latency_ms_p99: Spread | None
    time_per_output_token_ms: Spread | None
    right_answers: Spread | None
    right_answers_interval: tuple[float, float] | None
    accuracy_retention: Spread | None
    same_as_autoregressive: Spread | None
    common_prefix_with_autoregressive: Spread | None
    nll_per_token: Spread | None
    nll_deviation: Spread | None
    perplexity_over_autoregressive: Spread | None
    num_output_tokens: Spread | None
    seconds: Spread | None
    acceptance_histogram: list[int]


def summarise(load: Load, rounds: Mapping[str, list[Round]], prompts: Sequence[BenchmarkPrompt]) -> list[Row]:
    """A row for each mode of `rounds`."""
    plain, exact = rounds.get(AUTOREGRESSIVE), rounds.get(EXACT)
    return [_row(mode, load, own, plain, exact, prompts) for mode, own in rounds.items()]


def _by_source(rounds: list[dict[str, float]]) -> dict[str, Spread]:
    sources = dict.fromkeys(source for round_ in rounds for source in round_)
    spreads = {source: Spread.of([round_.get(source, 0.0) for round_ in rounds]) for source in sources}
    return {source: spread for source, spread in spreads.items() if spread is not None}


def wilson_interval(num_right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `num_right` of `count` was seen (Wilson 1927)."""
    share, square = num_right / count, CONFIDENCE**2
    centre = share + square / (2 * count)
    reach = CONFIDENCE * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    scale = 1 + square / count
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def _row(
    mode: str,
    load: Load,
    rounds: list[Round],
    plain: list[Round] | None,
    exact: list[Round] | None,
    prompts: Sequence[BenchmarkPrompt],
) -> Row:
    def each(figure: Callable[[Round], float | None]) -> Spread | None:
        return Spread.of([figure(round_) for round_ in rounds])

    def against(others: list[Round] | None, figure: Callable[[Round, Round], float | None]) -> Spread | None:
        if others is None:
            return None
        return Spread.of([figure(*pair) for pair in zip(rounds, others, strict=True)])

    def speed_up(own: Round, other: Round) -> float:
        return own.tokens_per_second() / other.tokens_per_second()

    def retention(own: Round, other: Round) -> float | None:
        right, of = own.num_right(prompts), other.num_right(prompts)
        return right / of if right is not None and of else None

    def perplexity_ratio(own: Round, other: Round) -> float | None:
        nll, of = own.nll_per_token(), other.nll_per_token()
        return None if nll is None or of is None else math.exp(nll - of)

    right_answers = each(lambda own: own.num_right(prompts))
    num_checks = sum(prompt.check is not None for prompt in prompts)
    every, *others = [round_.metrics() for round_ in rounds]
    return Row(
        mode=mode,
        load=load,
        num_checks=num_checks,
        tokens_per_second=each(Round.tokens_per_second),
        speed_up_over_autoregressive=against(plain, speed_up),
        speed_up_over_exact=against(exact, speed_up),
        mean_acceptance_length=each(Round.mean_acceptance_length),
        accepted_by_source=_by_source([round_.accepted_by_source() for round_ in rounds]),
        loosened_tokens=each(lambda own: own.metrics().num_loosened_tokens),
        loosened_per_100=each(Round.loosened_per_100),
        time_to_first_token_ms=each(Round.time_to_first_token_ms),
        inter_token_latency_ms_p50=each(lambda own: own.inter_token_latency_ms(50)),
        inter_token_latency_ms_p99=each(lambda own: own.inter_token_latency_ms(99)),
        time_per_output_token_ms=each(Round.time_per_output_token_ms),
        right_answers=right_answers,
        right_answers_interval=wilson_interval(right_answers.median, num_checks) if right_answers else None,
        accuracy_retention=against(plain, retention),
        same_as_autoregressive=against(plain, Round.share_of_same_outputs),
        common_prefix_with_autoregressive=against(plain, Round.share_of_common_prefixes),
        nll_per_token=each(Round.nll_per_token),
        nll_deviation=each(Round.nll_deviation),
        perplexity_over_autoregressive=against(plain, perplexity_ratio),
        num_output_tokens=each(Round.num_output_tokens),
        seconds=each(lambda own: own.seconds),
        acceptance_histogram=every.merged(others).acceptance_histogram,
    )
