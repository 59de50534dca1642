"""Recipes: what to build, as YAML. The command line's flags are the same fields and override the file's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fly_trt.errors import ConfigError
from fly_trt.manifest import Backend, Dtype, Quantization, TensorRTLibrary
from fly_trt.params import SpeculativeConfig

RECIPES = Path(__file__).resolve().parents[2] / "engines" / "recipes"


class ModelSource(BaseModel):
    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    revision: str | None = None


class Recipe(BaseModel):
    """One engine directory. `max_seq_len` None means what both checkpoints support, at most 8192 tokens; `dtype` None
    means float32 for ONNX Runtime and bfloat16 for TensorRT.

    Of TensorRT alone: which of its two libraries (None: the first that is installed), the plugin library whose kernels
    the head shall use (None: the graph's own functions), and where kernel timings are kept between builds.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    target: ModelSource
    draft: ModelSource | None = None
    backend: Backend = "onnxruntime"
    dtype: Dtype | None = None
    quantization: Quantization = "none"
    tensorrt_library: TensorRTLibrary | None = None
    plugin_library: str | None = None
    timing_cache: str | None = None
    max_batch_size: int = Field(default=8, gt=0)
    max_seq_len: int | None = Field(default=None, gt=0)
    max_draft_len: int = Field(default=32, ge=0)
    max_num_tokens: int = Field(default=512, gt=0)
    entropy_top_k: int = Field(default=3, gt=0)
    speculative: dict[str, Any] = Field(default_factory=dict)

    @property
    def stored_dtype(self) -> Dtype:
        return self.dtype or ("bfloat16" if self.backend == "tensorrt" else "float32")


TENSORRT_FIELDS = ("tensorrt_library", "plugin_library", "timing_cache")


def load_recipe(path: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe file (or a tracked recipe's name) with every override that is not None on top.

    Raises ConfigError with the field that is wrong.
    """
    content: dict[str, Any] = _read(path) if path else {}
    for role in ("target", "draft"):
        if overrides.get(role) is not None:
            content[role] = {"checkpoint": overrides[role], "revision": overrides.get(f"{role}_revision")}
        elif overrides.get(f"{role}_revision") is not None:
            if not isinstance(content.get(role), dict):
                raise ConfigError(
                    f"{role}_revision {overrides[f'{role}_revision']!r}: no {role} checkpoint: give --{role}"
                )
            content[role]["revision"] = overrides[f"{role}_revision"]
    content |= {
        k: v
        for k, v in overrides.items()
        if v is not None and k in Recipe.model_fields and k not in ("target", "draft")
    }
    if "target" not in content:
        raise ConfigError("no target checkpoint: give --target CHECKPOINT or a recipe file")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path or 'flags'}: {field}: {first['msg']}, got {first['input']!r}") from None
    speculative = SpeculativeConfig.from_dict(recipe.speculative)
    speculative.policy(vocab_size=2, entropy_top_k=recipe.entropy_top_k)
    _check_backend(recipe)
    if recipe.max_num_tokens <= recipe.max_draft_len:
        raise ConfigError(
            f"max_num_tokens {recipe.max_num_tokens}: a step holds max_draft_len ({recipe.max_draft_len}) draft tokens "
            "and at least one more: raise --max-num-tokens"
        )
    if recipe.speculative.get("num_speculative_tokens", 0) > recipe.max_draft_len:
        raise ConfigError(
            f"num_speculative_tokens {speculative.num_speculative_tokens} is more than "
            f"max_draft_len {recipe.max_draft_len}: raise --max-draft-len"
        )
    return recipe


def _check_backend(recipe: Recipe) -> None:
    if recipe.backend == "tensorrt":
        if recipe.quantization != "none":
            raise ConfigError(
                f"quantization {recipe.quantization!r}: backend tensorrt has none yet: use --quantization none"
            )
        return
    for name in TENSORRT_FIELDS:
        if getattr(recipe, name) is not None:
            raise ConfigError(f"{name}: belongs to backend tensorrt, got backend {recipe.backend!r}: leave it out")


def _read(path: str) -> dict[str, Any]:
    candidates = (Path(path), RECIPES / path, RECIPES / f"{path}.yaml")
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise ConfigError(f"{path}: no such recipe: give a YAML file or one of {known}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: a recipe is a mapping with at least `target`")
    _resolve_local(content, file.parent)
    return content


def _resolve_local(content: dict[str, Any], folder: Path) -> None:
    """A checkpoint that starts with a dot is relative to the recipe file."""
    for role in ("target", "draft"):
        source = content.get(role)
        if isinstance(source, str):
            source = content[role] = {"checkpoint": source}
        if isinstance(source, dict) and str(source.get("checkpoint", "")).startswith("."):
            source["checkpoint"] = str((folder / source["checkpoint"]).resolve())
