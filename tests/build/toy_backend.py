"""A backend of the build in one module: its models are files that say what they were made of."""

from pathlib import Path

from fly_build.backends import Backend
from fly_build.model_build import ModelBuild
from fly_build.schema import Recipe
from fly_trt.errors import ConfigError
from fly_trt.manifest import Dtype, Manifest, ModelEngine

STEP_COSTS = 0.25, 0.12


class ToyBackend(Backend):
    default_dtype = "float16"
    model_file = "model.toy"

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if recipe.quantization != "none":
            raise ConfigError("quantization: a toy has none")

    @property
    def kv_cache_dtype(self) -> Dtype:
        return "bfloat16"

    def build_model(self, build: ModelBuild) -> ModelEngine:
        with build.step("play"):
            build.path.write_text(build.model.checkpoint.name)
        return build.model.engine

    def library_versions(self) -> dict[str, str]:
        return {"toy": "1"}

    @staticmethod
    def step_costs(manifest: Manifest, directory: Path) -> tuple[float, float]:
        return STEP_COSTS
