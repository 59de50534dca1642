"""How a quantised linear layer is computed: what its product becomes in the graph of each kind of kernels, and how a
full-precision weight is rounded for it. FORMS is the table: one line for each kind of kernels and quantisation.

It knows operators and layouts, and nothing of checkpoints or models.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from fly_build import quantization as q
from fly_build.graph_edits import CONTRIB_DOMAIN, NUMPY_DTYPES, GraphEdits, Linear
from fly_build.linear_form import Kernels, Layers, LinearForm, Source, adapted_input, lazily, place_joined, transposed
from fly_build.quantized_weight import Codes, QuantizedWeight
from fly_build.rowwise_forms import PackedInt8, RowwiseInt8
from fly_trt.errors import CheckpointError
from fly_trt.manifest import Dtype, Quantization

TENSORRT_INT4_BLOCK = 64
TENSORRT_INT4_BLOCKS = (128, 64, 32, 16)  # of inputs, that its kernels unpack as they multiply
NBITS_BLOCKS = (128, 64, 32, 16)  # larger ones end a single token's step of 4 bits on CUDA with an error
STORED_TYPES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}


@dataclass(frozen=True)
class BlockwiseNBits(LinearForm):
    """ONNX Runtime's MatMulNBits: weights of 4 or 8 bits in blocks of inputs with a scale each, in the type of the
    activations. `own_bits` are those of full-precision weights; the vocabulary projection gets 8. On the CPU
    activations are rounded to 8 bits, too."""

    own_bits: Literal[4, 8]
    accumulates_int8: bool = False

    def bits(self, plain: int) -> tuple[float, float]:
        of_scales = (32 if self.accumulates_int8 else plain) / q.BLOCK_SIZE
        return self.own_bits + of_scales, 8 + of_scales

    def quantize(self, source: Source, dtype: Dtype, *, is_output: bool) -> QuantizedWeight:
        bits = 8 if is_output else self.own_bits
        kind: Codes = "int8" if bits == 8 else "int4"
        stored = NUMPY_DTYPES[dtype]
        return lazily(source, kind, q.BLOCK_SIZE, lambda weight: q.quantize_blocks(weight, bits, stored))

    def place(self, edits: GraphEdits, layers: Layers) -> None:
        for linear, weight in layers:
            self._place(edits, linear, weight)

    def _place(self, edits: GraphEdits, linear: Linear, weight: QuantizedWeight) -> None:
        assert weight.kind != "fp8", weight.name
        name, matmul, bits = weight.name, linear.matmul, 4 if weight.kind == "int4" else 8
        weight = _cut_into(weight, NBITS_BLOCKS)
        size, (columns, rows), blocks = weight.block_size, weight.shape, weight.num_blocks
        inputs = [
            adapted_input(edits, linear, weight),
            edits.initializer(
                f"{name}.int{bits}",
                ir.DataType.UINT8,
                (columns, blocks, size * bits // 8),
                lambda: q.pack_blocks(weight.codes(), bits, size),
            ),
            edits.scales(f"{name}.scale", (columns, blocks), weight.scales),
        ]
        if (zero_points := weight.zero_points) is not None:
            packed = -(-blocks * bits // 8)
            inputs.append(
                edits.initializer(
                    f"{name}.zero",
                    ir.DataType.UINT8,
                    (columns, packed),
                    lambda: q.pack_blocks(zero_points(), bits, 8 // bits).reshape(columns, packed),
                )
            )
        attributes = {"K": rows, "N": columns, "bits": bits, "block_size": size}
        if self.accumulates_int8:
            attributes["accuracy_level"] = q.INT8_ACCUMULATION
        edits.replace(linear, edits.insert(matmul, "MatMulNBits", inputs, domain=CONTRIB_DOMAIN, **attributes))


@dataclass(frozen=True)
class Dequantized(LinearForm):
    """TensorRT: a DequantizeLinear of the constant weight before the product, which its kernels take in as they
    multiply; the weights stay packed in the plan. With a scale for the activations (fp8), QuantizeLinear and
    DequantizeLinear before it make the product one of fp8 numbers.

    Only zero points of 0 are built. Others are taken out of the product exactly: the sum of a block's inputs, times
    scale and zero point, is subtracted from it.
    """

    own_kind: Codes

    def bits(self, plain: int) -> tuple[float, float]:
        if self.own_kind == "int4":
            return 4 + plain / TENSORRT_INT4_BLOCK, 8
        return 8, plain if self.own_kind == "fp8" else 8

    def quantize(self, source: Source, dtype: Dtype, *, is_output: bool) -> QuantizedWeight | None:
        inputs, stored = source.shape[1], NUMPY_DTYPES[dtype]
        if self.own_kind == "fp8":
            return None if is_output else lazily(source, "fp8", inputs, lambda w: q.quantize_fp8(w, stored))
        if self.own_kind == "int4" and not is_output:
            sizes = [size for size in TENSORRT_INT4_BLOCKS if size <= TENSORRT_INT4_BLOCK and inputs % size == 0]
            if sizes:
                return lazily(source, "int4", sizes[0], lambda w: q.quantize_int4(w, sizes[0], stored))
        return lazily(source, "int8", inputs, lambda weight: q.quantize_channels(weight, stored))

    def place(self, edits: GraphEdits, layers: Layers) -> None:
        """Layers of one input, and of one kind, are one product and a Split: left apart the builder joins them for some
        of its profiles and not for others, and the plan has their int4 weights twice (seen in tensorrt_rtx 1.7.1)."""
        rounded: dict[tuple[ir.Value, float], ir.Value] = {}
        place_joined(
            edits, layers, _joint_properties, lambda linear, weight: self._product(edits, linear, weight, rounded)
        )

    def _product(
        self,
        edits: GraphEdits,
        linear: Linear,
        weight: QuantizedWeight,
        rounded: dict[tuple[ir.Value, float], ir.Value],
    ) -> ir.Value:
        matmul = linear.matmul
        x = adapted_input(edits, linear, weight)
        if weight.kind == "int4":
            weight = _cut_into(weight, TENSORRT_INT4_BLOCKS, must_divide=True)
        is_rounded = weight.activation_scale is not None
        multiplied = self._rounded_to_fp8(edits, matmul, x, weight, rounded) if is_rounded else x
        product = edits.insert(matmul, "MatMul", [multiplied, self._dequantize(edits, matmul, weight)])
        if (zero_points := weight.zero_points) is None:
            return product
        num_blocks, size = weight.num_blocks, weight.block_size
        offsets = edits.scales(
            f"{weight.name}.zero",
            (num_blocks, weight.shape[0]),
            lambda: np.ascontiguousarray((weight.scales() * zero_points()).T),
        )
        blocks = edits.constant(f"blocks.{num_blocks}.{size}", np.array([0, 0, num_blocks, size], np.int64))
        in_blocks = edits.insert(matmul, "Reshape", [x, blocks])
        last = edits.constant("blocks.last_axis", np.array([-1], np.int64))
        sums = edits.insert(matmul, "ReduceSum", [in_blocks, last], keepdims=0)
        return edits.insert(matmul, "Sub", [product, edits.insert(matmul, "MatMul", [sums, offsets])])

    def _dequantize(self, edits: GraphEdits, matmul: ir.Node, weight: QuantizedWeight) -> ir.Value:
        """The weight [in, out] in the type of the activations."""
        name, (columns, rows), blocks = weight.name, weight.shape, weight.num_blocks
        stored = STORED_TYPES[weight.kind]
        codes = edits.initializer(f"{name}.{weight.kind}", stored, (rows, columns), lambda: transposed(weight))
        if weight.has_one_scale:
            scale = edits.scales(f"{name}.scale", (), weight.scales)
            return edits.insert(matmul, "DequantizeLinear", [codes, scale])
        if blocks == 1 and weight.kind != "int4":
            scale = edits.scales(f"{name}.scale", (columns,), weight.scales)
            return edits.insert(matmul, "DequantizeLinear", [codes, scale], axis=1)
        scale = edits.scales(f"{name}.scale", (blocks, columns), lambda: np.ascontiguousarray(weight.scales().T))
        return edits.insert(matmul, "DequantizeLinear", [codes, scale], axis=0, block_size=weight.block_size)

    def _rounded_to_fp8(
        self,
        edits: GraphEdits,
        matmul: ir.Node,
        x: ir.Value,
        weight: QuantizedWeight,
        rounded: dict[tuple[ir.Value, float], ir.Value],
    ) -> ir.Value:
        """x in the steps of the layer's own scale; layers of one input whose scales are equal share it."""
        value = weight.activation_scale
        assert value is not None
        if (x, value) not in rounded:
            scale = edits.scales(f"{weight.name}.input_scale", (), lambda: np.array([[value]], np.float32))
            to = int(ir.DataType.FLOAT8E4M3FN)
            codes = edits.insert(matmul, "QuantizeLinear", [x, scale], output_dtype=to)
            rounded[x, value] = edits.insert(matmul, "DequantizeLinear", [codes, scale])
        return rounded[x, value]


