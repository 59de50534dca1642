"""The forms of ONNX Runtime on the CPU whose activations are 8 bits per row (token), with weights of 7 bits: of its own
operators, and of this project's (plugins/cpu), which gives the same bits until fuse_linears gives it a norm or a gate
to compute too, whose last bits are its own.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fly_build import quantization as q
from fly_build.graph_edits import CONTRIB_DOMAIN, GraphEdits, Linear
from fly_build.joint_heads import join_heads
from fly_build.linear_form import Layers, LinearForm, Source, lazily, place_joined, transposed
from fly_build.quantization import Array, FloatArray
from fly_build.quantized_weight import QuantizedWeight
from fly_trt.engines.base import CPU_DOMAIN
from fly_trt.manifest import Dtype


@dataclass(frozen=True)
class RowwiseInt8(LinearForm):
    """ONNX Runtime's integer product on the CPU: activations quantised per row (token), so that no row depends on
    another, and weights of 7 bits. Layers of one input are one product and a Split. The product's kernel scales the
    columns; a row's scale is left to one Mul."""

    joins_heads: bool = True

    def bits(self, plain: int) -> tuple[float, float]:
        return 8, 8

    def quantize(self, source: Source, dtype: Dtype, *, is_output: bool) -> QuantizedWeight:
        def rounded(weight: FloatArray) -> tuple[Array, FloatArray]:
            codes, scales = q.quantize_int8(weight)
            return codes.T, scales[:, None]

        return lazily(source, "int8", source.shape[1], rounded)

    def place(self, edits: GraphEdits, layers: Layers) -> None:
        zero_points: dict[tuple[str, ...], ir.Value] = {}
        place_joined(
            edits, layers, lambda _: (), lambda linear, weight: self._product(edits, linear, weight, zero_points)
        )
        if self.joins_heads:
            join_heads(edits)
            edits.drop_unused()

    def _product(
        self,
        edits: GraphEdits,
        linear: Linear,
        weight: QuantizedWeight,
        zero_points: dict[tuple[str, ...], ir.Value],
    ) -> ir.Value:
        name, (columns, rows) = weight.name, weight.shape
        tokens, row_scale = self._quantize_rows(edits, linear, rows, zero_points)
        inputs = [
            tokens,
            edits.initializer(f"{name}.int8", ir.DataType.INT8, (rows, columns), lambda: transposed(weight)),
            edits.constant("int8.one", np.float32(1)),
            edits.scales(f"{name}.scale", (columns,), weight.scales),
            edits.constant("int8.zero", np.uint8(q.ACTIVATION_ZERO_POINT)),
        ]
        product = edits.insert(linear.matmul, "MatMulIntegerToFloat", inputs, domain=CONTRIB_DOMAIN)
        return edits.insert(linear.matmul, "Mul", [product, row_scale])

    def _quantize_rows(
        self, edits: GraphEdits, linear: Linear, num_values: int, zero_points: dict[tuple[str, ...], ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        """uint8 tokens and float32 scales [B, T, 1] of the layer's input [B, T, num_values]."""
        x, matmul = linear.input, linear.matmul
        last = edits.constant("int8.last_axis", np.array([-1], np.int64))
        magnitude = edits.insert(matmul, "Abs", [x])
        largest = edits.insert(matmul, "ReduceMax", [magnitude, last], keepdims=1)
        tiny = edits.constant("int8.tiny", np.float32(q.SMALLEST_ROW_MAXIMUM))
        bounded = edits.insert(matmul, "Max", [largest, tiny])
        limit = edits.constant("int8.range", np.float32(q.ACTIVATION_LIMIT))
        scale = edits.insert(matmul, "Div", [bounded, limit])
        points = self._zero_points_like(edits, scale, x.shape, matmul, zero_points)
        # One block along the last axis is one row.
        tokens = edits.insert(matmul, "QuantizeLinear", [x, scale, points], axis=-1, block_size=num_values)
        return tokens, scale

    def _zero_points_like(
        self,
        edits: GraphEdits,
        scale: ir.Value,
        shape: ir.Shape | None,
        before: ir.Node,
        known: dict[tuple[str, ...], ir.Value],
    ) -> ir.Value:
        """A zero point for each row; computed once for all inputs that have the same rows."""
        rows = None if shape is None or None in shape[:-1] else tuple(str(size) for size in shape[:-1])
        if rows is not None and rows in known:
            return known[rows]
        size = edits.insert(before, "Shape", [scale])
        value = ir.tensor(np.array([q.ACTIVATION_ZERO_POINT], np.uint8))
        points = edits.insert(before, "ConstantOfShape", [size], value=value)
        if rows is not None:
            known[rows] = points
        return points


@dataclass(frozen=True)
class PackedInt8(RowwiseInt8):
    """The same numbers as RowwiseInt8 by one operator of plugins/cpu, with the weight as it reads it. Bit for bit,
    until fuse_linears gives it a norm or a gate to compute too."""

    joins_heads: bool = False

    def _product(
        self,
        edits: GraphEdits,
        linear: Linear,
        weight: QuantizedWeight,
        zero_points: dict[tuple[str, ...], ir.Value],
    ) -> ir.Value:
        name, (columns, rows) = weight.name, weight.shape
        shape = q.packed_shape(columns, rows)
        inputs = [
            linear.input,
            edits.initializer(f"{name}.packed", ir.DataType.UINT8, shape, lambda: q.pack_int8(weight.codes())),
            edits.scales(f"{name}.scale", (columns,), weight.scales),
        ]
        return edits.insert(linear.matmul, "Int8Linear", inputs, domain=CPU_DOMAIN)
