"""What a running service did, as Prometheus metrics on a registry of its own.

Names follow vLLM's with the prefix `fly_trt:`. Everything that can be is a counter: acceptance rate is
rate(fly_trt:spec_decode_num_accepted_tokens_total) / rate(fly_trt:spec_decode_num_draft_tokens_total), mean acceptance
length is 1 + rate(..._num_accepted_tokens_total) / rate(..._num_drafts_total).
"""

import logging
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from fly_trt.runtime.request import Request
    from fly_trt.runtime.scheduler import Scheduler

logger = logging.getLogger(__name__)

PREFIX = "fly_trt:"
LOG_SECONDS = 10.0
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters, gauges and histograms of one runtime; the engine thread writes them, any thread may read them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(PREFIX + name, text, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

        self._drafts = counter("spec_decode_num_drafts", "Rounds with a draft.")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Draft tokens verified by the target.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Draft tokens that were emitted.")
        per_position = "spec_decode_num_accepted_tokens_per_pos"
        self._accepted_at = counter(per_position, "Emitted draft tokens by position in the draft.", ("position",))
        self._loosened = counter(
            "spec_decode_num_loosened_tokens", "Emitted draft tokens that the target did not choose."
        )
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self._generated = counter("generation_tokens", "Tokens emitted.")
        self._prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._prefix_hits = counter("prefix_cache_hits", "Prompt tokens whose cache was reused.")
        self._ended = counter("request_success", "Requests that ended, by reason.", ("finished_reason",))
        self._running = gauge("num_requests_running", "Requests in slots.")
        self._waiting = gauge("num_requests_waiting", "Requests in the queue.")
        self._cache_usage = gauge("kv_cache_usage_perc", "Used part of the KV cache; 1 is all of it.")
        self._first_token = histogram("time_to_first_token_seconds", "From arrival.", FIRST_TOKEN_SECONDS)
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Time between two steps' tokens, per token.", TOKEN_SECONDS
        )
        self._latency = histogram("e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_SECONDS)
        self._at_position = [self._accepted_at.labels(position=0)]
        self._window = (0.0, 0.0, 0.0, 0.0)  # time and counters when the last line was logged

    def as_dict(self) -> dict[str, float]:
        """Every sample by name; labels as in the text format: name{position="3"}."""
        values = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
                values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return values

    def record_round(self, num_draft: int, num_accepted: int, num_loosened: int) -> None:
        self._drafts.inc()
        self._draft_tokens.inc(num_draft)
        if num_accepted:
            self._accepted.inc(num_accepted)
        if num_loosened:
            self._loosened.inc(num_loosened)
        for position in range(len(self._at_position), num_accepted):
            self._at_position.append(self._accepted_at.labels(position=position))
        for position in range(num_accepted):
            self._at_position[position].inc()

    def record_emission(self, request: "Request", num_tokens: int) -> None:
        if not num_tokens:
            return
        now = time.perf_counter()
        self._generated.inc(num_tokens)
        if num_tokens == len(request.output_token_ids):
            self._first_token.observe(now - request.arrival)
        else:
            each = (now - request.last_emission) / num_tokens
            for _ in range(num_tokens):
                self._inter_token.observe(each)
        request.last_emission = now

    def record_end(self, request: "Request") -> None:
        self._ended.labels(finished_reason=request.finish_reason).inc()
        self._latency.observe(request.metrics.latency or 0.0)
        if request.num_cached:  # it was admitted
            self._prompt_tokens.inc(len(request.prompt_token_ids))
            self._prefix_queries.inc(len(request.prompt_token_ids))
            self._prefix_hits.inc(request.num_prefix_hits)

    def set_load(self, scheduler: "Scheduler", max_seq_len: int) -> None:
        """The gauges, and once in LOG_SECONDS one line in the log."""
        self._running.set(len(scheduler.running))
        self._waiting.set(len(scheduler.waiting))
        used = sum(request.num_cached for request in scheduler.running)
        self._cache_usage.set(used / (len(scheduler.slots) * max_seq_len))
        elapsed = time.perf_counter() - self._window[0]
        if elapsed >= LOG_SECONDS:
            self._log(is_idle=elapsed >= 2 * LOG_SECONDS)

    def _log(self, *, is_idle: bool) -> None:
        """A window that nothing ran in for long says nothing about speed: the next one starts here."""
        values = self.as_dict()

        def value(name: str) -> float:
            return values[PREFIX + name]

        window = (
            time.perf_counter(),
            value("generation_tokens_total"),
            value("spec_decode_num_drafts_total"),
            value("spec_decode_num_accepted_tokens_total"),
        )
        seconds, tokens, drafts, accepted = (new - old for new, old in zip(window, self._window, strict=True))
        self._window = window
        if is_idle:
            return
        hits, queries = value("prefix_cache_hits_total"), value("prefix_cache_queries_total")
        logger.info(
            "running %d, waiting %d, %.1f tokens/s, acceptance length %.2f, KV cache %.1f %%, prefix reuse %.1f %%",
            value("num_requests_running"),
            value("num_requests_waiting"),
            tokens / seconds,
            1 + accepted / drafts if drafts else 1.0,
            100 * value("kv_cache_usage_perc"),
            100 * hits / queries if queries else 0.0,
        )