FORMS: dict[tuple[Kernels, Quantization], LinearForm] = {
    ("cpu", "int8"): RowwiseInt8(),
    ("cpu", "int4"): BlockwiseNBits(4, accumulates_int8=True),
    ("fly_cpu", "int8"): PackedInt8(),
    ("fly_cpu", "int4"): BlockwiseNBits(4, accumulates_int8=True),
    ("cuda", "int8"): BlockwiseNBits(8),
    ("cuda", "int4"): BlockwiseNBits(4),
    ("tensorrt", "int8"): Dequantized("int8"),
    ("tensorrt", "int4"): Dequantized("int4"),
    ("tensorrt", "fp8"): Dequantized("fp8"),
}
"""Full-precision weights, quantised by us."""

STORED_FORMS: dict[Kernels, LinearForm] = {
    "cpu": FORMS["cpu", "int4"],
    "fly_cpu": FORMS["cpu", "int4"],
    "cuda": FORMS["cuda", "int4"],
    "tensorrt": FORMS["tensorrt", "int8"],
}
"""Weights of checkpoints that are quantised already, whatever their bits."""


def bits_per_weight(kernels: Kernels, quantization: Quantization, plain: int) -> tuple[float, float]:
    """Of a linear layer and of the vocabulary projection, scales included, see `LinearForm.bits`."""
    return (plain, plain) if quantization == "none" else FORMS[kernels, quantization].bits(plain)


def _joint_properties(weight: QuantizedWeight) -> tuple[object, ...]:
    """Weights of which these are equal can be one."""
    arrays = (weight.input_factors and weight.input_factors(), weight.input_order)
    content = [None if array is None else array.tobytes() for array in arrays]
    return weight.kind, weight.block_size, weight.activation_scale, weight.zero_points is None, *content


def _cut_into(weight: QuantizedWeight, sizes: Iterable[int], *, must_divide: bool = False) -> QuantizedWeight:
    """The weight in the largest blocks of these sizes that its own can be cut into."""
    inputs = weight.shape[1]
    for size in sizes:
        is_whole = weight.num_blocks == 1 and (inputs % size == 0 if must_divide else size <= max(inputs, 16))
        if is_whole or (weight.num_blocks > 1 and weight.block_size % size == 0):
            return weight if size == weight.block_size else weight.in_blocks_of(size)
    known = ", ".join(map(str, sizes))
    raise CheckpointError(
        f"{weight.name}: no kernel has scales for blocks of {weight.block_size} of {inputs} inputs: expected multiples "
        f"of one of {known}"
    )
