"""Quantised weights: how far they may be from the original, that the packing is the one ONNX Runtime reads, that a
quantised model still says what the float32 one does, and that in int8 a row does not see its batch mates.
"""

import copy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from examples import examples
from fly_build.checkpoint import open_checkpoint
from fly_build.graph_edits import CONTRIB_DOMAIN
from fly_build.quantization import (
    BLOCK_SIZE,
    INT8_ACCUMULATION,
    WEIGHT_LIMIT,
    pack_blocks,
    quantize_blocks,
    quantize_int8,
)
from fly_build.weights import WeightWriter
from fly_trt.engines.onnxruntime import session_options
from tiny_models import MAX_SEQ_LEN, Runner, build_graph, count_operators, reference_logits, save_tiny, tiny_llama

FloatArray = npt.NDArray[np.float32]
LARGEST_UINT8 = 255
INT16 = np.iinfo(np.int16)
ROUNDING = 1e-5
PROJECTIONS_PER_LAYER = 7
PRODUCTS_PER_LAYER = 4  # query, key and value are one, and so are gate and up
HUGE_TOKEN = 150
CALM = 0.08  # random weights any wider make attention pick one position, and another one after a rounding error
finite = st.floats(-1e4, 1e4, width=32)
weights = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=finite)


def _random(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _codes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int64]:
    """Packed [N, blocks, bytes] -> signed codes [N, blocks, BLOCK_SIZE], by MatMulNBits' layout: low half first."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], BLOCK_SIZE)
    return packed.astype(np.int64) - (1 << (bits - 1))


def _packed_blocks(weight: FloatArray, bits: int) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    codes, scales = quantize_blocks(weight, bits)
    return pack_blocks(codes, bits, BLOCK_SIZE), scales


def _dequantize_blocks(weight: FloatArray, bits: int) -> npt.NDArray[np.float64]:
    packed, scales = _packed_blocks(weight, bits)
    values = _codes(packed, bits) * scales[..., None].astype(np.float64)
    return values.reshape(len(weight), -1)[:, : weight.shape[1]]


@given(weights)
@examples(200)
def test_int8_weights_are_within_half_a_step_of_the_original(weight: FloatArray) -> None:
    quantized, scales = quantize_int8(weight)
    assert quantized.dtype == np.int8
    assert quantized.shape == weight.shape[::-1]
    assert np.abs(quantized.astype(np.int64)).max() <= WEIGHT_LIMIT
    assert np.isfinite(scales).all()
    error = np.abs(weight - quantized.T * scales[:, None].astype(np.float64))
    assert (error <= scales[:, None] * (0.5 + ROUNDING)).all()


def test_int8_uses_its_whole_range_in_every_column() -> None:
    weight = _random(16, 50) * np.logspace(-6, 6, 16, dtype=np.float32)[:, None]
    quantized, _ = quantize_int8(weight)
    assert (np.abs(quantized.astype(np.int64)).max(axis=0) == WEIGHT_LIMIT).all()


def test_zero_column_stays_zero_beside_others_in_int8() -> None:
    weight = _random(3, 40)
    weight[1] = 0
    quantized, scales = quantize_int8(weight)
    assert not quantized[:, 1].any()
    assert np.isfinite(scales).all()
    assert quantized[:, [0, 2]].any(axis=0).all()


@given(weights)
@examples(200)
def test_sum_of_two_uint8_by_int8_products_fits_16_bits(weight: FloatArray) -> None:
    """The kernel for CPUs without VNNI adds two neighbouring products in 16 bits and saturates."""
    quantized = quantize_int8(weight)[0].astype(np.int64)
    pairs = quantized[:, None] + quantized[None]
    assert LARGEST_UINT8 * pairs.max() <= INT16.max
    assert LARGEST_UINT8 * pairs.min() >= INT16.min


@pytest.mark.parametrize("bits", [4, 8])
@given(weight=weights)
@examples(100)
def test_block_weights_are_within_half_a_step_and_within_one_at_the_short_end(weight: FloatArray, bits: int) -> None:
    """The codes reach one step further on the side of the block's largest value than on the other."""
    _, scales = quantize_blocks(weight, bits)
    step = np.abs(np.repeat(scales, BLOCK_SIZE, axis=1)[:, : weight.shape[1]]).astype(np.float64)
    sign = np.sign(np.repeat(scales, BLOCK_SIZE, axis=1)[:, : weight.shape[1]])
    at_short_end = weight * sign > (2 ** (bits - 1) - 1) * step
    error = np.abs(weight - _dequantize_blocks(weight, bits))
    allowed = np.where(at_short_end, 1.0, 0.5) + ROUNDING
    assert (error <= allowed * step + np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_largest_value_of_a_block_is_exact(bits: int) -> None:
    weight = _random(5, 3 * BLOCK_SIZE)
    largest = np.abs(weight.reshape(5, 3, BLOCK_SIZE)).max(axis=2)
    restored = np.abs(_dequantize_blocks(weight, bits).reshape(5, 3, BLOCK_SIZE)).max(axis=2)
    np.testing.assert_allclose(restored, largest, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_codes_fit_scales_of_half_precision(dtype: Any, bits: int) -> None:
    """They are chosen for the scale as it is stored, so that its rounding is no error of every weight of the block."""
    weight = _random(40, 3 * BLOCK_SIZE)
    exact, scales = quantize_blocks(weight, bits)
    packed, rounded = quantize_blocks(weight, bits, dtype)
    np.testing.assert_array_equal(rounded, scales.astype(dtype).astype(np.float32))
    errors = []
    for codes in (packed, exact):
        in_blocks = codes.reshape(40, 3, BLOCK_SIZE).astype(np.int64)
        restored = (in_blocks * rounded[..., None].astype(np.float64)).reshape(weight.shape)
        errors.append(np.abs(weight - restored).mean())
    assert errors[0] <= errors[1]
    assert errors[0] < 0.3 * np.abs(scales).mean()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 31, 33, 50])
