"""The tensors of a checkpoint: read as they are stored, and held against what its configuration announces.

transformers makes a model of the configuration and fills it with what fits: tensors that are missing become random
values, others are dropped. Here both are an error where the model would compute something else, and are named where
it does not.
"""

import contextlib
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from fly_build.quantized_layouts import LinearTensors, Scheme
from fly_build.quantized_weight import QuantizedWeight
from fly_build.stored import Stored, stored_tensors
from fly_trt.errors import CheckpointError

logger = logging.getLogger(__name__)

# The float types of safetensors that weights are read in, by what they hold; float32 holds all of them.
READABLE = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INPUT_NAME, OUTPUT_NAME = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
ROTARY_BUFFER = re.compile(r"(?:^|\.)rotary_emb\.")  # old checkpoints stored what is computed anyway
MULTIMODAL_WORDS = ("language_model", "text_model", "vision", "visual")
# Of quantised checkpoints: what engines have no use for, of the cache and of activations that are not quantised.
UNUSED_SCALE = re.compile(r"\.(?:(?:[qkv]|kv|prob|output|input)_scale|input_scale_ub|input_zero_point)$")
# Where peft is installed, transformers applies an adapter that lies beside the model, unless it is to look elsewhere.
NO_ADAPTER = {"subfolder": "no-adapter"}
NAMED_AT_MOST = 3

Parameter = torch.Tensor | QuantizedWeight
Tensors = Mapping[str, Parameter]
"""The parameters of a checkpoint, by name."""


def load_tensors(name: str, revision: str | None) -> dict[str, torch.Tensor]:
    """All parameters by the names of the transformers model; those that are tied share their memory. They are in the
    dtype of the files, whatever the configuration calls it; in float32 when those that are used have several.

    Raises CheckpointError for weights that do not load, are missing, or belong to another computation than the
    configuration's. What the model does not use is logged as a warning.
    """
    try:
        stored = _float_tensors(name, revision)
        likely_used = [key for key in stored if not ROTARY_BUFFER.search(key)]
        model, info = _load(name, revision, dtype=_common_dtype(stored, likely_used))
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise CheckpointError(f"{name}: {_why_not_loaded(name, revision, error)}") from None
    except (AttributeError, LookupError, TypeError) as error:  # what a wrong index file causes
        kind = type(error).__name__
        raise CheckpointError(f"{name}: the weights do not load: {kind}: {first_line(error)}") from None
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise CheckpointError(f"{name}: {_why_missing(missing, unexpected, len(model.state_dict()))}")
    ineffective = [key for key in unexpected if ROTARY_BUFFER.search(key) or _is_bias_of_zeros(key, stored)]
    _check_unexpected(name, unexpected, ineffective, {path for path, _ in model.named_modules()})
    # One that is not used may be all that was in another dtype.
    model.to(_common_dtype(stored, [key for key in likely_used if key not in unexpected]))
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings and not _is_shared(tensors):
        logger.warning(
            "%s: tie_word_embeddings is true, but lm_head.weight differs from the embeddings: both are used, as "
            "transformers does",
            name,
        )
    return tensors


