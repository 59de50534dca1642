"""The kernels that TensorRT-RTX compiles where it runs, kept between processes, so that only the first one waits.

TensorRT-RTX itself decides whether a kept cache fits to its version, the GPU and the driver; one that does not is left
alone and replaced. Full TensorRT compiles its kernels when the engine is built and needs none of this.
"""

import logging
from pathlib import Path
from typing import Any

from fly_trt.engines.tensorrt_library import keep

logger = logging.getLogger(__name__)


class KernelCache:
    """`config` is what the engine's execution contexts are created with; they share the cache. `path` None keeps it for
    this process alone."""

    def __init__(self, trt: Any, engine: Any, path: Path | None) -> None:
        self._path = path
        self.config = engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # The fallback kernels that a lazy context starts with must not end up in a graph.
        self.config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = self.config.create_runtime_cache()
        if path is not None and path.is_file() and not self._cache.deserialize(path.read_bytes()):
            logger.info("%s: kernels of another version or GPU: they are compiled anew", path)
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        if self._path is not None:
            keep(self._path, self._cache.serialize(), "the compiled kernels")