def test_last_block_is_padded_with_zeros(rows: int, bits: int) -> None:
    packed, scales = _packed_blocks(_random(3, rows), bits)
    blocks = -(-rows // BLOCK_SIZE)
    assert packed.shape == (3, blocks, BLOCK_SIZE * bits // 8)
    assert scales.shape == (3, blocks)
    assert not _codes(packed, bits).reshape(3, -1)[:, rows:].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_block_stays_zero(bits: int) -> None:
    weight = _random(2, 2 * BLOCK_SIZE)
    weight[0, :BLOCK_SIZE] = 0
    restored = _dequantize_blocks(weight, bits)
    assert not restored[0, :BLOCK_SIZE].any()
    assert restored[0, BLOCK_SIZE:].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [64, 50])
def test_onnxruntime_reads_the_blocks_as_they_were_packed(rows: int, bits: int) -> None:
    weight, x = _random(24, rows), _random(5, rows, seed=1)
    exact = x @ _dequantize_blocks(weight, bits).T
    np.testing.assert_allclose(_matmul_nbits(x, weight, bits, accuracy_level=0), exact, atol=1e-4)
    fast = _matmul_nbits(x, weight, bits, INT8_ACCUMULATION)
    assert np.abs(fast - exact).max() < 0.05 * exact.std()


def _matmul_nbits(x: FloatArray, weight: FloatArray, bits: int, accuracy_level: int) -> FloatArray:
    columns, rows = weight.shape
    packed, scales = _packed_blocks(weight, bits)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "weight", "scale"],
        ["y"],
        domain=CONTRIB_DOMAIN,
        K=rows,
        N=columns,
        bits=bits,
        block_size=BLOCK_SIZE,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "one_linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, columns])],
        [onnx.numpy_helper.from_array(packed, "weight"), onnx.numpy_helper.from_array(scales, "scale")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB_DOMAIN, 1)]
    return _run(helper.make_model(graph, opset_imports=opsets, ir_version=10), x)


def _run(model: onnx.ModelProto, x: FloatArray) -> FloatArray:
    proto = model.SerializeToString()
    session = ort.InferenceSession(proto, session_options(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def _int8_linears(*weights: FloatArray) -> onnx.ModelProto:
    """The graph that torch's exporter leaves for linear layers of one input, quantised by WeightWriter."""
    rows = weights[0].shape[1]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "T", rows]))
    nodes, parameters = [], {}
    for index, weight in enumerate(weights):
        name = f"w{index}"
        parameter = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weight.shape))
        transpose = ir.node("Transpose", [parameter], {"perm": [1, 0]})
        matmul = ir.node("MatMul", [x, transpose.outputs[0]])
        output = matmul.outputs[0]
        output.name, output.type, output.shape = f"y{index}", x.type, ir.Shape(["B", "T", len(weight)])
        nodes += [transpose, matmul]
        parameters[name] = parameter
    graph = ir.Graph(
        [x], [node.outputs[0] for node in nodes[1::2]], nodes=nodes, opset_imports={"": 24}, name="linears"
    )
    tensors = {f"w{index}": torch.from_numpy(weight) for index, weight in enumerate(weights)}
    WeightWriter(graph, tensors, "float32", "int8", "w0").attach(parameters)
    return ir.to_proto(ir.Model(graph, ir_version=10))


def _int8_linear(weight: FloatArray) -> onnx.ModelProto:
    return _int8_linears(weight)


