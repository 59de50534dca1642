"""ONNX Runtime on the CPU: the traced graph with the head is what the engine directory holds. It computes in float32,
whatever the weights are stored in."""

from pathlib import Path
from typing import TYPE_CHECKING

from fly_build.backends.base import Backend
from fly_build.measure import measure_costs
from fly_build.schema import Recipe
from fly_trt.manifest import Dtype, Manifest, ModelEngine

if TYPE_CHECKING:
    from fly_build.model_build import ModelBuild


class OnnxRuntimeBackend(Backend):
    default_dtype = "float32"
    model_file = "model.onnx"

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """It builds whatever a recipe can say."""

    @property
    def kv_cache_dtype(self) -> Dtype:
        return "float32"

    def build_model(self, build: "ModelBuild") -> ModelEngine:
        from fly_build.attention import make_shape_invariant

        checkpoint = build.model.checkpoint
        with build.step("trace"):
            decoder = build.export("float32", attention="lengths")
            make_shape_invariant(decoder.model, checkpoint.config.num_attention_heads, checkpoint.num_kv_heads)
            build.append_head(decoder, form="lazy_functions")
        return build.save_graph(decoder, "float32", build.path)

    @staticmethod
    def step_costs(manifest: Manifest, directory: Path) -> tuple[float, float]:
        return measure_costs(manifest, directory)
