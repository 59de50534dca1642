"""Recipes: what to build, as YAML. The command line's flags are the same fields and override the file's.

What can be refused without reading a checkpoint or loading a library is refused here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fly_build.backends import BACKENDS, backend_names, devices_of
from fly_build.schema import TP_SIZES, Recipe
from fly_trt.errors import ConfigError
from fly_trt.manifest import Device
from fly_trt.params import SpeculativeConfig
from fly_trt.verification import HeadInfo

ROLES = ("target", "draft", "inner_draft")
SELF_DRAFT_FIELDS = ("calibrate", "contexts")
RECIPES = Path(__file__).resolve().parents[2] / "engines" / "recipes"


def load_recipe(path: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe file (or a tracked recipe's name) with every override that is not None on top.

    Raises ConfigError with the field that is wrong.
    """
    file = _find(path) if path else None
    content: dict[str, Any] = _read(file) if file else {}
    for role in ROLES:
        if overrides.get(role) is not None:
            content[role] = {"checkpoint": overrides[role], "revision": overrides.get(f"{role}_revision")}
        elif overrides.get(f"{role}_revision") is not None:
            if not isinstance(content.get(role), dict):
                raise ConfigError(
                    f"{role}_revision {overrides[f'{role}_revision']!r}: no {role} checkpoint: give --{_flag(role)}"
                )
            content[role]["revision"] = overrides[f"{role}_revision"]
    _override_self_draft(content, overrides)
    content |= {
        k: v
        for k, v in overrides.items()
        if v is not None and k in Recipe.model_fields and k not in (*ROLES, "self_draft")
    }
    if overrides.get("engine"):
        content["backend"] = _with_engines(content.get("backend"))
    if "target" not in content:
        raise ConfigError("no target checkpoint: give --target CHECKPOINT or a recipe file")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path or 'flags'}: {field}: {first['msg']}, got {first['input']!r}") from None
    recipe = recipe.model_copy(update={"device": _device(recipe, path or "flags")})
    if file is not None:
        recipe = recipe.read_from(str(file.resolve()))
    if recipe.self_draft is not None and recipe.draft is not None:
        raise ConfigError("self_draft: the target drafts for itself where there is no draft: leave out one of the two")
    if recipe.inner_draft is not None and recipe.draft is None:
        raise ConfigError("inner_draft: guesses for a draft model, and there is none: add --draft")
    speculative = SpeculativeConfig.from_dict(recipe.speculative)
    speculative.policy(HeadInfo(vocab_size=2, entropy_top_k=recipe.entropy_top_k, has_top_tokens=True))
    _check_backend(recipe)
    _check_ranks(recipe)
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


