"""From moments and tokens to figures."""

import math

import numpy as np
import pytest

from fly_trt import ConfigError, RequestMetrics
from fly_trt.benchmark.client import Exchange, Load
from fly_trt.benchmark.results import Round, Row, Spread, summarise, wilson_interval
from fly_trt.benchmark.workload import BenchmarkPrompt

PROMPTS = [BenchmarkPrompt("a", {"kind": "contains", "value": "yes"}), BenchmarkPrompt("b")]


def exchange(*moments: float, tokens: int, accepted: int = 0, steps: int = 0, text: str = "yes") -> Exchange:
    counts = RequestMetrics(num_accepted_tokens=accepted, num_spec_steps=steps, acceptance_histogram=[0, steps])
    return Exchange(100.0, [100 + moment for moment in moments], list(range(tokens)), text, counts)


def rounds(*seconds: float, tokens: int = 6, **changes: object) -> list[Round]:
    return [Round([exchange(1, 2, 5, tokens=tokens, **changes), exchange(2, 4, tokens=2)], took) for took in seconds]


def row(own: list[Round], **others: list[Round]) -> Row:
    return summarise(Load(concurrency=1), {**others, "fly": own}, PROMPTS)[-1]


def test_a_spread_is_the_median_the_least_and_the_greatest_of_the_rounds() -> None:
    assert Spread.of([5, 1, 3]) == Spread(3, 1, 5, [5, 1, 3])
    assert Spread.of([2, 4]) == Spread(3, 2, 4, [2, 4])
    assert Spread.of([]) is None
    assert Spread.of([1, None]) is None


def test_speeds_are_compared_within_each_round() -> None:
    """The machine was four times as slow in the second round, for both modes."""
    found = row(rounds(1, 4), autoregressive=rounds(2, 8), exact=rounds(1, 5))
    assert found.tokens_per_second == Spread(5, 2, 8, [8, 2])
    assert found.speed_up_over_autoregressive == Spread(2, 2, 2, [2, 2])
    assert found.speed_up_over_exact == Spread(1.125, 1, 1.25, [1, 1.25])
    assert row(rounds(1)).speed_up_over_autoregressive is None


def test_latencies_are_gaps_between_chunks() -> None:
    found = row(rounds(1))
    assert found.time_to_first_token_ms.median == 1500  # of 1 s and 2 s
    assert found.inter_token_latency_ms_p50.median == 2000  # of 1 s, 3 s and 2 s
    assert found.inter_token_latency_ms_p99.median == pytest.approx(2980)
    assert found.time_per_output_token_ms.median == pytest.approx(1000 * (4 / 5 + 2) / 2)
    alone = Round([exchange(1, tokens=1), exchange(1, tokens=1)], 1)
    assert row([alone]).inter_token_latency_ms_p50 is None
    assert row([alone]).time_per_output_token_ms is None


def test_acceptance_length_counts_the_targets_own_token_and_rounds_are_pooled_in_the_histogram() -> None:
    found = row(rounds(1, 1, accepted=6, steps=4))
    assert found.mean_acceptance_length == Spread(2.5, 2.5, 2.5, [2.5, 2.5])
    assert found.acceptance_histogram == [0, 8]
    assert row(rounds(1)).mean_acceptance_length is None


def test_accepted_tokens_are_counted_by_round_and_source() -> None:
    def drafted(**accepted: int) -> list[Round]:
        own = rounds(1, accepted=6, steps=4)
        for source, count in accepted.items():
            own[0].exchanges[0].metrics.num_draft_tokens_by_source[source] = count + 5
            own[0].exchanges[0].metrics.num_accepted_tokens_by_source[source] = count
        return own

    found = row(drafted(model=6, lookup=0) + drafted(model=2))
    assert found.accepted_by_source == {"model": Spread(1, 0.5, 1.5, [1.5, 0.5]), "lookup": Spread(0, 0, 0, [0, 0])}
    assert row(rounds(1)).accepted_by_source == {}


