"""The runtime's counters and gauges as Triton's custom metrics, by the same names, on the server's own /metrics."""

from typing import Any

import triton_python_backend_utils as pb_utils
from prometheus_client import CollectorRegistry

KINDS = {"counter": "COUNTER", "gauge": "GAUGE"}  # a histogram's observations are not kept one by one


class TritonMetrics:
    """Follows `registry`; `labels` tell model, version and instance. Raises pb_utils.TritonModelException where the
    server has its metrics switched off."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self._registry = registry
        self._labels = labels
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._values: dict[tuple[str, tuple[str, ...]], float] = {}
        self.update()

    def update(self) -> None:
        """Brings the server's values up to date."""
        for family in self._registry.collect():
            if family.type not in KINDS:
                continue
            for sample in family.samples:
                key = sample.name, tuple(sample.labels.values())
                if key not in self._metrics:
                    self._add(key, family.type, family.documentation, sample.labels)
                change = sample.value - self._values.get(key, 0.0)
                self._values[key] = sample.value
                if change:
                    metric = self._metrics[key]
                    metric.increment(change) if family.type == "counter" else metric.set(sample.value)

    def close(self) -> None:
        """Takes the metrics off the server, each before its family."""
        self._metrics.clear()
        self._families.clear()

    def _add(self, key: tuple[str, tuple[str, ...]], kind: str, text: str, labels: dict[str, str]) -> None:
        name = key[0]
        if name not in self._families:
            kind_value = getattr(pb_utils.MetricFamily, KINDS[kind])
            self._families[name] = pb_utils.MetricFamily(name=name, description=text, kind=kind_value)
        self._metrics[key] = self._families[name].Metric(labels=self._labels | labels)
