"""TensorRT, or TensorRT-RTX, on a GPU: the traced graph is only an intermediate file, which tensorrt_builder.py
compiles. It computes in the dtype of the stored weights. The machine that builds may have no GPU."""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fly_build.backends.base import Backend
from fly_build.measure import estimate_costs
from fly_build.schema import Recipe
from fly_build.tensorrt_builder import (
    MAX_PLUGIN_TOP_K,
    PLUGIN_LIBRARY,
    EngineBuilder,
    Sizes,
    default_timing_cache,
)
from fly_trt.engines.cuda import compute_capability
from fly_trt.engines.tensorrt_library import LEAST_FOR_RANKS, Library, has_ranks, import_library, runs_rtx
from fly_trt.errors import ConfigError, EngineError
from fly_trt.manifest import Dtype, LayerSummary, Limits, Manifest, ModelEngine

if TYPE_CHECKING:
    from fly_build.gpu_memory import GpuPlan
    from fly_build.linear_form import Kernels
    from fly_build.model_build import ModelBuild
    from fly_build.plan import ModelPlan
    from fly_build.progress import Report

GRAPH_FILE = "model.onnx"

logger = logging.getLogger(__name__)


class TensorRTBackend(Backend):
    default_dtype = "bfloat16"
    own_fields = ("tensorrt_library", "plugin_library", "timing_cache")
    model_file = "model.plan"
    quantizations = ("none", "int8", "int4", "fp8")
    spans_gpus = True
    library: Library

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """All quantisations are built."""

    def prepare(self, report: "Report") -> None:
        self.library = _library(self.recipe)
        if self.recipe.tp_size > 1:
            _check_collectives(self.library)
        _warn_of_hopper(self.library)

    @property
    def kv_cache_dtype(self) -> Dtype:
        return self.dtype

    @property
    def kernels(self) -> "Kernels":
        return "tensorrt"

    def cache_tokens(self, limits: Limits) -> int:
        return Sizes.of(limits).cache_tokens

    def plan_gpus(self, models: "list[ModelPlan]", limits: Limits) -> "list[GpuPlan]":
        from fly_build.gpu_memory import plan_gpus

        return plan_gpus(models, limits, with_plugins=self.recipe.plugin_library is not None)

    def build_model(self, build: "ModelBuild") -> ModelEngine:
        from fly_build.tensorrt_graph import attention_names, fix_cache_length

        builder = self._builder(build)
        with build.step("trace"):
            decoder = build.export(self.dtype, attention="mask")
            build.append_head(decoder, form="functions" if self.recipe.plugin_library is None else "plugins")
            fix_cache_length(decoder.model, self.cache_tokens(build.limits))
        graph = build.load_weights(decoder, self.dtype)
        engine, names = graph.engine, attention_names(decoder.model)
        onnx_path = build.path.with_name(GRAPH_FILE)
        for rank, file in enumerate((engine.model, *engine.other_ranks)):
            graph.save(onnx_path, rank)
            with build.step("compile", rank) as advance:
                serialised, record = builder.build(onnx_path, names, engine.num_layers, advance)
                (build.workspace / file).write_bytes(serialised)
                del serialised  # as large as the rank's weights
            for path in onnx_path.parent.glob(f"{GRAPH_FILE}*"):
                path.unlink()
        _warn_of_decomposed_attention(build.model.folder, record.layers, engine.num_layers)
        return engine.model_copy(update={"tensorrt": record})

    def library_versions(self) -> dict[str, str]:
        return super().library_versions() | {self.library.name: self.library.version}

    @staticmethod
    def step_costs(manifest: Manifest, directory: Path) -> tuple[float, float]:
        return estimate_costs(manifest)

    def _builder(self, build: "ModelBuild") -> EngineBuilder:
        """Copies the plugin library into the engine directory, which has to hold all that its engines need."""
        recipe = self.recipe
        plugin_library = None
        if recipe.plugin_library is not None:
            plugin_library = PLUGIN_LIBRARY
            shutil.copy(recipe.plugin_library, build.workspace / PLUGIN_LIBRARY)
        timing_cache = Path(recipe.timing_cache) if recipe.timing_cache else default_timing_cache(self.library)
        needs_fp8 = build.model.engine.quantization == "fp8"
        return EngineBuilder(self.library, Sizes.of(build.limits), self.dtype, plugin_library, timing_cache, needs_fp8)


def _library(recipe: Recipe) -> Library:
    """The library to compile with, its plugins loaded."""
    library = import_library(recipe.tensorrt_library)
    if library.name == "tensorrt_rtx":
        if recipe.plugin_library is not None:
            raise ConfigError("plugin_library: tensorrt_rtx has no plugin layers: leave it out, or use tensorrt")
        if recipe.timing_cache is not None:
            raise ConfigError("timing_cache: tensorrt_rtx times nothing while it builds: leave it out, or use tensorrt")
    if recipe.plugin_library is not None:
        if recipe.entropy_top_k > MAX_PLUGIN_TOP_K:
            raise ConfigError(
                f"entropy_top_k {recipe.entropy_top_k}: the plugins look at {MAX_PLUGIN_TOP_K} at most: "
                "leave --plugin-library out"
            )
        library.load_plugins(Path(recipe.plugin_library))
    return library


def _check_collectives(library: Library) -> None:
    if not has_ranks(library.name, library.version):
        raise ConfigError(
            f"tp_size: {library.name} {library.version} may leave out sums over several GPUs without a word: install "
            f"{library.name} {LEAST_FOR_RANKS[library.name]} or newer"
        )


def _warn_of_hopper(library: Library) -> None:
    """Where the machine that builds has a GPU, it is likely the one that the engine is meant for."""
    if library.name != "tensorrt_rtx":
        return
    try:
        found = compute_capability()
    except EngineError:
        return
    if not runs_rtx(found):
        logger.warning(
            "this machine's GPU (compute capability %s) cannot run what TensorRT-RTX builds, which is for RTX cards: "
            "pip install 'fly-trt[tensorrt]' and use --tensorrt-library tensorrt",
            found,
        )


def _warn_of_decomposed_attention(folder: str, layers: LayerSummary, num_layers: int) -> None:
    if layers.decomposed_attention:
        logger.warning(
            "%s: no kernel computes the attention of %d of %d layers whole (float32, a soft cap, or a head size that "
            "has none): slower than it could be",
            folder,
            layers.decomposed_attention,
            num_layers,
        )
