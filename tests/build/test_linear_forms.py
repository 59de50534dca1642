"""The forms of a quantised linear layer: ONNX Runtime computes each one's graph as NumPy does from codes that it
decodes by itself, and a sharded weight is the weight of a shard.
"""

from dataclasses import replace
from typing import Any, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_build import quantization as q
from fly_build.graph_edits import Linear
from fly_build.linear_form import Kernels, Source
from fly_build.linear_forms import FORMS, STORED_FORMS
from fly_build.quantized_weight import Codes, QuantizedWeight
from fly_build.weights import WeightWriter
from fly_trt.engines.onnxruntime import session_options
from fly_trt.errors import CheckpointError
from fly_trt.manifest import Dtype, Quantization
from tiny_models import EXACT_PRODUCTS

FloatArray = npt.NDArray[np.float32]
FP8 = ml_dtypes.float8_e4m3fn
TENSORRT: tuple[Quantization, ...] = ("int8", "int4", "fp8")
SCALE_DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def _random(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _weight(kind: Codes, rows: int, columns: int, block: int, *, zeros: bool = False, seed: int = 0) -> QuantizedWeight:
    rng = np.random.default_rng(seed)
    low, high = {"int4": (-8, 8), "int8": (-128, 128), "fp8": (0, 0)}[kind]
    codes: Any = rng.standard_normal((rows, columns)).astype(FP8)
    if kind != "fp8":
        codes = rng.integers(low, high, (rows, columns)).astype(np.int8)
    blocks = -(-columns // block)
    scales = rng.uniform(0.01, 0.02, (rows, blocks)).astype(np.float32)
    points = rng.integers(-3, 4, (rows, blocks)).astype(np.int8)
    return QuantizedWeight(
        "w", kind, (rows, columns), block, lambda: codes, lambda: scales, (lambda: points) if zeros else None
    )


def _decoded(weight: QuantizedWeight) -> npt.NDArray[np.float64]:
    block = np.arange(weight.shape[1]) // weight.block_size
    size = (weight.shape[0], weight.num_blocks)
    scales = np.broadcast_to(weight.scales(), size).astype(np.float64)
    zeros = np.zeros(size) if weight.zero_points is None else weight.zero_points().astype(np.float64)
    return (weight.codes().astype(np.float64) - zeros[:, block]) * scales[:, block]


def _graph(columns: list[int], rows: int, dtype: ir.DataType) -> tuple[ir.Graph, dict[str, ir.Value]]:
    """What torch's exporter leaves for linear layers of one input."""
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["B", "T", rows]))
    nodes, parameters = [], {}
    for index, size in enumerate(columns):
        parameter = ir.Value(name=f"w{index}", type=ir.TensorType(dtype), shape=ir.Shape([size, rows]))
        transpose = ir.node("Transpose", [parameter], {"perm": [1, 0]})
        matmul = ir.node("MatMul", [x, transpose.outputs[0]])
        output = matmul.outputs[0]
        output.name, output.type, output.shape = f"y{index}", x.type, ir.Shape(["B", "T", size])
        nodes += [transpose, matmul]
        parameters[f"w{index}"] = parameter
    graph = ir.Graph(
        [x], [node.outputs[0] for node in nodes[1::2]], nodes=nodes, opset_imports={"": 24}, name="linears"
    )
    return graph, parameters


def _computed(
    weights: list[QuantizedWeight | torch.Tensor],
    x: npt.NDArray[Any],
    kernels: Kernels,
    quantization: Quantization = "none",
    dtype: Dtype = "float32",
) -> tuple[list[npt.NDArray[Any]], list[str]]:
    """The outputs of these layers of one input, and the operators that they were made of."""
    computed = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}[dtype]
    graph, parameters = _graph([weight.shape[0] for weight in weights], x.shape[-1], computed)
    tensors = {f"w{index}": weight for index, weight in enumerate(weights)}
    WeightWriter(graph, tensors, dtype, quantization, "none", dtype, kernels).attach(parameters)
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    options = session_options()
    options.add_session_config_entry(*EXACT_PRODUCTS)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x}), [node.op_type for node in graph]


def _named(weights: list[QuantizedWeight]) -> list[QuantizedWeight | torch.Tensor]:
    return [replace(weight, name=f"w{index}") for index, weight in enumerate(weights)]


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("kind", "block"), [("int4", 32), ("int4", 64), ("int4", 96), ("int8", 64), ("int8", 192)])
def test_integers_on_tensorrt(kind: Codes, block: int, zeros: bool) -> None:
    weights = [_weight(kind, rows, 192, block, zeros=zeros, seed=rows) for rows in (48, 16)]
    x = _random(2, 5, 192)
    outputs, operators = _computed(_named(weights), x, "tensorrt")
    for output, weight in zip(outputs, weights, strict=True):
        np.testing.assert_allclose(output, x @ _decoded(weight).T, atol=2e-4)
    assert operators.count("DequantizeLinear") == 1, "layers of one input are one product"
    assert operators.count("MatMul") == (2 if zeros else 1)


