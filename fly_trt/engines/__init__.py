"""Engines: one protocol, one module for each library that can run a built graph."""

from pathlib import Path

from fly_trt.engines.base import Engine, EngineInfo, Step
from fly_trt.errors import ConfigError, EngineError
from fly_trt.manifest import Manifest, ModelEngine

__all__ = ["Engine", "EngineInfo", "Step", "load_engine"]


def load_engine(
    directory: Path,
    manifest: Manifest,
    model: ModelEngine,
    *,
    num_slots: int,
    num_threads: int | None = None,
    device_id: int | None = None,
) -> Engine:
    """Loads the target or the draft of an engine directory with the library that it was built for.

    `num_threads` is for ONNX Runtime, `device_id` for TensorRT. Raises EngineError for what cannot be loaded here and
    ConfigError for a device that does not exist or would not be used.
    """
    if manifest.backend == "tensorrt-llm":
        raise EngineError(
            f"{directory}: built for backend 'tensorrt-llm', this version runs onnxruntime and tensorrt: rebuild it"
        )
    if num_slots > manifest.limits.max_batch_size:
        raise EngineError(
            f"{directory}: built for max_batch_size {manifest.limits.max_batch_size}, asked for {num_slots}: "
            f"rebuild with --max-batch-size {num_slots}"
        )
    info = EngineInfo(
        **manifest.limits.model_dump(),
        vocab_size=model.vocab_size,
        entropy_top_k=manifest.head.entropy_top_k,
        stop_token_ids=frozenset(manifest.head.stop_token_ids),
    )
    path = directory / model.model
    if manifest.backend == "tensorrt":
        from fly_trt.engines.tensorrt import TensorRTEngine
        from fly_trt.engines.tensorrt_library import cache_folder

        plugins = model.tensorrt.plugin_library if model.tensorrt else None
        return TensorRTEngine(
            path,
            model,
            info,
            num_slots=num_slots,
            plugin_library=directory / plugins if plugins else None,
            kernel_cache=cache_folder() / f"{manifest.files[model.model].sha256[:16]}.kernels",
            device_id=device_id,
        )
    if device_id is not None:
        raise ConfigError(
            f"device_id {device_id}: has no effect, {directory} was built for onnxruntime, which runs on the CPU: "
            "leave it out, or rebuild with --backend tensorrt"
        )
    from fly_trt.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, model, info, num_slots=num_slots, num_threads=num_threads)
