"""Quantised checkpoints of every known format: the codes are read as they were packed, and the graphs made of them, for
ONNX Runtime and for TensorRT, compute what transformers computes with the weights that the codes stand for.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from click.testing import CliRunner
from merged_ranks import MergedRunner
from quantized_checkpoints import FORMATS, FP8, FP8_MAX, GROUP, Layer, write
from safetensors.torch import load_file, save_file

from fly_build.checkpoint import open_checkpoint
from fly_build.cli import main
from fly_build.linear_form import Kernels
from fly_build.pipeline import make_plan
from fly_build.quantized_weight import QuantizedWeight
from fly_build.recipe import load_recipe
from fly_trt.errors import CheckpointError, ConfigError
from fly_trt.manifest import Quantization
from tiny_models import (
    MAX_SEQ_LEN,
    PREFILL,
    SHAPE,
    Runner,
    add_demo_tokenizer,
    check_against_transformers,
    count_operators,
    finish_graph,
    reference_logits,
    save_tiny,
    tiny_llama,
)
from traced_once import export_once

CALM = 0.08
SIZES = {"intermediate_size": 128, "initializer_range": CALM}
NUM_LINEARS = 2 * 7
FLOATS = [name for name, form in FORMATS.items() if form.kind == "fp8"]
INTEGERS = [name for name in FORMATS if name not in FLOATS]
STATIC_FP8 = ["compressed fp8", "modelopt fp8", "fp8"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("original")
    model = save_tiny(tiny_llama(**SIZES, vocab_size=896), folder)
    add_demo_tokenizer(folder)
    return folder, model


@pytest.fixture(scope="module")
def made(
    original: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Layer]]]:
    root, known = tmp_path_factory.mktemp("made"), {}

    def make(name: str) -> tuple[Path, dict[str, Layer]]:
        if name not in known:
            folder = root / name.replace(" ", "-")
            known[name] = folder, write(original[0], folder, FORMATS[name])
        return known[name]

    return make


Made = Callable[[str], tuple[Path, dict[str, Layer]]]


def decoded(weight: QuantizedWeight) -> npt.NDArray[np.float64]:
    """(codes - zero points) * scales, each input in its place."""
    codes = weight.codes().astype(np.float64)
    rows, columns = weight.shape
    block = np.arange(columns) // weight.block_size
    scales = np.broadcast_to(weight.scales(), (rows, weight.num_blocks)).astype(np.float64)
    zeros = np.zeros_like(scales) if weight.zero_points is None else weight.zero_points().astype(np.float64)
    values = (codes - zeros[:, block]) * scales[:, block]
    if weight.input_order is None:
        return values
    in_place = np.empty_like(values)
    in_place[:, weight.input_order] = values
    return in_place


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_read_as_they_were_packed(name: str, made: Made) -> None:
    folder, layers = made(name)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.scheme is not None
    assert checkpoint.scheme.kind == FORMATS[name].kind
    tensors = checkpoint.load_weights()
    quantised = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, QuantizedWeight)}
    assert quantised.keys() == {f"{module}.weight" for module in layers}
    assert len(quantised) == NUM_LINEARS
    for module, layer in layers.items():
        weight = quantised[f"{module}.weight"]
        np.testing.assert_allclose(decoded(weight), layer.weight, rtol=2e-7, atol=1e-12)
        assert weight.kind == FORMATS[name].kind
        assert weight.activation_scale == layer.input_scale
        np.testing.assert_equal(weight.input_factors and weight.input_factors(), layer.factors)


def test_zero_points_in_the_middle_are_none(made: Made) -> None:
    for name, has in (("awq", True), ("awq without zero points", False), ("gptq", True), ("gptq, symmetric", False)):
        weights = open_checkpoint(str(made(name)[0])).load_weights().values()
        found = {weight.zero_points is not None for weight in weights if isinstance(weight, QuantizedWeight)}
        assert found == {has}


class RoundedLinear(torch.nn.Module):
    """What a quantised layer means: inputs times factors, rounded to fp8 where it has a step, times the weight."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, self.weight = layer, torch.from_numpy(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer.factors is not None:
            x = x * torch.from_numpy(self.layer.factors)
        if (step := self.layer.input_scale) is not None:
            x = (x / step).clamp(-FP8_MAX, FP8_MAX).to(FP8).to(torch.float32) * step
        return x @ self.weight.T


