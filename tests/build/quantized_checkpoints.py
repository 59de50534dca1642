"""Checkpoints of quantised linear layers, packed here from the definitions of their formats and from nothing of
fly_build, each with the float weights that its codes stand for."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

GROUP = 32
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass
class Layer:
    """A quantised layer: its tensors by the last part of their names, the weight [out, in] that they stand for, and
    what happens to its input before: factors, and the step of rounding to fp8."""

    tensors: dict[str, torch.Tensor]
    weight: Floats
    input_scale: float | None = None
    factors: Floats | None = None


@dataclass(frozen=True)
class Format:
    """`config` is the quantization_config, or ModelOpt's file where `file` is set."""

    kind: str
    config: dict[str, Any]
    make: Callable[[Floats, np.random.Generator], Layer]
    file: str | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


def write(source: Path, folder: Path, form: Format) -> dict[str, Layer]:
    """A copy of the checkpoint `source` with all linear layers but the vocabulary projection quantised. Returns them by
    module."""
    rng = np.random.default_rng(0)
    tensors, layers = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = tensor
            continue
        layer = layers[module] = form.make(tensor.to(torch.float32).numpy(), rng)
        tensors |= {f"{module}.{suffix}": value.contiguous() for suffix, value in layer.tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors | form.extra, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if form.file is None:
        config["quantization_config"] = form.config
    else:
        (folder / form.file).write_text(json.dumps(form.config), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in source.iterdir():
        if not (folder / path.name).exists() and path.suffix != ".onnx":
            (folder / path.name).write_bytes(path.read_bytes())
    return layers


def pack(values: Ints, bits: int) -> torch.Tensor:
    """[n, m] -> int32 [n, m * bits / 32], the first value in the lowest bits."""
    per_word = 32 // bits
    rows, columns = values.shape
    words = np.zeros((rows, columns // per_word), np.uint32)
    for column in range(columns):
        words[:, column // per_word] |= values[:, column].astype(np.uint32) << np.uint32(bits * (column % per_word))
    return torch.from_numpy(words.view(np.int32))


def in_groups(
    weight: Floats, rng: np.random.Generator, bits: int, *, symmetric: bool, groups: Ints | None = None
) -> tuple[Ints, Floats, Ints, Floats]:
    """Unsigned codes [out, in], float16 scales and zero points [out, groups], and the weight that they stand for."""
    if groups is None:
        groups = np.arange(weight.shape[1]) // GROUP
    count, middle = int(groups.max()) + 1, 1 << (bits - 1)
    largest = np.stack([np.abs(weight[:, groups == group]).max(axis=1) for group in range(count)], axis=1)
    scales = (largest / (middle - 1) * rng.uniform(0.9, 1.1, largest.shape)).astype(np.float16).astype(np.float32)
    drift = 0 if symmetric else rng.integers(-2, 3, scales.shape)
    zeros = np.full(scales.shape, middle) + drift
    codes = np.clip(np.rint(weight / scales[:, groups]) + zeros[:, groups], 0, 2 * middle - 1).astype(np.int64)
    return codes, scales, zeros, ((codes - zeros[:, groups]) * scales[:, groups]).astype(np.float32)


def _half(values: Floats) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float16)


def awq(weight: Floats, rng: np.random.Generator, *, symmetric: bool = False) -> Layer:
    """GEMM: outputs 0, 2, 4, 6, 1, 3, 5, 7 of every eight from the lowest bits up, by input."""
    codes, scales, zeros, stands_for = in_groups(weight, rng, 4, symmetric=symmetric)

    def packed(values: Ints) -> torch.Tensor:
        places = np.arange(values.shape[1]).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
        return pack(values[:, places], 4)

    return Layer({"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": _half(scales.T)}, stands_for)


def gptq(
    weight: Floats,
    rng: np.random.Generator,
    *,
    bits: int = 4,
    stored_less: int = 1,
    symmetric: bool = False,
    desc_act: bool = False,
) -> Layer:
    """Eight inputs to a word, by output; zero points of eight outputs to a word, by group."""
    groups = np.arange(weight.shape[1]) // GROUP
    groups = rng.permutation(groups) if desc_act else groups
    codes, scales, zeros, stands_for = in_groups(weight, rng, bits, symmetric=symmetric, groups=groups)
    tensors = {
        "qweight": pack(codes, bits).T,
        "qzeros": pack(zeros.T - stored_less, bits),
        "scales": _half(scales.T),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
        "bias": torch.zeros(len(weight), dtype=torch.float16),  # as AutoGPTQ writes where there is none
    }
    return Layer(tensors, stands_for)


def packed(weight: Floats, rng: np.random.Generator, *, bits: int = 4, symmetric: bool = True) -> Layer:
    """compressed-tensors: eight inputs to a word, zero points of eight outputs to a word, by group."""
    codes, scales, zeros, stands_for = in_groups(weight, rng, bits, symmetric=symmetric)
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": _half(scales).to(torch.bfloat16).to(torch.float16),
        "weight_shape": torch.tensor(weight.shape),
    }
    exact = tensors["weight_scale"].to(torch.float32).numpy()
    stands_for = (codes - np.repeat(zeros, GROUP, axis=1)) * np.repeat(exact, GROUP, axis=1)
    if not symmetric:
        tensors["weight_zero_point"] = pack(zeros.T, bits).T
    return Layer(tensors, stands_for.astype(np.float32))


def fp8(
    weight: Floats,
    rng: np.random.Generator,
    *,
    per_output: bool = False,
    input_scale: bool = True,
    same_input_scale: bool = False,
) -> Layer:
    largest = np.abs(weight).max(axis=1, keepdims=True) if per_output else np.abs(weight).max()
    scale = torch.from_numpy(np.asarray(largest / FP8_MAX, np.float32))
    codes = (torch.from_numpy(weight) / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    tensors = {"weight": codes, "weight_scale": scale}
    step = float(np.float32(0.015 if same_input_scale else rng.uniform(0.01, 0.02))) if input_scale else None
    if step is not None:
        tensors["input_scale"] = torch.tensor(step)
    return Layer(tensors, (codes.to(torch.float32) * scale).numpy(), step)


def int8(weight: Floats, rng: np.random.Generator, *, flat: bool = False) -> Layer:
    scale = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(np.float32)
    codes = np.clip(np.rint(weight / scale), -128, 127).astype(np.int8)
    stored = torch.from_numpy(scale.ravel() if flat else scale)
    return Layer({"weight": torch.from_numpy(codes), "weight_scale": stored}, codes * scale)


def modelopt_int4(weight: Floats, rng: np.random.Generator) -> Layer:
    """Two outputs to a byte, the even one in the low half, in two's complement; the input is multiplied before."""
    factors = rng.uniform(0.5, 2, weight.shape[1]).astype(np.float32)
    codes, scales, _, stands_for = in_groups(weight / factors, rng, 4, symmetric=True)
    halves = (codes - 8) & 15
    tensors = {
        "weight": torch.from_numpy((halves[0::2] | (halves[1::2] << 4)).astype(np.uint8)),
        "weight_scale": torch.from_numpy(scales),
        "pre_quant_scale": torch.from_numpy(factors),
    }
    return Layer(tensors, stands_for, factors=factors)


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _integers(bits: int, *, symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
MODELOPT_FP8 = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
MODELOPT_INT4 = {"quant_algo": "W4A16_AWQ", "group_size": GROUP, "has_zero_point": False, "pre_quant_scale": True}
CACHE_SCALES = {f"model.layers.0.self_attn.{name}_proj.{name}_scale": torch.tensor(0.5) for name in "kv"}


def _with(make: Callable[..., Layer], **options: Any) -> Callable[[Floats, np.random.Generator], Layer]:
    return lambda weight, rng: make(weight, rng, **options)


FORMATS = {
    "awq": Format("int4", AWQ, awq),
    "awq without zero points": Format("int4", AWQ, _with(awq, symmetric=True)),
    "gptq": Format("int4", GPTQ, gptq),
    "gptq, symmetric": Format("int4", GPTQ | {"sym": True}, _with(gptq, symmetric=True)),
    "gptq, second format": Format("int4", GPTQ | {"checkpoint_format": "gptq_v2"}, _with(gptq, stored_less=0)),
    "gptq, ordered by activation": Format("int4", GPTQ | {"desc_act": True}, _with(gptq, desc_act=True)),
    "gptq in 8 bits": Format("int8", GPTQ | {"bits": 8}, _with(gptq, bits=8)),
    "compressed int4": Format("int4", _compressed("pack-quantized", _integers(4)), packed),
    "compressed int4 with zero points": Format(
        "int4", _compressed("pack-quantized", _integers(4, symmetric=False)), _with(packed, symmetric=False)
    ),
    "compressed int8 in groups": Format("int8", _compressed("pack-quantized", _integers(8)), _with(packed, bits=8)),
    "compressed int8": Format(
        "int8", _compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}), int8
    ),
    "compressed fp8": Format("fp8", _compressed("float-quantized", STATIC, STATIC), fp8),
    "compressed fp8, dynamic": Format(
        "fp8",
        _compressed("float-quantized", STATIC | {"strategy": "channel"}, DYNAMIC),
        _with(fp8, per_output=True, input_scale=False),
    ),
    # Layers of one input were calibrated on the same values.
    "modelopt fp8": Format(
        "fp8",
        {"quantization": MODELOPT_FP8},
        _with(fp8, same_input_scale=True),
        "hf_quant_config.json",
        CACHE_SCALES,
    ),
    "modelopt int4": Format("int4", {"quantization": MODELOPT_INT4}, modelopt_int4, "hf_quant_config.json"),
    "modelopt int8": Format(
        "int8", {"quantization": {"quant_algo": "W8A16"}}, _with(int8, flat=True), "hf_quant_config.json"
    ),
    "fp8": Format("fp8", {"quant_method": "fp8", "activation_scheme": "static"}, fp8),
    "fbgemm": Format(
        "fp8",
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        _with(fp8, per_output=True, input_scale=False),
    ),
}
