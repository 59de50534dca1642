"""What the build asks of a backend. It knows recipes and one model at a time; checkpoints, tokenizers, the manifest and
the engine directory's place are the pipeline's.

A backend's module is imported before the extra `build` is known to be there, so that torch and onnx are imported by the
methods that need them.
"""

import importlib.metadata
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fly_build.schema import Recipe
from fly_trt.manifest import Dtype, Head, Limits, Manifest, ModelEngine, Quantization

if TYPE_CHECKING:
    from fly_build.checkpoint import Checkpoint
    from fly_build.gpu_memory import GpuPlan
    from fly_build.linear_form import Kernels
    from fly_build.model_build import ModelBuild
    from fly_build.plan import ModelPlan
    from fly_build.progress import Report
    from fly_build.tensors import Tensors

LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


class Backend(ABC):
    """One build for one backend.

    default_dtype: of the stored weights, where a recipe has none. own_fields: fields of the recipe that mean nothing to
    any other backend. quantizations: of linear layers, that it computes. model_file: the file that the runtime loads,
    in the folder of its model. shares_weights: several models can read one weight file. runs_where_built: the machine
    that builds can run what it builds. spans_gpus: a model can be spread over several GPUs (ranks), with a file for
    each. exports: models are exported from transformers' code, so that only known architectures can be built.
    """

    default_dtype: ClassVar[Dtype]
    own_fields: ClassVar[tuple[str, ...]] = ()
    quantizations: ClassVar[tuple[Quantization, ...]] = ("none",)
    model_file: ClassVar[str]
    shares_weights: ClassVar[bool] = False
    runs_where_built: ClassVar[bool] = False
    spans_gpus: ClassVar[bool] = False
    exports: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def check(cls, recipe: Recipe) -> None:
        """Raises ConfigError for what a recipe asks of this backend in vain. Loads no library."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def prepare(self, report: "Report") -> None:  # noqa: B027 - most have nothing to load
        """Loads what compiles the engines; a plan needs none of it. Raises ConfigError or EngineError for what would
        otherwise fail late."""

    @classmethod
    def model_files(cls, folder: str, num_ranks: int) -> list[str]:
        """The file that each rank loads."""
        if num_ranks == 1:
            return [f"{folder}/{cls.model_file}"]
        stem, dot, kind = cls.model_file.rpartition(".")
        return [f"{folder}/{stem}.rank{rank}{dot}{kind}" for rank in range(num_ranks)]

    @property
    def dtype(self) -> Dtype:
        """Of the stored weights."""
        return self.recipe.dtype or self.default_dtype

    @property
    @abstractmethod
    def kv_cache_dtype(self) -> Dtype: ...

    def expected(self, engine: ModelEngine) -> ModelEngine:
        """The record of a planned model, with what its graph will decide as far as that can be said before there is
        one."""
        return engine

    @property
    def kernels(self) -> "Kernels":
        """Whose kernels compute the linear layers, see linear_form.py."""
        return "cpu"

    @property
    def draft_ranks(self) -> int:
        """GPUs that the draft is spread over."""
        return self.recipe.draft_tp_size

    def check_checkpoints(self, target: "Checkpoint", drafts: "list[Checkpoint]") -> None:
        """Raises CheckpointError or ConfigError for models that cannot be built, or not together. Reads no weights."""
        from fly_build.checkpoint import check_same_tokenizer

        for draft in drafts:
            check_same_tokenizer(target, draft)

    def fit_limits(self, limits: Limits) -> Limits:
        """The limits of the engines, which the backend's library may want otherwise than a recipe says."""
        return limits

    def kv_cache_quantization(self, checkpoint: "Checkpoint") -> Literal["none", "fp8"]:
        return "none"

    def bits_per_weight(self, quantization: Quantization) -> tuple[float, float] | None:
        """Of linear layers and of the vocabulary projection; None where `kernels` say it."""
        return None

    def cache_tokens(self, limits: Limits) -> int:
        """Tokens of cache that a slot takes at most."""
        return limits.max_seq_len

    def plan_gpus(self, models: "list[ModelPlan]", limits: Limits) -> "list[GpuPlan]":
        """What the models take of each GPU's memory, for backends that know."""
        return []

    def commands(self, models: "list[ModelPlan]", limits: Limits, head: Head, output: Path) -> list[str]:
        """Shell commands that build and serve, for backends whose library has its own."""
        return []

    def build_models(
        self, models: "list[ModelPlan]", limits: Limits, head: Head, workspace: Path, report: "Report"
    ) -> dict[str, ModelEngine]:
        """Writes all models into `workspace` and returns their records in the manifest, by their folders."""
        from fly_build.model_build import ModelBuild

        engines = {}
        for model in models:
            (workspace / model.folder).mkdir()
            engines[model.folder] = self.build_model(ModelBuild(model, limits, head, workspace, report))
        return engines

    def build_model(self, build: "ModelBuild") -> ModelEngine:
        """Writes one model into its folder, which exists, and returns its record in the manifest. For backends that
        build each for itself, through a graph."""
        raise NotImplementedError(type(self).__name__)

    def build_sharing(self, build: "ModelBuild", target: ModelEngine, tensors: "Tensors") -> ModelEngine:
        """Writes a model of some of the target's blocks, whose weights, `tensors`, are those in the target's file. For
        backends that can (`shares_weights`)."""
        raise NotImplementedError(type(self).__name__)

    def library_versions(self) -> dict[str, str]:
        """Of what the engines are made with, by distribution name."""
        return {name: importlib.metadata.version(name) for name in LIBRARIES}

    def speculative(self) -> dict[str, Any]:
        """The defaults of SpeculativeConfig that the manifest has."""
        return self.recipe.speculative

    @staticmethod
    @abstractmethod
    def step_costs(manifest: Manifest, directory: Path) -> tuple[float, float] | None:
        """draft_token_cost and verification_token_cost of a pair of engines of this backend; None where its library
        decides by itself when to draft."""
