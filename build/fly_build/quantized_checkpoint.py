"""Checkpoints whose linear layers are quantised already, as they are served: which methods are known, and what their
configurations mean.

The configuration says the method and the bits; which layers are quantised, the tensors say (quantized_layouts.py).
Nothing is dequantised.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from fly_build.quantized_layouts import (
    FIX,
    Scheme,
    read_awq,
    read_fp8,
    read_gptq,
    read_int8,
    read_modelopt_int4,
    read_packed,
)
from fly_build.quantized_weight import Codes
from fly_trt.errors import CheckpointError

logger = logging.getLogger(__name__)

MODELOPT_CONFIG = "hf_quant_config.json"


def read_scheme(name: str, revision: str | None, config: Any, *, is_exported: bool = True) -> Scheme | None:
    """None for a checkpoint that is not quantised. Raises CheckpointError for a method that is not read, by name. With
    `is_exported` False another library reads the weights: only their kind is asked for."""
    found = getattr(config, "quantization_config", None)
    content = found.to_dict() if found is not None and hasattr(found, "to_dict") else found
    if not (content is None or isinstance(content, dict)):
        raise CheckpointError(f"{name}: no usable config.json: quantization_config {found!r}: expected a mapping")
    method = str((content or {}).get("quant_method", "")).replace("_", "-")
    if content is None or method == "modelopt":
        content = _modelopt_config(name, revision) or content
        if content is None:
            return None
        method = "modelopt"
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise CheckpointError(f"{name}: quantised by {method or 'an unnamed method'}, expected one of {known}: {FIX}")
    try:
        scheme = METHODS[method](content)
    except (AttributeError, KeyError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: no usable quantization_config of {method}: {error!r}: {FIX}") from None
    if isinstance(scheme, str) and not is_exported and method == "fp8":  # in blocks of two dimensions
        scheme = _fp8_scheme(method, is_dynamic=True)
    if isinstance(scheme, str):
        raise CheckpointError(f"{name}: quantised by {method}, {scheme}: {FIX}")
    if not is_exported:
        return replace(scheme, kv_cache_algorithm=content.get("kv_cache_quant_algo"))
    if content.get("kv_cache_scheme") or content.get("kv_cache_quant_algo"):
        logger.warning("%s: its scales for the KV cache are not used: the cache is not quantised", name)
    if not scheme.keeps_activations:
        logger.warning(
            "%s: made for activations quantised per token, which are not: its weights are read as they are", name
        )
    return scheme


def _modelopt_config(name: str, revision: str | None) -> dict[str, Any] | None:
    try:
        path = cached_file(name, MODELOPT_CONFIG, revision=revision, _raise_exceptions_for_missing_entries=False)
        content = None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("quantization") if isinstance(content, dict) else None


def _awq(config: dict[str, Any]) -> Scheme | str:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm" or config.get("bits", config.get("w_bit")) != 4:
        return f"version {version!r} with {config.get('bits')} bits: expected 'gemm' with 4"
    group = int(config.get("group_size", config.get("q_group_size", 128)))
    return Scheme("awq", "int4", "qweight", read_awq, 4, _group(group))


def _gptq(config: dict[str, Any]) -> Scheme | str:
    bits, form = config.get("bits"), config.get("checkpoint_format") or config.get("format", "gptq")
    if bits not in (4, 8) or form not in ("gptq", "gptq_v2"):
        return f"checkpoint_format {form!r} with {bits} bits: expected 'gptq' or 'gptq_v2' with 4 or 8"
    group = _group(int(config.get("group_size", 128)))
    return Scheme("gptq", _integer_kind(bits), "qweight", read_gptq, bits, group, is_v1=form == "gptq")


def _compressed_tensors(config: dict[str, Any]) -> Scheme | str:
    groups = list(config["config_groups"].values())
    if len(groups) != 1:
        return f"{len(groups)} config_groups: expected one"
    weights, inputs = groups[0]["weights"], groups[0].get("input_activations")
    form, bits, strategy = groups[0].get("format") or config["format"], weights["num_bits"], weights.get("strategy")
    group = _group(weights.get("group_size") or -1)
    if strategy not in ("tensor", "channel", "group"):
        return f"weights with strategy {strategy!r}: expected 'tensor', 'channel' or 'group'"
    if form == "pack-quantized" and weights["type"] == "int" and bits in (4, 8):
        return Scheme("compressed-tensors", _integer_kind(bits), "weight_packed", read_packed, bits, group)
    if form == "float-quantized" and weights["type"] == "float" and bits == 8 and strategy != "group":
        return _fp8_scheme("compressed-tensors", inputs is not None and bool(inputs.get("dynamic")))
    if form == "int-quantized" and weights["type"] == "int" and bits == 8 and strategy != "group":
        return Scheme("compressed-tensors", "int8", "weight", read_int8, keeps_activations=inputs is None)
    return (
        f"format {form!r} with {bits} bits {weights['type']}, strategy {strategy!r}: expected float-quantized (fp8), "
        "int-quantized (8 bits) or pack-quantized (4 or 8 bits)"
    )


def _modelopt(config: dict[str, Any]) -> Scheme | str:
    algorithm = config["quant_algo"]
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return _fp8_scheme("modelopt", algorithm != "FP8")
    if algorithm == "W4A16_AWQ":
        group = int(config.get("group_size") or _first_group(config).get("group_size") or 128)
        return Scheme("modelopt", "int4", "weight", read_modelopt_int4, 4, _group(group))
    if algorithm == "W8A16":
        return Scheme("modelopt", "int8", "weight", read_int8)
    return f"quant_algo {algorithm!r}: expected FP8, FP8_PER_CHANNEL_PER_TOKEN, W4A16_AWQ or W8A16"


def _fp8(config: dict[str, Any]) -> Scheme | str:
    if config.get("weight_block_size"):
        return f"in blocks of {config['weight_block_size']}, for which TensorRT has no product"
    return _fp8_scheme("fp8", config.get("activation_scheme") == "dynamic")


METHODS: dict[str, Callable[[dict[str, Any]], Scheme | str]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "fp8": _fp8,
    "fbgemm-fp8": lambda config: _fp8_scheme("fbgemm-fp8", True),
}
"""By quant_method: the scheme that a quantization_config describes, or why it is not read."""


def _fp8_scheme(method: str, is_dynamic: bool) -> Scheme:
    return Scheme(method, "fp8", "weight", read_fp8, keeps_activations=not is_dynamic)


def _integer_kind(bits: int) -> Codes:
    return "int4" if bits == 4 else "int8"


def _group(size: int) -> int | None:
    return size if size > 0 else None


def _first_group(config: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt's configuration in config.json is grouped as that of compressed-tensors."""
    groups = list((config.get("config_groups") or {"": {}}).values())
    return groups[0].get("weights") or {}
