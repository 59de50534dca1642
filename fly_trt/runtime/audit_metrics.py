"""What audits found, as Prometheus metrics beside those of the runtime. Plain numbers that become metrics when somebody
asks, as in `metrics`; the quality that loose decoding keeps is

    rate(fly_trt:audit_quality_sum) / rate(fly_trt:audit_quality_count)

and the share of answers that are not the target's own, word for word, audits_total{outcome="parted"} over all. It knows
results, counts and states; it makes none of them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fly_trt.runtime.audit import AuditCounts, AuditResult
from fly_trt.runtime.audit_log import AuditLog
from fly_trt.runtime.breaker import Breaker, BreakerChange, BreakerState
from fly_trt.runtime.metrics import PREFIX, Histogram

QUALITY = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
REGRET_NATS = (0.0, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
POSITION_TOKENS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
COUNTERS = {
    "audit_requests_drawn": "Finished requests that were drawn for an audit.",
    "audit_tokens": "Output tokens that were read again.",
    "audit_seconds": "Engine time of audits.",
    "audit_seconds_beside": "Of it, while requests ran.",
}
STATES = {
    "breaker_tripped": "Whether the setting is exact because its audits say so.",
    "breaker_audits": "Audits since the setting was reset, or up to its trip.",
    "breaker_quality_mean": "Their mean quality.",
    "breaker_quality_lower": "What the mean quality is above, with 95 % confidence.",
    "breaker_quality_upper": "What the mean quality is below; the setting is tripped when this reaches min_quality.",
}


class AuditMetrics(Collector):
    """The engine thread records, any thread collects. log, breaker: whose own numbers are shown too, where there are
    such; `counts`: those of whoever makes the audits."""

    def __init__(self, log: AuditLog | None = None, breaker: Breaker | None = None) -> None:
        self.counts = AuditCounts()
        self.log = log
        self.breaker = breaker
        self._outcomes: Counter[str] = Counter()
        self._exact_texts: Counter[str] = Counter()
        self._changes: Counter[tuple[str, str]] = Counter()
        self._num_tokens = 0
        self._quality = Histogram("audit_quality", "Of audited answers.", QUALITY)
        self._regret = Histogram(
            "audit_regret_nats", "Log-likelihood an answer's tokens lack of the target's choices, each.", REGRET_NATS
        )
        self._parted_at = Histogram(
            "audit_parted_at_tokens", "Output tokens before the first that is not the target's choice.", POSITION_TOKENS
        )

    def record(self, result: AuditResult) -> None:
        self._num_tokens += result.num_tokens
        self._outcomes["same" if result.parted_at is None else "parted"] += 1
        self._quality.observe(result.quality)
        self._regret.observe(-math.log(result.quality))
        if result.parted_at is not None:
            self._parted_at.observe(result.parted_at)
        if result.exact is not None:
            self._exact_texts["same" if result.exact.is_same else "parted"] += 1

    def record_change(self, change: BreakerChange) -> None:
        """Any thread."""
        self._changes[change.setting, "tripped" if change.is_tripped else change.why] += 1

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's collector interface."""
        counts = self.counts
        values = (counts.num_drawn, self._num_tokens, counts.seconds, counts.seconds_beside)
        for (name, text), value in zip(COUNTERS.items(), values, strict=True):
            yield CounterMetricFamily(PREFIX + name, text, value=value)
        yield GaugeMetricFamily(PREFIX + "audits_waiting", "Requests that wait for theirs.", value=counts.num_waiting)
        yield _by_label("audits", "Audited answers: all tokens the target's choice, or not.", "outcome", self._outcomes)
        text = "Exact texts that were made: the answer, or another one."
        yield _by_label("audit_exact_texts", text, "outcome", self._exact_texts)
        yield _by_label("audits_left_out", "Drawn requests without an audit, by reason.", "reason", counts.left_out)
        if self.log is not None:
            lines = {"written": self.log.num_written, "lost": self.log.num_lost}
            yield _by_label("audit_log_lines", "Lines of the audit log.", "outcome", lines)
        for histogram in (self._quality, self._regret, self._parted_at):
            yield histogram.family()
        yield from self._of_breaker()

    def _of_breaker(self) -> Iterator[Metric]:
        """Nothing without one."""
        if (breaker := self.breaker) is None:
            return
        states = breaker.state()
        for name, text in STATES.items():
            family = GaugeMetricFamily(PREFIX + name, text, labels=["setting"])
            for state in states:
                if (value := _value(name, state)) is not None:
                    family.add_metric([state.setting], value)
            yield family
        changes = CounterMetricFamily(
            PREFIX + "breaker_changes", "Settings that were tripped, or reset by whom.", labels=["setting", "change"]
        )
        for labels, count in dict(self._changes).items():
            changes.add_metric(labels, count)
        yield changes


def _by_label(name: str, text: str, label: str, counts: Mapping[Any, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(PREFIX + name, text, labels=[label])
    for value, count in dict(counts).items():
        family.add_metric([value], count)
    return family


def _value(name: str, state: BreakerState) -> float | None:
    return {
        "breaker_tripped": float(state.is_tripped),
        "breaker_audits": float(state.num_audits),
        "breaker_quality_mean": state.mean,
        "breaker_quality_lower": state.lower,
        "breaker_quality_upper": state.upper,
    }[name]