def _override_self_draft(content: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """`self_draft` is a flag, or the settings that the recipe's has; the other flags are fields of them. `calibrate` is
    one of `chain` where there is an inner draft."""
    asked = overrides.get("self_draft")
    fields = {name: overrides[name] for name in SELF_DRAFT_FIELDS if overrides.get(name) is not None}
    if isinstance(asked, Mapping):
        content["self_draft"] = dict(asked)
    elif asked:
        content["self_draft"] = content.get("self_draft") or {}
    if "calibrate" in fields and content.get("inner_draft") is not None:
        content["chain"] = (content.get("chain") or {}) | {"calibrate": fields.pop("calibrate")}
    if fields and not isinstance(content.get("self_draft"), dict):
        raise ConfigError(f"{next(iter(fields))}: belongs to a self-draft: add --self-draft")
    if fields:
        content["self_draft"] |= fields


def _with_engines(backend: object) -> str:
    """`--engine`: of a library that also runs models without, the backend that builds engines."""
    name = f"{str(backend).removesuffix('-engine')}-engine"
    if name in backend_names():
        return name
    able = " or ".join(name.removesuffix("-engine") for name in backend_names() if name.endswith("-engine"))
    raise ConfigError(
        f"engine: belongs to backend {able}, got backend {backend or 'onnxruntime'!r}: add --backend {able}, or leave "
        "it out"
    )


def _device(recipe: Recipe, where: str) -> Device:
    """What the engines run on; the backend's usual one unless it is given."""
    if recipe.backend not in backend_names():
        known = " or ".join(map(repr, backend_names()))
        raise ConfigError(f"{where}: backend: Input should be {known}, got {recipe.backend!r}")
    devices = devices_of(recipe.backend)
    if recipe.device is not None and recipe.device not in devices:
        raise ConfigError(
            f"device {recipe.device!r}: engines of backend {recipe.backend} run on {' or '.join(devices)}: leave "
            "--device out, or use --backend onnxruntime"
        )
    return recipe.device or devices[0]


def _check_backend(recipe: Recipe) -> None:
    assert recipe.device is not None
    chosen = BACKENDS[recipe.backend, recipe.device]
    chosen.check(recipe)
    if recipe.self_draft is not None and not chosen.shares_weights:
        able = " or ".join(f"{name} --device {device}" for (name, device), b in BACKENDS.items() if b.shares_weights)
        raise ConfigError(
            f"self_draft: engines of backend {recipe.backend} on {recipe.device} hold their own weights, so that the "
            f"target's would be there twice: use --backend {able}, or --draft"
        )
    for field in dict.fromkeys(field for backend in BACKENDS.values() for field in backend.own_fields):
        owners = list(dict.fromkeys(name for (name, _), backend in BACKENDS.items() if field in backend.own_fields))
        if recipe.backend not in owners and getattr(recipe, field) is not None:
            raise ConfigError(
                f"{field}: belongs to backend {' or '.join(owners)}, got backend {recipe.backend!r}: leave it out"
            )


def _check_ranks(recipe: Recipe) -> None:
    if recipe.tp_size not in (1, *TP_SIZES):
        sizes = ", ".join(map(str, TP_SIZES))
        raise ConfigError(f"tp_size {recipe.tp_size}: expected 1, or {sizes} GPUs of one machine")
    assert recipe.device is not None
    if recipe.tp_size > 1 and not BACKENDS[recipe.backend, recipe.device].spans_gpus:
        able = " or ".join(name for (name, _), backend in BACKENDS.items() if backend.spans_gpus and backend.exports)
        raise ConfigError(
            f"tp_size {recipe.tp_size}: an engine of backend {recipe.backend} runs on one device: use --backend {able} "
            "or leave --tp-size out"
        )
    if recipe.draft_tp_size not in (1, recipe.tp_size):
        raise ConfigError(
            f"draft_tp_size {recipe.draft_tp_size}: the draft runs on the first of the target's {recipe.tp_size} GPUs "
            f"or on all of them: use --draft-tp-size {' or '.join(str(size) for size in sorted({1, recipe.tp_size}))}"
        )
    if recipe.draft_tp_size > 1 and recipe.draft is None:
        raise ConfigError(f"draft_tp_size {recipe.draft_tp_size}: there is no draft: add --draft, or leave it out")


def _find(path: str) -> Path:
    candidates = (Path(path), RECIPES / path, RECIPES / f"{path}.yaml")
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise ConfigError(f"{path}: no such recipe: give a YAML file or one of {known}")
    return file


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: a recipe is a mapping with at least `target`")
    _resolve_local(content, file.parent)
    return content


def _resolve_local(content: dict[str, Any], folder: Path) -> None:
    """A checkpoint or a file that starts with a dot is relative to the recipe file."""
    for role in ROLES:
        source = content.get(role)
        if isinstance(source, str):
            source = content[role] = {"checkpoint": source}
        if isinstance(source, dict) and str(source.get("checkpoint", "")).startswith("."):
            source["checkpoint"] = str((folder / source["checkpoint"]).resolve())
    for name in ("self_draft", "chain"):
        settings = content.get(name)
        if isinstance(settings, dict) and str(settings.get("calibrate", "")).startswith("."):
            settings["calibrate"] = str((folder / settings["calibrate"]).resolve())


def _flag(role: str) -> str:
    return role.replace("_", "-")
