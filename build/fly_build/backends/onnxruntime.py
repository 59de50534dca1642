"""ONNX Runtime on the CPU: the traced graph with the head is what the engine directory holds. It computes in float32,
whatever the weights are stored in."""

from pathlib import Path
from typing import TYPE_CHECKING

from fly_build.backends.base import Backend
from fly_build.measure import measure_costs
from fly_build.schema import Recipe
from fly_trt.errors import ConfigError
from fly_trt.manifest import Dtype, Manifest, ModelEngine

if TYPE_CHECKING:
    from fly_build.export import DecoderGraph
    from fly_build.model_build import ModelBuild
    from fly_build.tensors import Tensors


class OnnxRuntimeBackend(Backend):
    default_dtype = "float32"
    model_file = "model.onnx"
    quantizations = ("none", "int8", "int4")
    shares_weights = True
    runs_where_built = True

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if recipe.quantization == "fp8":
            raise ConfigError(
                "quantization 'fp8': no CPU computes with it: use --quantization int8, or --backend tensorrt"
            )

    @property
    def kv_cache_dtype(self) -> Dtype:
        return "float32"

    def build_model(self, build: "ModelBuild") -> ModelEngine:
        return build.save_graph(self._graph(build), "float32", build.path)

    def build_sharing(self, build: "ModelBuild", target: ModelEngine, tensors: "Tensors") -> ModelEngine:
        return build.save_sharing(self._graph(build), tensors, "float32", build.workspace / target.model)

    def _graph(self, build: "ModelBuild") -> "DecoderGraph":
        from fly_build.attention import make_shape_invariant

        checkpoint = build.model.checkpoint
        with build.step("trace"):
            decoder = build.export("float32", attention="lengths")
            make_shape_invariant(decoder.model, checkpoint.config.num_attention_heads, checkpoint.num_kv_heads)
            build.append_head(decoder, form="lazy_functions")
        return decoder

    @staticmethod
    def step_costs(manifest: Manifest, directory: Path) -> tuple[float, float]:
        return measure_costs(manifest, directory)
