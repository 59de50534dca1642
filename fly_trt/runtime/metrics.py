"""What a running service did, as Prometheus metrics on a registry of its own.

Names follow vLLM's with the prefix `fly_trt:`. Everything that can be is a counter: acceptance rate is
rate(fly_trt:spec_decode_num_accepted_tokens_total) / rate(fly_trt:spec_decode_num_draft_tokens_total), mean acceptance
length is 1 + rate(..._num_accepted_tokens_total) / rate(..._num_drafts_total).

The engine thread counts in plain numbers, which costs a tenth of prometheus_client's own counters; they become metrics
when somebody asks.
"""

import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from fly_trt.acceptance import GUARDS
from fly_trt.outputs import RoundCounts

logger = logging.getLogger(__name__)

PREFIX = "fly_trt:"
LOG_SECONDS = 10.0
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
BLOCK_TOKENS = 16
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

COUNTERS = {
    "spec_decode_num_drafts": "Rounds with a draft.",
    "spec_decode_num_draft_tokens": "Draft tokens verified by the target.",
    "spec_decode_num_accepted_tokens": "Draft tokens that were emitted.",
    "spec_decode_num_loosened_tokens": "Emitted draft tokens that the target did not choose.",
    "spec_decode_num_saved_tokens": "Emitted draft tokens that exact verification would not have accepted.",
    "requests_made_exact": "Loose requests that the breaker made exact, as a whole or from somewhere on.",
    "prompt_tokens": "Prompt tokens of admitted requests.",
    "generation_tokens": "Tokens emitted.",
    "prefix_cache_queries": "Prompt tokens looked up in the cache.",
    "prefix_cache_hits": "Prompt tokens whose cache was reused.",
}
BY_SOURCE = {
    "spec_decode_num_draft_tokens_by_source": "Draft tokens verified, by policy and by where they come from.",
    "spec_decode_num_accepted_tokens_by_source": "Draft tokens emitted, by policy and by where they come from.",
}
GAUGES = {
    "num_requests_running": "Requests in slots.",
    "num_requests_waiting": "Requests in the queue.",
    "kv_cache_usage_perc": "Used part of the KV cache; 1 is all of it.",
}