def test_right_answers_and_same_outputs_are_relative_to_autoregressive() -> None:
    found = row(rounds(1, text="no"), autoregressive=rounds(1, tokens=5))
    assert (found.right_answers.median, found.num_checks, found.accuracy_retention.median) == (0, 1, 0)
    assert found.same_as_autoregressive.median == 0.5
    assert row(rounds(1), autoregressive=rounds(1, text="no")).accuracy_retention is None
    unchecked = summarise(Load(concurrency=1), {"fly": rounds(1)}, [PROMPTS[1]] * 2)[0]
    assert (unchecked.right_answers, unchecked.num_checks) == (None, 0)


@pytest.mark.parametrize(
    ("num_right", "count", "interval"),
    [(231, 240, (0.9303, 0.9801)), (0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (1, 2, (0.0945, 0.9055))],
)
def test_an_interval_is_wilsons(num_right: int, count: int, interval: tuple[float, float]) -> None:
    """Each end is the share p from which the share seen is 1.96 standard deviations of p away."""
    found = wilson_interval(num_right, count)
    assert found == pytest.approx(interval, abs=1e-4)
    for share in found:
        if share not in (0, pytest.approx(1)):
            deviations = abs(num_right / count - share) / math.sqrt(share * (1 - share) / count)
            assert deviations == pytest.approx(1.96, abs=1e-3)


def test_the_interval_is_of_the_median_round() -> None:
    assert row(rounds(1)).right_answers_interval == wilson_interval(1, 1)
    unchecked = summarise(Load(concurrency=1), {"fly": rounds(1)}, [PROMPTS[1]] * 2)[0]
    assert unchecked.right_answers_interval is None


def test_a_common_prefix_is_a_share_of_the_longer_output() -> None:
    plain = [Round([exchange(1, tokens=4), exchange(1, tokens=2)], 1)]
    own = [Round([exchange(1, tokens=4), exchange(1, tokens=2)], 1)]
    own[0].exchanges[0].token_ids = [0, 1, 9, 3, 4, 5, 6, 7]
    found = row(own, autoregressive=plain)
    assert found.common_prefix_with_autoregressive.median == (2 / 8 + 1) / 2
    assert found.same_as_autoregressive.median == 0.5
    assert row(own).common_prefix_with_autoregressive is None


def test_loosened_tokens_are_counted_by_100_emitted() -> None:
    own = rounds(1, tokens=6)
    own[0].exchanges[0].metrics.num_loosened_tokens = 2
    assert (row(own).loosened_tokens.median, row(own).loosened_per_100.median) == (2, 25)


def test_perplexities_are_compared_by_token() -> None:
    def scored(*log_likelihoods: float, tokens: int = 6) -> list[Round]:
        own = rounds(1, tokens=tokens)
        for one, log_likelihood in zip(own[0].exchanges, log_likelihoods, strict=True):
            one.log_likelihood = log_likelihood
        return own

    found = row(scored(-6, -6), autoregressive=scored(-3, -3, tokens=4))
    assert found.nll_per_token.median == 12 / 8
    assert found.nll_deviation.median == 1  # of 1 and 3
    assert found.perplexity_over_autoregressive.median == pytest.approx(math.exp(12 / 8 - 6 / 6))
    unknown = row(rounds(1), autoregressive=rounds(1))
    assert (unknown.nll_per_token, unknown.nll_deviation, unknown.perplexity_over_autoregressive) == (None, None, None)


def test_arrivals_are_a_poisson_process_of_the_seed() -> None:
    load = Load(request_rate=4)
    moments = load.arrivals(4000, seed=1)
    assert moments == load.arrivals(4000, seed=1)
    assert moments != load.arrivals(4000, seed=2)
    assert moments[0] == 0
    gaps = np.diff(moments)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.05)  # of exponential gaps it is the mean
    assert (gaps > 1 / 4).mean() == pytest.approx(math.exp(-1), abs=0.03)
    assert Load(request_rate=math.inf).arrivals(3, 0) == Load(concurrency=1).arrivals(3, 0) == [0, 0, 0]


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({}, "either a concurrency or a request_rate"),
        ({"concurrency": 1, "request_rate": 1}, "either a concurrency or a request_rate"),
        ({"concurrency": 0}, "concurrency 0: expected at least 1"),
        ({"request_rate": 0.0}, "request_rate 0: expected requests per second, above 0, or inf"),
        ({"request_rate": math.nan}, "request_rate nan"),
    ],
)
def test_an_impossible_load_is_refused(load: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Load(**load)
