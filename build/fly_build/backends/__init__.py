"""The backends that fly-build can build for, by the name that recipes, `--backend` and fly.json give them.

A new one is a module with a subclass of base.Backend and a line here. Importing this package loads none of the
libraries of the extra `build`: flags and recipes are checked with it before anything is loaded.
"""

from fly_build.backends.base import Backend
from fly_build.backends.onnxruntime import OnnxRuntimeBackend
from fly_build.backends.tensorrt import TensorRTBackend

__all__ = ["BACKENDS", "Backend"]

BACKENDS: dict[str, type[Backend]] = {"onnxruntime": OnnxRuntimeBackend, "tensorrt": TensorRTBackend}
