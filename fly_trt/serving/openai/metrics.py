"""The metrics of all engines of a pool as one registry. One engine's are as they are; several carry engine="0", ..."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from fly_trt.serving.openai.pool import EnginePool


def pool_registry(pool: EnginePool) -> CollectorRegistry:
    """For an exporter."""
    registries = [llm.registry for llm in pool.llms]
    return registries[0] if len(registries) == 1 else _Labelled(registries)


class _Labelled(CollectorRegistry):
    """Families of several registries, each once, its samples told apart by a label."""

    def __init__(self, registries: Iterable[CollectorRegistry]) -> None:
        super().__init__()
        self._registries = tuple(registries)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for index, registry in enumerate(self._registries):
            for family in registry.collect():
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {"engine": str(index), **sample.labels}
                    merged.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)
        yield from families.values()
