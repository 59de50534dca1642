"""ONNX Runtime on a GPU: the traced graph with the head, in the form that its CUDA provider runs whole and captures.

It computes in the dtype of the stored weights. Nothing of it runs where it is built. The graph has no branches, which a
CUDA graph cannot have, and no operator that the provider leaves to the CPU but arithmetic on shapes.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fly_build.backends.base import Backend
from fly_build.measure import estimate_costs
from fly_build.schema import Recipe
from fly_trt.engines.gpu import StepSizes
from fly_trt.errors import ConfigError
from fly_trt.manifest import Dtype, Limits, Manifest, ModelEngine

if TYPE_CHECKING:
    from fly_build.linear_form import Kernels
    from fly_build.model_build import ModelBuild


class OnnxRuntimeCudaBackend(Backend):
    default_dtype = "bfloat16"
    quantizations = ("none", "int8", "int4")
    model_file = "model.onnx"

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if recipe.quantization == "fp8":
            raise ConfigError(
                "quantization 'fp8': ONNX Runtime has no such product: use --quantization int8, or --backend tensorrt"
            )

    @property
    def kv_cache_dtype(self) -> Dtype:
        return self.dtype

    @property
    def kernels(self) -> "Kernels":
        return "cuda"

    def cache_tokens(self, limits: Limits) -> int:
        return StepSizes.of(limits).cache_tokens

    def build_model(self, build: "ModelBuild") -> ModelEngine:
        with build.step("trace"):
            decoder = build.export(self.dtype, attention="lengths")
            build.append_head(decoder, form="functions")
        return build.save_graph(decoder, self.dtype, build.path)

    @staticmethod
    def step_costs(manifest: Manifest, directory: Path) -> tuple[float, float]:
        return estimate_costs(manifest)
