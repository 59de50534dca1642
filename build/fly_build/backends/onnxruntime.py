"""ONNX Runtime on the CPU: the traced graph with the head is what the engine directory holds. It computes in float32,
whatever the weights are stored in."""

import logging
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from fly_build.backends.base import Backend
from fly_build.cpu_library import LIBRARY_NAME, find_library, is_expected
from fly_build.measure import measure_costs
from fly_build.schema import Recipe
from fly_trt.engines.base import KEY_BLOCK_TOKENS
from fly_trt.errors import ConfigError
from fly_trt.manifest import Dtype, Manifest, ModelEngine

if TYPE_CHECKING:
    from fly_build.export import DecoderGraph
    from fly_build.linear_form import Kernels
    from fly_build.model_build import ModelBuild
    from fly_build.progress import Report
    from fly_build.tensors import Tensors

logger = logging.getLogger(__name__)

ROLLOUT_FILE = "rollout.onnx"


class OnnxRuntimeBackend(Backend):
    _library: Path | None = None
    _is_prepared = False
    default_dtype = "float32"
    model_file = "model.onnx"
    quantizations = ("none", "int8", "int4")
    shares_weights = True
    runs_where_built = True
    own_fields = ("cpu_kernels",)

    def prepare(self, report: "Report") -> None:
        self._library = find_library(self.recipe.cpu_kernels or "auto", report)
        self._is_prepared = True

    @property
    def kernels(self) -> "Kernels":
        return "cpu" if self._library is None else "fly_cpu"

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if recipe.quantization == "fp8":
            raise ConfigError(
                "quantization 'fp8': no CPU computes with it: use --quantization int8, or --backend tensorrt"
            )

    @property
    def kv_cache_dtype(self) -> Dtype:
        return "float32"

    def expected(self, engine: ModelEngine) -> ModelEngine:
        """With the cache that CacheAttention has: every supported architecture gets that, if its heads fit."""
        has_kernels = self._library is not None if self._is_prepared else is_expected(self.recipe.cpu_kernels or "auto")
        if not has_kernels or engine.quantization != "int8" or engine.head_dim % KEY_BLOCK_TOKENS:
            return engine
        return engine.model_copy(update={"kv_cache_dtype": "float16"})

    def build_model(self, build: "ModelBuild") -> ModelEngine:
        decoder = self._graph(build)
        engine = self._record(build.save_graph(decoder, "float32", build.path), decoder, build.workspace)
        return engine if build.model.folder == "target" else self._with_rollout(engine, build.path)

    def build_sharing(self, build: "ModelBuild", target: ModelEngine, tensors: "Tensors") -> ModelEngine:
        decoder = self._graph(build)
        engine = build.save_sharing(decoder, tensors, "float32", build.workspace / target.model)
        return self._record(engine, decoder, build.workspace)

    def _record(self, engine: ModelEngine, decoder: "DecoderGraph", workspace: Path) -> ModelEngine:
        """With the library that the graph needs, which is copied into the directory."""
        if self._library is None:
            return engine
        if not (workspace / LIBRARY_NAME).exists():
            shutil.copy(self._library, workspace / LIBRARY_NAME)
        return engine.model_copy(update={"cpu_kernels": LIBRARY_NAME, "kv_cache_dtype": decoder.cache_dtype})

    def _with_rollout(self, engine: ModelEngine, path: Path) -> ModelEngine:
        """Writes a draft model's second graph beside the first, whose weights it has, where it can be made."""
        import onnx_ir as ir

        from fly_build.rollout import make_rollout

        model = ir.load(path)
        if not make_rollout(model):
            if self._library is not None:
                logger.info(
                    "%s: drafts token by token, without rollouts: its caches are not CacheAttention's", path.parent.name
                )
            return engine
        ir.save(model, path.with_name(ROLLOUT_FILE))
        return engine.model_copy(update={"rollout": str(PurePosixPath(engine.model).with_name(ROLLOUT_FILE))})

    def _graph(self, build: "ModelBuild") -> "DecoderGraph":
        from fly_build.attention import make_shape_invariant

        checkpoint = build.model.checkpoint
        with build.step("trace"):
            decoder = build.export("float32", attention="lengths")
            if self._library is None or not _fuse_attention(build, decoder):
                make_shape_invariant(decoder.model, checkpoint.config.num_attention_heads, checkpoint.num_kv_heads)
            build.append_head(decoder, form="lazy_functions" if self._library is None else "operators")
        return decoder

    @staticmethod
    def step_costs(manifest: Manifest, directory: Path) -> tuple[float, float]:
        return measure_costs(manifest, directory)


def _fuse_attention(build: "ModelBuild", decoder: "DecoderGraph") -> bool:
    from fly_build.cpu_attention import fuse_attention

    model = build.model
    num_heads, num_kv_heads = model.checkpoint.config.num_attention_heads, model.checkpoint.num_kv_heads
    reason = fuse_attention(decoder.model, num_heads, num_kv_heads, model.engine.quantization)
    if reason is not None:
        logger.info("%s: attention stays ONNX Runtime's: %s", model.name or model.folder, reason)
    return reason is None
