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
        for family in list(self._registry.collect()):  # all of one moment: telling the server takes a while
            if family.type not in KINDS:
                continue
            for sample in family.samples:
                key = sample.name, tuple(sample.labels.values())
                if key not in self._metrics:
                    self._add(key, family.type, family.documentation, sample.labels)
                self._tell(key, family.type, sample.value)

    def _tell(self, key: tuple[str, tuple[str, ...]], kind: str, value: float) -> None:
        """A gauge also when it is new: an instance that the model had before may have left another value."""
        before = self._values.get(key)
        if kind == "counter" and value != (before or 0.0):
            self._metrics[key].increment(value - (before or 0.0))
        elif kind == "gauge" and value != before:
            self._metrics[key].set(value)
        self._values[key] = value

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
