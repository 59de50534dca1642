"""Engines: one protocol, one module for each way in which a built graph can run, and the table of those modules.

A new backend is a module with a `load` (base.LoadEngine) and a line in `BACKENDS`. Loading goes by the names of backend
and device that the manifest says the directory was built for; what serves requests does not know which library that is.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

from fly_trt.engines.base import Engine, EngineInfo, LoadEngine, LoadSettings, Step
from fly_trt.errors import EngineError
from fly_trt.manifest import Device, Manifest, ModelEngine

__all__ = ["BACKENDS", "Engine", "EngineBackend", "EngineInfo", "Step", "engine_info", "find_backend", "load_engine"]


@dataclass(frozen=True, slots=True)
class EngineBackend:
    """`module` has the backend's `load` and is imported when an engine is loaded; the rest is known before.

    is_gpu: the engines run on a GPU, so that a device can be chosen for them. has_threads: they compute with CPU
    threads, all or what the GPU leaves, so that num_threads can be. schedules: it batches requests and holds their
    caches by itself, so that `module` has a `load_executor` (runtime.executor.LoadExecutor) in place of `load`.
    """

    module: str
    is_gpu: bool
    has_threads: bool = False
    schedules: bool = False

    @property
    def load(self) -> LoadEngine:
        loader: LoadEngine = importlib.import_module(self.module).load
        return loader


BACKENDS: dict[tuple[str, Device], EngineBackend] = {
    ("onnxruntime", "cpu"): EngineBackend("fly_trt.engines.onnxruntime", is_gpu=False, has_threads=True),
    ("onnxruntime", "cuda"): EngineBackend("fly_trt.engines.onnxruntime_cuda", is_gpu=True, has_threads=True),
    ("tensorrt", "cuda"): EngineBackend("fly_trt.engines.tensorrt", is_gpu=True),
    ("tensorrt-llm", "cuda"): EngineBackend("fly_trt.integrations.tensorrt_llm.llm_api", is_gpu=True, schedules=True),
    ("tensorrt-llm-engine", "cuda"): EngineBackend(
        "fly_trt.integrations.tensorrt_llm.executor", is_gpu=True, schedules=True
    ),
}


def find_backend(directory: Path, manifest: Manifest) -> EngineBackend:
    """The backend that an engine directory was built for; one that does not say its device (manifest.Manifest) was
    built for the first that its backend has here. Raises EngineError for what is not in the table."""
    found = {device: backend for (name, device), backend in BACKENDS.items() if name == manifest.backend}
    if not found:
        known = ", ".join(dict.fromkeys(name for name, _ in BACKENDS))
        raise EngineError(f"{directory}: built for backend {manifest.backend!r}, this version runs {known}: rebuild it")
    device = manifest.device or next(iter(found))
    if device not in found:
        raise EngineError(
            f"{directory}: built for {manifest.backend} on {device!r}, this version runs it on {' and '.join(found)}: "
            "rebuild it"
        )
    return found[device]


def engine_info(manifest: Manifest, model: ModelEngine) -> EngineInfo:
    """What an engine of this directory can do, as it was built."""
    return EngineInfo(
        **manifest.limits.model_dump(),
        vocab_size=model.vocab_size,
        entropy_top_k=manifest.head.entropy_top_k,
        stop_token_ids=frozenset(manifest.head.stop_token_ids),
        has_top_tokens=manifest.head.top_tokens,
    )


def load_engine(
    directory: Path,
    manifest: Manifest,
    model: ModelEngine,
    *,
    num_slots: int,
    num_spare_slots: int = 0,
    num_threads: int | None = None,
    device_id: int | None = None,
    rank: int = 0,
) -> Engine:
    """Loads the target or the draft of an engine directory with the library that it was built for.

    The settings are those of LoadSettings; num_spare_slots are slots beyond num_slots, of which no step has more rows.
    Raises EngineError for what cannot be loaded here and ConfigError for a
    device that does not exist or would not be used.
    """
    backend = find_backend(directory, manifest)
    if backend.schedules:
        raise EngineError(
            f"{directory}: {manifest.backend} runs its models by itself, not step by step: use LLM or AsyncLLM"
        )
    if num_slots > manifest.limits.max_batch_size:
        raise EngineError(
            f"{directory}: built for max_batch_size {manifest.limits.max_batch_size}, asked for {num_slots}: "
            f"rebuild with --max-batch-size {num_slots}"
        )
    num_slots += num_spare_slots
    settings = LoadSettings(num_slots=num_slots, num_threads=num_threads, device_id=device_id, rank=rank)
    return backend.load(directory, manifest, model, engine_info(manifest, model), settings)