def test_int8_linears_of_one_input_are_one_product_with_the_bits_of_each() -> None:
    weights = [_random(columns, 96, seed=columns) for columns in (48, 16, 32)]
    model, x = _int8_linears(*weights), _random(2, 5, 96, seed=1)
    assert [node.op_type for node in model.graph.node].count("MatMulIntegerToFloat") == 1
    session = ort.InferenceSession(model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
    for together, weight in zip(session.run(None, {"x": x}), weights, strict=True):
        np.testing.assert_array_equal(together, _run(_int8_linear(weight), x))


def test_int8_linear_is_near_the_float_one_at_any_magnitude() -> None:
    weight, x = _random(48, 96), _random(1, 7, 96, seed=1) * np.logspace(-9, 9, 7, dtype=np.float32)[:, None]
    got, want = _run(_int8_linear(weight), x), x @ weight.T
    assert (np.abs(got - want).max(axis=2) < 0.1 * want.std(axis=2)).all()


def test_int8_linear_of_a_zero_row_is_zero() -> None:
    assert not _run(_int8_linear(_random(48, 96)), np.zeros((1, 1, 96), np.float32)).any()


@given(magnitude=st.sampled_from([1e-6, 1.0, 1e6]), seed=st.integers(0, 99))
@examples(20)
def test_int8_linear_gives_a_row_the_same_bits_beside_any_other_row(magnitude: float, seed: int) -> None:
    model = _int8_linear(_random(48, 96))
    row, mate = _random(1, 3, 96, seed=seed), np.float32(magnitude) * _random(1, 3, 96, seed=seed + 1000)
    np.testing.assert_array_equal(_run(model, np.concatenate([row, mate]))[0], _run(model, row)[0])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A llama whose token HUGE_TOKEN enters the first layer a thousand times larger than every other token."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 128, "intermediate_size": 208, "tie_word_embeddings": True}
    model = save_tiny(tiny_llama(**sizes, initializer_range=CALM), folder)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 5] = 0
        embeddings[HUGE_TOKEN] = 0
        embeddings[HUGE_TOKEN, 5] = 1
        model.model.layers[0].input_layernorm.weight[5] = 1000
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(
    request: pytest.FixtureRequest, tiny: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, ir.Model]:
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    return request.param, path, build_graph(open_checkpoint(str(tiny[0])), path, quantization=request.param)


def _runner(path: Path, folder: Path, batch_size: int) -> Runner:
    return Runner(path, open_checkpoint(str(folder)), batch_size)


def test_every_linear_layer_is_quantized_and_the_vocabulary_keeps_8_bits(
    quantized: tuple[str, Path, ir.Model], tiny: tuple[Path, torch.nn.Module]
) -> None:
    quantization, _, graph = quantized
    num_layers = tiny[1].config.num_hidden_layers
    operators = count_operators(graph)
    assert "MatMul" not in operators
    bits = [node.attributes["bits"].as_int() for node in graph.graph if node.op_type == "MatMulNBits"]
    if quantization == "int8":
        assert operators["MatMulIntegerToFloat"] == PRODUCTS_PER_LAYER * num_layers + 1
    else:
        assert bits == [4] * (PROJECTIONS_PER_LAYER * num_layers) + [8]


def _with_dequantized_weights(model: torch.nn.Module, quantization: str) -> torch.nn.Module:
    """What the quantised graph would compute with exact arithmetic: int4 keeps the vocabulary in 8 bits."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach().numpy()
            quantized, scales = quantize_int8(weight)
            in_int4 = _dequantize_blocks(weight, 8 if name == "lm_head" else 4)
            restored = (quantized * scales).T if quantization == "int8" else in_int4
            module.weight = torch.nn.Parameter(torch.tensor(restored, dtype=torch.float32))
    return model


def _cosines(a: FloatArray, b: FloatArray) -> FloatArray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_quantized_logits_are_near_those_of_float32_and_nearer_those_of_the_dequantized_weights(
    quantized: tuple[str, Path, ir.Model], tiny: tuple[Path, torch.nn.Module]
) -> None:
    """Random weights are the worst case for 4 bits; rounding activations to 8 bits is the smaller error."""
    quantization, path, _ = quantized
    folder, model = tiny
    ids = np.random.default_rng(0).integers(3, HUGE_TOKEN, (1, 40))
    got = _runner(path, folder, 1).step(ids, [0])["logits"][0]
    to_float32 = _cosines(got, *reference_logits(model, *ids))
    to_dequantized = _cosines(got, *reference_logits(_with_dequantized_weights(model, quantization), *ids))
    assert to_float32.mean() > {"int8": 0.99, "int4": 0.9}[quantization]
    assert to_dequantized.min() > 0.99


@pytest.mark.parametrize("quantized", ["int8"], indirect=True)
def test_int8_row_has_the_same_logits_alone_and_beside_a_row_of_huge_activations(
    quantized: tuple[str, Path, ir.Model], tiny: tuple[Path, torch.nn.Module]
) -> None:
    _, path, _ = quantized
    ids = np.random.default_rng(0).integers(3, HUGE_TOKEN, 16)
    mate = np.full(16, HUGE_TOKEN)
    alone, both = _runner(path, tiny[0], 1), _runner(path, tiny[0], 2)
    for start in (0, 16, 32):
        assert start + 16 <= MAX_SEQ_LEN
        got = both.step([ids, mate], [start, start])["logits"][0]
        np.testing.assert_array_equal(got, alone.step([ids], [start])["logits"][0])