@pytest.mark.parametrize("block", [16, 32, 128, 192])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_integers_on_onnxruntime(kind: Codes, zeros: bool, block: int) -> None:
    """Its kernel rounds activations to 8 bits: with few and whole values nothing is lost."""
    columns = 192 if block in (16, 32, 192) else 256
    weight = _weight(kind, 48, columns, block, zeros=zeros)
    x = np.random.default_rng(0).integers(-127, 128, (2, 5, columns)).astype(np.float32)
    x[..., :: min(block, 16)] = 127
    (output,), operators = _computed(_named([weight]), x, "cpu")
    want = x @ _decoded(weight).T
    np.testing.assert_allclose(output, want, atol=1e-4 * np.abs(want).max())
    assert operators == ["MatMulNBits"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("activation_scale", [None, 0.02])
@pytest.mark.parametrize("has_one_scale", [False, True])
def test_fp8_on_tensorrt(has_one_scale: bool, activation_scale: float | None, dtype: Dtype) -> None:
    weight = replace(_weight("fp8", 48, 96, 96), activation_scale=activation_scale)
    if has_one_scale:
        one = np.full((1, 1), 1 / 64, np.float32)
        weight = replace(weight, has_one_scale=True, scales=lambda: one)
    x = _random(2, 5, 96).astype(dtype)
    (output,), operators = _computed(_named([weight]), x, "tensorrt", dtype=dtype)
    rounded = x.astype(np.float32)
    if activation_scale is not None:
        step = np.asarray(activation_scale, dtype)
        rounded = np.clip(x / step, -448, 448).astype(FP8).astype(np.float32) * step.astype(np.float32)
    want = rounded @ _decoded(weight).T
    np.testing.assert_allclose(output, want, atol=(1e-5 if dtype == "float32" else 4e-3) * np.abs(want).max())
    assert operators.count("QuantizeLinear") == (activation_scale is not None)


@pytest.mark.parametrize("are_equal", [True, False])
def test_layers_of_one_input_share_the_one_scale_that_they_have(are_equal: bool) -> None:
    """As ModelOpt writes query, key and value, so that their product is one of two tensors with a scale each."""
    weights = []
    for rows in (16, 32):
        one = np.full((1, 1), 1 / 64 if are_equal else rows / 1024, np.float32)
        weight = _weight("fp8", rows, 96, 96, seed=rows)
        weights.append(replace(weight, has_one_scale=True, scales=lambda one=one: one, activation_scale=0.02))
    joined = QuantizedWeight.joined(weights)
    assert joined.has_one_scale == are_equal
    assert joined.scales().shape == ((1, 1) if are_equal else (48, 1))
    np.testing.assert_array_equal(_decoded(joined), np.concatenate([_decoded(weight) for weight in weights]))
    x = _random(1, 3, 96)
    outputs, operators = _computed(_named(weights), x, "tensorrt")
    assert operators.count("MatMul") == 1
    step = np.float32(0.02)
    rounded = np.clip(x / step, -448, 448).astype(FP8).astype(np.float32) * step
    for output, weight in zip(outputs, weights, strict=True):
        np.testing.assert_allclose(output, rounded @ _decoded(weight).T, atol=1e-4)


def test_layers_with_scales_of_their_own_for_the_activations_stay_apart_and_equal_scales_are_shared() -> None:
    weights = [
        replace(_weight("fp8", rows, 96, 96, seed=rows), activation_scale=scale)
        for rows, scale in ((16, 0.02), (32, 0.03), (48, 0.02))
    ]
    x = _random(1, 3, 96)
    outputs, operators = _computed(_named(weights), x, "tensorrt")
    assert (operators.count("QuantizeLinear"), operators.count("MatMul")) == (2, 2)
    for output, weight in zip(outputs, weights, strict=True):
        step = np.float32(weight.activation_scale)
        rounded = np.clip(x / step, -448, 448).astype(FP8).astype(np.float32) * step
        np.testing.assert_allclose(output, rounded @ _decoded(weight).T, atol=1e-4)


@pytest.mark.parametrize("kernels", ["tensorrt", "cpu"])
def test_inputs_are_multiplied_and_put_in_order_first(kernels: Kernels) -> None:
    order = np.random.default_rng(0).permutation(64)
    factors = np.random.default_rng(1).choice([0.5, 1, 2], 64).astype(np.float32)
    weight = replace(_weight("int4", 16, 64, 32), input_order=order, input_factors=lambda: factors)
    x = np.where(np.arange(64) % 2, 127 / factors, 0).astype(np.float32)[None, None]
    (output,), _ = _computed(_named([weight]), x, kernels)
    want = (x * factors)[..., order] @ _decoded(weight).T
    np.testing.assert_allclose(output, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("quantization", TENSORRT)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_full_precision_weights_are_rounded_for_tensorrt(dtype: Dtype, quantization: Quantization) -> None:
    weights = [_random(rows, 192, seed=rows) for rows in (48, 16)]
    x = _random(2, 5, 192, seed=9).astype(dtype)
    outputs, operators = _computed([torch.from_numpy(w) for w in weights], x, "tensorrt", quantization, dtype)
    assert operators.count("DequantizeLinear") == 1
    for output, weight in zip(outputs, weights, strict=True):
        exact = x.astype(np.float32) @ weight.T
        error = np.abs(output - exact).std() / exact.std()
        assert error < {"int8": 0.01, "fp8": 0.04, "int4": 0.12}[quantization]
        assert error > {"int8": 0.001, "fp8": 0.01, "int4": 0.05}[quantization]


def test_the_vocabulary_projection_keeps_8_bits_beside_int4_and_16_beside_fp8() -> None:
    source = Source("lm_head.weight", (32, 64), lambda: torch.from_numpy(_random(32, 64)))
    kinds = {}
    for quantization in TENSORRT:
        form = FORMS["tensorrt", quantization]
        weight = form.quantize(source, "bfloat16", is_output=True)
        kinds[quantization] = weight.kind if weight else None
    assert kinds == {"int8": "int8", "int4": "int8", "fp8": None}


@pytest.mark.parametrize(("inputs", "block"), [(256, 64), (96, 32), (48, 16), (40, 40)])
def test_int4_takes_the_largest_blocks_that_divide_the_inputs_and_int8_where_none_does(inputs: int, block: int) -> None:
    source = Source("w", (8, inputs), lambda: torch.zeros(8, inputs))
    weight = FORMS["tensorrt", "int4"].quantize(source, "bfloat16", is_output=False)
    assert weight is not None
    assert (weight.kind, weight.block_size) == ("int8" if block == inputs else "int4", block)


def test_every_kind_of_kernels_has_a_form_for_every_quantisation_that_it_computes() -> None:
    assert {kernels for kernels, _ in FORMS} == set(get_args(Kernels)) == STORED_FORMS.keys()
    assert {name for kernels, name in FORMS if kernels == "tensorrt"} == set(TENSORRT)
    for kernels in ("cpu", "cuda"):
        assert {name for other, name in FORMS if other == kernels} == {"int8", "int4"}


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@given(seed=st.integers(0, 99), magnitude=st.sampled_from([1e-2, 1.0, 1e2]))
@examples(20)
def test_codes_are_nearest_to_the_weight_with_scales_as_they_are_stored(
    dtype: npt.DTypeLike, seed: int, magnitude: float
) -> None:
    weight = np.float32(magnitude) * _random(5, 64, seed=seed)
    weight[3] = 0
    codes, scales = q.quantize_channels(weight, dtype)
    assert (scales == scales.astype(dtype).astype(np.float32)).all()
    slack = np.abs(weight).max() * 2.0**-8  # a scale that was rounded down clips the largest value
    assert (np.abs(codes * scales - weight) <= scales / 2 + slack).all()
    fp8, scales = q.quantize_fp8(weight, dtype)
    assert (scales == scales.astype(dtype).astype(np.float32)).all()
    assert (np.abs(fp8.astype(np.float32) * scales - weight) <= np.abs(weight) / 16 + scales / 512 + slack).all()
    assert not codes[3].any()


@given(seed=st.integers(0, 99))
@examples(20)
def test_int4_is_no_worse_than_any_of_the_scales_that_it_tries(seed: int) -> None:
    weight = _random(3, 64, seed=seed)
    codes, scales = q.quantize_int4(weight, 32, np.float32)
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert (scales > 0).all()
    blocks = weight.reshape(3, 2, 32)
    error = np.square(codes.reshape(blocks.shape) * scales[..., None] - blocks).sum(axis=2)
    for code in q.INT4_LARGEST_CODES:
        step = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(code)
        tried = np.clip(np.rint(blocks / step), -8, 7) * step
        assert (error <= np.square(tried - blocks).sum(axis=2) * (1 + 1e-5)).all()


def test_scales_that_float16_does_not_hold_are_refused_with_the_dtype_to_use() -> None:
    tiny = replace(_weight("int8", 8, 32, 32), scales=lambda: np.full((8, 1), 1e-8, np.float32))
    with pytest.raises(CheckpointError, match=r"w: float16 does not hold its scales of 1e-08 .*: use --dtype bfloat16"):
        tiny.check_scales(np.float16)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        tiny.check_scales(dtype)
    broken = replace(tiny, scales=lambda: np.full((8, 1), np.nan, np.float32))
    with pytest.raises(CheckpointError, match="w has scales that are no numbers"):
        broken.check_scales(np.float32)


@given(data=st.data(), kind=st.sampled_from(["int4", "int8", "fp8"]), zeros=st.booleans(), blocks=st.integers(1, 6))
@examples(100)
def test_a_shard_has_the_outputs_or_the_inputs_that_it_was_cut_to(
    data: st.DataObject, kind: Codes, zeros: bool, blocks: int
) -> None:
    block, rows = 16, 12
    weight = _weight(kind, rows, blocks * block, block, zeros=zeros and kind != "fp8")
    if data.draw(st.booleans()):
        factors = _random(blocks * block)
        weight = replace(weight, input_factors=lambda: factors)
    axis = data.draw(st.sampled_from([0, 1]))
    unit = block if axis and blocks > 1 else 1
    start = data.draw(st.integers(0, weight.shape[axis] // unit - 1))
    stop = data.draw(st.integers(start + 1, weight.shape[axis] // unit))
    shard = weight.shard(axis, start * unit, stop * unit)
    part = slice(start * unit, stop * unit)
    want = _decoded(weight)[part] if axis == 0 else _decoded(weight)[:, part]
    assert shard.shape == want.shape
    np.testing.assert_array_equal(_decoded(shard), want)
    if weight.input_factors is not None:
        whole = weight.input_factors()
        np.testing.assert_array_equal(shard.input_factors(), whole[part] if axis else whole)


def test_a_scale_of_the_whole_weight_is_that_of_every_shard() -> None:
    one = np.full((1, 1), 0.5, np.float32)
    weight = replace(_weight("fp8", 8, 16, 16), has_one_scale=True, scales=lambda: one, activation_scale=0.1)
    for axis in (0, 1):
        shard = weight.shard(axis, 2, 6)
        assert (shard.scales(), shard.has_one_scale, shard.activation_scale) == (one, True, 0.1)


def test_what_cannot_be_sharded_is_refused_in_one_line() -> None:
    weight = _weight("int4", 8, 128, 64)
    for start, stop in ((0, 32), (32, 128), (64, 100)):
        with pytest.raises(CheckpointError, match="begin or end within a block of 64: use fewer GPUs"):
            weight.shard(1, start, stop)
    ordered = replace(weight, input_order=np.arange(128)[::-1].copy())
    assert ordered.shard(0, 2, 4).shape == (2, 128)
    with pytest.raises(CheckpointError, match=r"in the order of their activations \(desc_act\)"):
        ordered.shard(1, 0, 64)


def test_blocks_that_no_kernel_has_are_refused() -> None:
    for kernels in ("tensorrt", "cpu"):
        with pytest.raises(CheckpointError, match="no kernel has scales for blocks of 24 of 48 inputs"):
            _computed(_named([_weight("int4", 8, 48, 24)]), _random(1, 1, 48), kernels)


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("block", [256, 512])
def test_large_blocks_and_whole_outputs_are_cut_for_onnxruntime(block: int, kind: Codes, kernels: Kernels) -> None:
    """Its CUDA provider has no product of one token with 4 bits in blocks of more than 128."""
    weight = _weight(kind, 16, 512, block, zeros=True)
    graph, parameters = _graph([16], 512, ir.DataType.FLOAT)
    WeightWriter(graph, {"w0": weight}, "float32", "none", "none", "float32", kernels).attach(parameters)
    (product,) = graph
    assert product.attributes["block_size"].value == 128
    x = np.where(np.arange(512) % 2, 127, 0).astype(np.float32)[None, None]
    (output,), _ = _computed(_named([weight]), x, kernels)
    want = x @ _decoded(weight).T
    np.testing.assert_allclose(output, want, atol=1e-4 * np.abs(want).max())


def test_a_quantised_weight_of_no_linear_layer_is_refused() -> None:
    weight = _weight("int4", 8, 32, 32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B"]))
    table = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([8, 32]))
    node = ir.node("Gather", [table, x])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24}, name="table")
    with pytest.raises(CheckpointError, match="w: is quantised, and the weight of no linear layer"):
        WeightWriter(graph, {"w": weight}, "float32", "none").attach({"w": table})


def test_linears_are_found_with_their_inputs() -> None:
    graph, _ = _graph([8], 16, ir.DataType.FLOAT)
    transpose, matmul = graph
    assert Linear("w0", transpose, matmul).input.name == "x"