def load_quantized(name: str, revision: str | None, scheme: Scheme, model: Any, *, is_tied: bool) -> Tensors:
    """The parameters of `model`, which is asked for names and shapes only, from a checkpoint of quantised linear
    layers: those as they are, everything else as it is stored. Both are mapped from the files and read when they are
    used; the libraries that quantise are not asked. `is_tied`: where no vocabulary projection is stored, it is the
    embeddings.

    Raises CheckpointError for the same as `load_tensors`, and for layers that are not as the scheme has them.
    """
    try:
        stored = stored_tensors(name, revision)
    except (OSError, ValueError, AttributeError, LookupError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{name}: the weights do not load: {first_line(error)}") from None
    tensors: dict[str, Parameter] = {}
    used, missing = set(), []
    for key, made in model.state_dict().items():
        module, shape = key.removesuffix(".weight"), tuple(made.shape)
        mark = stored.get(f"{module}.{scheme.suffix}")
        if mark is not None and mark.kind not in READABLE and len(shape) == 2:
            linear = LinearTensors(name, module, shape, stored)
            tensors[key] = scheme.read(scheme, linear)
            used |= linear.used
        elif key not in stored:
            missing.append(key)
        elif stored[key].shape != shape or stored[key].kind not in READABLE:
            found = stored[key]
            raise CheckpointError(
                f"{name}: {key} is {found.kind} {list(found.shape)}, config.json makes it floats of {list(shape)}: "
                "correct config.json, or download it again"
            )
        else:
            tensors[key] = stored[key].read()
            used.add(key)
    if missing == [OUTPUT_NAME] and is_tied:
        tensors[OUTPUT_NAME] = tensors[INPUT_NAME]
        missing = []
    unexpected = sorted(stored.keys() - used)
    if missing:
        raise CheckpointError(f"{name}: {_why_missing(missing, unexpected, len(tensors) + len(missing))}")
    if not any(isinstance(tensor, QuantizedWeight) for tensor in tensors.values()):
        raise CheckpointError(f"{name}: quantised by {scheme.method} says config.json, but no tensor is: correct it")
    ineffective = [
        key
        for key in unexpected
        if ROTARY_BUFFER.search(key) or UNUSED_SCALE.search(key) or _is_bias_of_zeros(key, stored)
    ]
    _check_unexpected(name, unexpected, ineffective, {path for path, _ in model.named_modules()})
    return tensors


def plain_tensors(name: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that nobody quantised. Raises CheckpointError for another one."""
    plain = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if len(plain) < len(tensors):
        raise CheckpointError(f"{name}: its weights are quantised: give the original, and use --quantization")
    return plain


def place_of(tensor: Parameter) -> int:
    """Tensors of one place share their memory."""
    return id(tensor) if isinstance(tensor, QuantizedWeight) else tensor.data_ptr()


def count_parameters(tensors: Tensors) -> int:
    """Those that share their memory are one."""
    return sum({place_of(tensor): tensor.numel() for tensor in tensors.values()}.values())


def check_values(name: str, tensors: Tensors, dtype: torch.dtype, computed: npt.DTypeLike = np.float32) -> None:
    """Raises CheckpointError for values that no engine could compute with, or that `dtype` does not hold, and for
    scales of quantised weights that do not fit to activations of the type `computed`."""
    for key, tensor in tensors.items():
        if isinstance(tensor, QuantizedWeight):
            tensor.check_scales(computed)
            continue
        if tensor.numel() == 0:
            continue
        low, high = (float(bound) for bound in torch.aminmax(tensor))
        largest = max(-low, high)
        if largest != largest:
            raise CheckpointError(f"{name}: {key} has NaN values, in any dtype: the checkpoint is broken, get it anew")
        if largest == float("inf"):
            raise CheckpointError(
                f"{name}: {key} has infinite values, in any dtype: the checkpoint is broken, get it anew"
            )
        limit = torch.finfo(dtype).max
        # Rounded, as writing it will: what is a little beyond the limit rounds to it.
        if largest > limit and torch.tensor(largest).to(dtype).isinf():
            stored = str(dtype).removeprefix("torch.")
            wider = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
            raise CheckpointError(
                f"{name}: {key} has values up to {largest:.6g}, {stored} ends at {limit:.6g}: use --dtype {wider}"
            )


def _load(name: str, revision: str | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The transformers model, and what it says of names and shapes."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        use_safetensors=True,
        output_loading_info=True,
        adapter_kwargs=NO_ADAPTER,
        **options,
    )
    return loaded


def _float_tensors(name: str, revision: str | None) -> dict[str, Stored]:
    """Every tensor in the files. Raises CheckpointError for weights that are no floats: transformers would read
    integers as weights."""
    stored = stored_tensors(name, revision)
    for key, tensor in stored.items():
        if tensor.kind not in READABLE and key.endswith(".weight"):
            raise CheckpointError(
                f"{name}: {key} is stored as {tensor.kind}, which looks quantised, and config.json has no "
                "quantization_config: add it, or give the original and use --quantization"
            )
    return stored


def _common_dtype(stored: dict[str, Stored], keys: list[str]) -> torch.dtype:
    """The one dtype of these float tensors, or float32, which holds the values of all."""
    dtypes = {READABLE[kind] for key in keys if (kind := stored[key].kind) in READABLE}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _is_bias_of_zeros(key: str, stored: dict[str, Stored]) -> bool:
    if not key.endswith(".bias") or key not in stored or stored[key].kind not in READABLE:
        return False
    return not stored[key].read().any()


def _is_shared(tensors: dict[str, torch.Tensor]) -> bool:
    output = tensors.get(OUTPUT_NAME)
    return output is None or output.data_ptr() == tensors[INPUT_NAME].data_ptr()


def _why_not_loaded(name: str, revision: str | None, error: Exception) -> str:
    """transformers refuses tensors of another shape without naming them, so it is asked once more."""
    shapes: list[str] = []
    if isinstance(error, RuntimeError):
        with contextlib.suppress(Exception):
            # Untied: it fails at comparing output weights of another shape with tied embeddings.
            _, info = _load(name, revision, ignore_mismatched_sizes=True, tie_word_embeddings=False)
            shapes = [
                f"{key} has shape {list(stored)}, config.json makes it {list(made)}"
                for key, stored, made in sorted(info["mismatched_keys"])
            ]
    if shapes:
        return f"{some(shapes, '; ')}: correct config.json, or download it again"
    return f"the weights do not load: {first_line(error)}"


def _why_missing(missing: list[str], unexpected: list[str], num_tensors: int) -> str:
    for name in unexpected:
        prefix, dot, _ = name.partition("layers.0.")
        if not dot or prefix in ("", "model."):
            continue
        if any(word in prefix for word in MULTIMODAL_WORDS):
            return (
                f"its tensors begin with {prefix!r}, as those of a larger (multimodal) model do: save its text decoder "
                "as a checkpoint of its own and build that"
            )
        added = prefix.removesuffix("model.")
        return f"its tensors begin with {added!r}, as those of a wrapped model or of other code do: save it without"
    fix = "download it again" if len(missing) == num_tensors else "download it again, or correct config.json"
    return f"{len(missing)} missing tensors, the first is {missing[0]}: {fix}"


def _check_unexpected(name: str, unexpected: list[str], ineffective: list[str], modules: set[str]) -> None:
    """A tensor inside of a module that computes changes what it computes, unless it is one of `ineffective`; one beside
    them all is only unused."""
    containers = {"", "model", "model.layers"}
    within = [key for key in unexpected if _nearest(key, modules) not in containers]
    if inside := [key for key in within if key not in ineffective]:
        fields = "attention_bias, mlp_bias or model_type" if inside[0].endswith(".bias") else "config.json"
        raise CheckpointError(
            f"{name}: config.json announces no {some(inside)}: the model would compute something else without: "
            f"correct {fields}, or remove what is not part of the model"
        )
    if unexpected:
        beside = [key for key in unexpected if key not in within]
        logger.warning(
            "%s: not used, because config.json does not announce them: %s", name, some(_by_layer(beside) + within)
        )


def _nearest(key: str, modules: set[str]) -> str:
    """The innermost module of the model that the tensor's name lies in."""
    while key not in modules:
        key = key.rpartition(".")[0]
    return key


def _by_layer(keys: list[str]) -> list[str]:
    """Tensors of one layer as one item."""
    layers = {key: LAYER.search(key) for key in keys}
    return list(dict.fromkeys(f"{key[: found.end()]}*" if found else key for key, found in layers.items()))


def some(names: Iterable[str], separator: str = ", ") -> str:
    """The first few, and how many more there are."""
    names = list(names)
    more = len(names) - NAMED_AT_MOST
    return separator.join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