def dequantised(model: torch.nn.Module, layers: dict[str, Layer]) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for module, layer in layers.items():
        model.set_submodule(module, RoundedLinear(layer))
    return model


def runner(
    folder: Path, output: Path, kernels: Kernels, quantization: Quantization = "none"
) -> tuple[Runner, dict[str, int]]:
    checkpoint = open_checkpoint(str(folder))
    attention = "mask" if kernels == "tensorrt" else "lengths"
    decoder = export_once(checkpoint, MAX_SEQ_LEN, attention=attention)  # type: ignore[arg-type]
    path = output / "model.onnx"
    graph = finish_graph(decoder, checkpoint, path, "float32", quantization, attention, kernels)  # type: ignore[arg-type]
    return Runner(path, checkpoint, 2), count_operators(graph)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in STATIC_FP8])
def test_graphs_for_tensorrt_compute_what_the_codes_stand_for(
    name: str, made: Made, original: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    folder, layers = made(name)
    run, operators = runner(folder, tmp_path, "tensorrt")
    check_against_transformers(dequantised(original[1], layers), run)
    assert operators["DequantizeLinear"] >= 2 * 4  # query, key and value are one, and so are gate and up


@pytest.mark.parametrize("name", STATIC_FP8)
def test_calibrated_fp8_rounds_the_activations_of_each_layer_with_its_own_scale(
    name: str, made: Made, original: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    """An activation that lies between two fp8 numbers may be rounded to either, so single logits may move."""
    folder, layers = made(name)
    run, operators = runner(folder, tmp_path, "tensorrt")
    # Query, key and value, and gate and up, are one product where they round their input alike.
    assert operators["QuantizeLinear"] == (2 * 4 if name == "modelopt fp8" else NUM_LINEARS)
    ids = np.random.default_rng(0).integers(3, 890, (2, PREFILL))
    got = run.step(ids, [0, 0])["logits"]
    want = np.stack(reference_logits(dequantised(original[1], layers), *ids))
    weights_alone = {module: Layer({}, layer.weight) for module, layer in layers.items()}
    without = np.stack(reference_logits(dequantised(original[1], weights_alone), *ids))
    error, rounding = np.abs(got - want).mean(), np.abs(without - want).mean()
    assert error < 0.02 * rounding


@pytest.mark.parametrize("name", ["awq", "modelopt int4", "compressed fp8, dynamic", "gptq, symmetric"])
def test_the_ranks_of_a_sharded_checkpoint_compute_it_together(
    name: str, made: Made, original: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    folder, layers = made(name)
    run = MergedRunner(open_checkpoint(str(folder)), 2, tmp_path / "merged.onnx", kernels="tensorrt")
    check_against_transformers(dequantised(original[1], layers), run)


def test_fused_projections_of_a_quantised_checkpoint_are_sharded_by_their_parts(tmp_path: Path) -> None:
    """A rank's rows of phi3's query, key and value lie apart in one tensor, and so do those of gate and up."""
    model = save_tiny(transformers.Phi3Config(**SHAPE | SIZES), tmp_path / "original")
    for name in ("awq", "modelopt int4"):
        folder = tmp_path / name.replace(" ", "-")
        layers = write(tmp_path / "original", folder, FORMATS[name])
        assert any(module.endswith("qkv_proj") for module in layers)
        run = MergedRunner(open_checkpoint(str(folder)), 2, folder / "merged.onnx", kernels="tensorrt")
        check_against_transformers(dequantised(model, layers), run)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_ranks_that_are_quantised_here_are_as_near_the_original_as_one_is(
    quantization: Quantization, tmp_path: Path
) -> None:
    """Each rank rounds its own part. Tied embeddings are cut by vocabulary, and are a quantised projection beside."""
    model = save_tiny(tiny_llama(**SIZES, tie_word_embeddings=True), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    ranks = MergedRunner(checkpoint, 2, tmp_path / "merged.onnx", kernels="tensorrt", quantization=quantization)
    assert ranks.sharding.by_vocabulary
    one, _ = runner(tmp_path, tmp_path, "tensorrt", quantization)
    ids = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (2, PREFILL))
    want = np.stack(reference_logits(model, *ids))
    errors = [np.abs(run.step(ids, [0, 0])["logits"] - want).mean() for run in (ranks, one)]
    assert errors[1] > 1e-3
    assert 0.67 < errors[0] / errors[1] < 1.5


def test_what_a_checkpoint_orders_by_activation_is_not_sharded(made: Made, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(made("gptq, ordered by activation")[0]))
    with pytest.raises(CheckpointError, match=r"o_proj.weight: its inputs are in the order .* cannot be sharded"):
        MergedRunner(checkpoint, 2, tmp_path / "merged.onnx", kernels="tensorrt")


@pytest.mark.parametrize("name", INTEGERS)
def test_graphs_for_onnxruntime_are_near_what_the_codes_stand_for(
    name: str, made: Made, original: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    """MatMulNBits rounds activations to 8 bits on the CPU, as it does for our own int4."""
    folder, layers = made(name)
    run, operators = runner(folder, tmp_path, "cpu")
    assert operators["MatMulNBits"] == NUM_LINEARS
    ids = np.random.default_rng(0).integers(3, 890, (2, PREFILL))
    got = run.step(ids, [0, 0])["logits"].astype(np.float64)
    want = np.stack(reference_logits(dequantised(original[1], layers), *ids))
    assert (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want) > 0.999


def _plan(folder: Path, output: Path, **fields: Any) -> Any:
    return make_plan(load_recipe(None, {"target": str(folder), "max_seq_len": 64, **fields}), output)


def test_a_quantised_checkpoint_says_its_own_quantization(made: Made, tmp_path: Path) -> None:
    folder, layers = made("awq")
    (model,) = _plan(folder, tmp_path / "engine").models
    assert model.engine.quantization == "int4"
    (same,) = _plan(made("awq")[0], tmp_path / "engine", quantization="int4").models
    assert same.engine.quantization == "int4"
    quantised = sum(layer.weight.size for layer in layers.values())
    floats = model.engine.source.num_parameters - quantised
    assert model.weight_bytes() == quantised * (4 + 16 / GROUP) / 8 + 4 * floats


def test_a_plan_says_what_each_model_has(made: Made, original: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    flags = ["--target", str(made("awq")[0]), "-o", str(tmp_path / "engine"), "--dry-run"]
    alone = CliRunner().invoke(main, flags)
    assert ", quantization int4, KV cache float32, max_batch_size" in alone.stdout, alone.output
    pair = CliRunner().invoke(main, [*flags, "--draft", str(original[0])])
    assert ", quantization target int4, draft none, KV cache float32, max_batch_size" in pair.stdout, pair.output


@pytest.mark.parametrize("field", ["checkpoint_format", "format"])
def test_gptq_names_its_format_in_one_of_two_fields(
    field: str, original: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    content = json.loads((original[0] / "config.json").read_text(encoding="utf-8"))
    for form in ("gptq", "gptq_v2"):
        config = {"quant_method": "gptq", "bits": 4, field: form}
        (tmp_path / "config.json").write_text(json.dumps(content | {"quantization_config": config}), encoding="utf-8")
        scheme = open_checkpoint(str(tmp_path), needs_weights=False).scheme
        assert scheme is not None
        assert scheme.is_v1 == (form == "gptq")


REFUSED_PLANS = {
    "other bits": ("awq", {"quantization": "int8"}, r"weights are int4 already \(awq\), asked for int8: leave"),
    "fp8 on a CPU": ("modelopt fp8", {}, r"are fp8 already \(modelopt\), for which backend onnxruntime has no product"),
    "self-draft": ("gptq", {"self_draft": {"contexts": [16]}}, r"is quantised \(gptq\), and the blocks to leave out"),
}


@pytest.mark.parametrize("case", REFUSED_PLANS)
def test_what_does_not_go_with_the_checkpoint_is_refused_before_weights_are_read(
    case: str, made: Made, tmp_path: Path
) -> None:
    name, fields, message = REFUSED_PLANS[case]
    with pytest.raises(ConfigError, match=message) as refused:
        _plan(made(name)[0], tmp_path / "engine", **fields)
    assert "\n" not in str(refused.value)


REFUSED_CONFIGS: dict[str, tuple[Any, str]] = {
    "unknown": ({"quant_method": "hqq"}, "quantised by hqq, expected one of awq, gptq, compressed-tensors"),
    "unnamed": ({"bits": 4}, "quantised by an unnamed method"),
    "awq gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq, version 'gemv' with 4 bits: expected"),
    "3 bits": ({"quant_method": "gptq", "bits": 3}, "checkpoint_format 'gptq' with 3 bits: expected 'gptq'"),
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"in blocks of \[128, 128\]"),
    "fp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "quant_algo 'NVFP4': expected FP8, FP8_PER_CHANNEL_PER_TOKEN, W4A16_AWQ or W8A16",
    ),
    "two groups": ({"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": {}}}, "2 config_groups"),
    "no groups": ({"quant_method": "compressed-tensors"}, "no usable quantization_config of compressed-tensors"),
    "a wrong group": (
        {"quant_method": "gptq", "bits": 4, "group_size": "wide"},
        "no usable quantization_config of gptq",
    ),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_other_methods_are_refused_by_name(case: str, original: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    config, message = REFUSED_CONFIGS[case]
    content = json.loads((original[0] / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(content | {"quantization_config": config}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as refused:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(refused.value)


Q_PROJ = "model.layers.1.self_attn.q_proj"
BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no scales": (lambda tensors: tensors.pop(f"{Q_PROJ}.scales"), f"no {Q_PROJ}.scales: the checkpoint is incomplete"),
    "other words": (
        lambda tensors: tensors.update({f"{Q_PROJ}.qweight": tensors[f"{Q_PROJ}.qweight"][:4].clone()}),
        rf"{Q_PROJ}.qweight is I32 \[4, 64\], expected I32 \[8, 64\]",
    ),
    "groups of other sizes": (
        lambda tensors: tensors[f"{Q_PROJ}.g_idx"].fill_(1),
        f"{Q_PROJ} has groups of other sizes than 32",
    ),
    "a missing norm": (lambda tensors: tensors.pop("model.norm.weight"), "1 missing tensors, the first is model.norm"),
    "a real bias": (
        lambda tensors: tensors[f"{Q_PROJ}.bias"].fill_(1),
        f"config.json announces no {Q_PROJ}.bias: the model would compute something else",
    ),
    "another width": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
        r"model.norm.weight is F32 \[3\], config.json makes it floats of \[64\]",
    ),
    "nothing quantised": (lambda tensors: _make_plain(tensors), "quantised by gptq says config.json, but no tensor is"),
}


def _make_plain(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "_proj." in key]:
        suffix, tensor = key.rpartition(".")[2], tensors.pop(key)
        if suffix == "qweight":
            tensors[key.replace("qweight", "weight")] = torch.zeros(tensor.shape[1], 8 * tensor.shape[0])


@pytest.mark.parametrize("case", BROKEN)
def test_broken_quantised_checkpoints_are_refused_in_one_line(case: str, made: Made, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    folder, _ = made("gptq")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=message) as refused:
        open_checkpoint(str(tmp_path)).load_weights()
    assert "\n" not in str(refused.value)


def test_the_tensors_of_a_layer_may_lie_in_several_files(made: Made, tmp_path: Path) -> None:
    """As on the hub: files of a size each, and an index."""
    folder, layers = made("awq")
    tensors = load_file(folder / "model.safetensors")
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {name: files[name.endswith(".scales")] for name in tensors}
    for file in files:
        save_file({name: tensors[name] for name in tensors if index[name] == file}, tmp_path / file)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = open_checkpoint(str(tmp_path)).load_weights()
    for module, layer in layers.items():
        weight = weights[f"{module}.weight"]
        assert isinstance(weight, QuantizedWeight)
        np.testing.assert_allclose(decoded(weight), layer.weight, rtol=2e-7, atol=1e-12)


def test_tied_embeddings_are_the_vocabulary_projection(tmp_path: Path) -> None:
    save_tiny(tiny_llama(**SIZES, tie_word_embeddings=True), tmp_path / "original")
    write(tmp_path / "original", tmp_path / "tied", FORMATS["gptq"])
    tensors = open_checkpoint(str(tmp_path / "tied")).load_weights()
    assert tensors["lm_head.weight"] is tensors["model.embed_tokens.weight"]


def test_scales_of_the_cache_are_said_to_be_unused(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    open_checkpoint(str(made("modelopt fp8")[0])).load_weights()
    assert "its scales for the KV cache are not used: the cache is not quantised" in caplog.text


def test_what_quantises_is_not_asked(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("awq", "gptqmodel", "compressed_tensors", "modelopt"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for name in FORMATS:
        assert open_checkpoint(str(made(name)[0])).load_weights()
