"""The backends that fly-build can build for, by the name that recipes, `--backend` and fly.json give them and by the
device that the engines run on. The first device of a name is its usual one.

A new one is a module with a subclass of base.Backend and a line here. Importing this package loads none of the
libraries of the extra `build`: flags and recipes are checked with it before anything is loaded.
"""

from fly_build.backends.base import Backend
from fly_build.backends.onnxruntime import OnnxRuntimeBackend
from fly_build.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from fly_build.backends.tensorrt import TensorRTBackend
from fly_build.backends.tensorrt_llm import TensorRTLlmBackend
from fly_build.backends.tensorrt_llm_engine import TensorRTLlmEngineBackend
from fly_trt.manifest import Device

__all__ = ["BACKENDS", "Backend", "backend_names", "devices_of"]

BACKENDS: dict[tuple[str, Device], type[Backend]] = {
    ("onnxruntime", "cpu"): OnnxRuntimeBackend,
    ("onnxruntime", "cuda"): OnnxRuntimeCudaBackend,
    ("tensorrt", "cuda"): TensorRTBackend,
    ("tensorrt-llm", "cuda"): TensorRTLlmBackend,
    ("tensorrt-llm-engine", "cuda"): TensorRTLlmEngineBackend,
}


def backend_names() -> list[str]:
    return list(dict.fromkeys(name for name, _ in BACKENDS))


def devices_of(backend: str) -> list[Device]:
    return [device for name, device in BACKENDS if name == backend]