class Histogram:
    """Observations by bucket; the last bucket is beyond all bounds."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self.name = name
        self._text = text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += count * value

    def family(self) -> HistogramMetricFamily:
        total = 0
        buckets = []
        for bound, count in zip([*map(float, self._bounds), float("inf")], self._counts, strict=True):
            total += count
            buckets.append((str(bound) if bound != float("inf") else "+Inf", total))
        return HistogramMetricFamily(PREFIX + self.name, self._text, buckets=buckets, sum_value=self._sum)


class Metrics:
    """Counters, gauges and histograms of one runtime; the engine thread writes them, any thread may read them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._levels = dict.fromkeys(GAUGES, 0.0)
        self._rounds_by_length: Counter[int] = Counter()  # rounds by the draft tokens that they emitted
        self._by_source: tuple[Counter[tuple[str, str]], ...] = (Counter(), Counter())  # by policy and source
        self._loosened: Counter[str] = Counter()  # by policy
        self._refused = Counter(dict.fromkeys(GUARDS, 0))  # by guard
        self._ended: Counter[str] = Counter()
        self._first_token = Histogram("time_to_first_token_seconds", "From arrival.", FIRST_TOKEN_SECONDS)
        self._inter_token = Histogram(
            "inter_token_latency_seconds", "Time between two steps' tokens, per token.", TOKEN_SECONDS
        )
        self._latency = Histogram("e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_SECONDS)
        self._num_cache_tokens = 0
        self._setting: dict[str, str] = {}
        self._window = (0.0, 0, 0, 0)  # time and counters when the last line was logged
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's collector interface."""
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, text, value=self._counts[name])
        per_position = CounterMetricFamily(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos",
            "Emitted draft tokens by position in the draft.",
            labels=["position"],
        )
        rounds = dict(self._rounds_by_length)
        for position in range(max(rounds, default=1) or 1):
            num_emitted = sum(count for length, count in rounds.items() if length > position)
            per_position.add_metric([str(position)], num_emitted)
        yield per_position
        for (name, text), table in zip(BY_SOURCE.items(), self._by_source, strict=True):
            family = CounterMetricFamily(PREFIX + name, text, labels=["acceptance", "source"])
            for labels, count in dict(table).items():
                family.add_metric(labels, count)
            yield family
        loosened = CounterMetricFamily(
            PREFIX + "spec_decode_num_loosened_tokens_by_policy",
            "Emitted draft tokens that the target did not choose, by policy.",
            labels=["acceptance"],
        )
        for acceptance, count in dict(self._loosened).items():
            loosened.add_metric([acceptance], count)
        yield loosened
        refused = CounterMetricFamily(
            PREFIX + "spec_decode_num_refused_loosenings",
            "Draft tokens that the policy would have loosened and a guard turned down, by guard.",
            labels=["guard"],
        )
        for guard, count in dict(self._refused).items():
            refused.add_metric([guard], count)
        yield refused
        ended = CounterMetricFamily(
            PREFIX + "request_success", "Requests that ended, by reason.", labels=["finished_reason"]
        )
        for reason, count in dict(self._ended).items():
            ended.add_metric([reason], count)
        yield ended
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=self._levels[name])
        if self._num_cache_tokens:
            blocks = str(BLOCK_TOKENS), str(self._num_cache_tokens // BLOCK_TOKENS)
            info = GaugeMetricFamily(
                PREFIX + "cache_config_info",
                "How much the KV cache holds, in blocks as routers count it; always 1.",
                labels=["block_size", "num_gpu_blocks"],
            )
            info.add_metric(blocks, 1)
            yield info
        if self._setting:
            running = GaugeMetricFamily(
                PREFIX + "setting_info", "Which setting runs by default; always 1.", labels=list(self._setting)
            )
            running.add_metric(list(self._setting.values()), 1)
            yield running
        for histogram in (self._first_token, self._inter_token, self._latency):
            yield histogram.family()

    def as_dict(self) -> dict[str, float]:
        """Every sample by name; labels as in the text format: name{position="3"}."""
        values = {}
        for family in self.registry.collect():
            for sample in family.samples:
                labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
                values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return values

    def record_round(self, round_: RoundCounts, acceptance: str) -> None:
        """acceptance: the name of the request's policy."""
        counts = self._counts
        counts["spec_decode_num_drafts"] += 1
        counts["spec_decode_num_draft_tokens"] += round_.num_draft
        counts["spec_decode_num_accepted_tokens"] += round_.num_accepted
        counts["spec_decode_num_loosened_tokens"] += round_.num_loosened
        self._rounds_by_length[round_.num_accepted] += 1
        counts["spec_decode_num_saved_tokens"] += round_.num_saved
        self._loosened[acceptance] += round_.num_loosened
        if round_.refused_by is not None:
            self._refused[round_.refused_by] += 1
        both = round_.drafted_by_source, round_.accepted_by_source
        for table, by_source in zip(self._by_source, both, strict=True):
            for source, count in by_source.items():
                table[acceptance, source] += count

    def record_tokens(self, num_tokens: int, seconds: float, *, is_first: bool) -> None:
        """Tokens that a step emitted for one sequence, `seconds` after its arrival or after those before them."""
        self._counts["generation_tokens"] += num_tokens
        if is_first:
            self._first_token.observe(seconds)
        else:
            self._inter_token.observe(seconds / num_tokens, num_tokens)

    def record_prompt(self, num_tokens: int, num_hits: int) -> None:
        """A sequence that was admitted ended: its prompt, and the tokens of it whose cache was reused."""
        self._counts["prompt_tokens"] += num_tokens
        self._counts["prefix_cache_queries"] += num_tokens
        self._counts["prefix_cache_hits"] += num_hits

    def record_end(self, reason: str, seconds: float) -> None:
        self._ended[reason] += 1
        self._latency.observe(seconds)

    def record_made_exact(self) -> None:
        self._counts["requests_made_exact"] += 1

    def set_cache(self, num_tokens: int) -> None:
        """How many tokens the KV cache of all slots holds."""
        self._num_cache_tokens = num_tokens

    def set_setting(self, labels: dict[str, str]) -> None:
        """Which setting runs by default."""
        self._setting = labels

    def set_load(self, num_running: int, num_waiting: int, cache_usage: float) -> None:
        """The gauges, and once in LOG_SECONDS one line in the log."""
        self._levels["num_requests_running"] = num_running
        self._levels["num_requests_waiting"] = num_waiting
        self._levels["kv_cache_usage_perc"] = cache_usage
        elapsed = time.perf_counter() - self._window[0]
        if elapsed >= LOG_SECONDS:
            self._log(is_idle=elapsed >= 2 * LOG_SECONDS)

    def _log(self, *, is_idle: bool) -> None:
        """A window that nothing ran in for long says nothing about speed: the next one starts here."""
        counts, levels = self._counts, self._levels
        window = (
            time.perf_counter(),
            counts["generation_tokens"],
            counts["spec_decode_num_drafts"],
            counts["spec_decode_num_accepted_tokens"],
        )
        seconds, tokens, drafts, accepted = (new - old for new, old in zip(window, self._window, strict=True))
        self._window = window
        if is_idle:
            return
        hits, queries = counts["prefix_cache_hits"], counts["prefix_cache_queries"]
        logger.info(
            "running %d, waiting %d, %.1f tokens/s, acceptance length %.2f, KV cache %.1f %%, prefix reuse %.1f %%",
            levels["num_requests_running"],
            levels["num_requests_waiting"],
            tokens / seconds,
            1 + accepted / drafts if drafts else 1.0,
            100 * levels["kv_cache_usage_perc"],
            100 * hits / queries if queries else 0.0,
        )
