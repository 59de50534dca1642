"""Gives the traced graph its weights: as they are, in half precision, or quantised for ONNX Runtime's kernels.

Every initializer is lazy: it is computed from the checkpoint's tensor when the file is written and dropped right
after, so the peak is the checkpoint plus the tensors in flight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from fly_build import quantization as q
from fly_trt.manifest import Device, Dtype, Quantization

DTYPES: dict[Dtype, tuple[torch.dtype, ir.DataType]] = {
    "float32": (torch.float32, ir.DataType.FLOAT),
    "float16": (torch.float16, ir.DataType.FLOAT16),
    "bfloat16": (torch.bfloat16, ir.DataType.BFLOAT16),
}
CONTRIB_DOMAIN = "com.microsoft"
Array = npt.NDArray[np.generic]


@dataclass
class _Linear:
    """A `MatMul(x, Transpose(weight))` of the traced graph."""

    name: str
    transpose: ir.Node
    matmul: ir.Node


@dataclass
class WeightWriter:
    """Turns the parameters of one traced graph into initializers, in place.

    `dtype` is how unquantised weights are stored, `compute_dtype` what the graph was traced in: float32 for ONNX
    Runtime's CPU provider, which has no bfloat16 arithmetic and emulates float16. On the `device` cuda int8 is made of
    blocks of 8 bits, since its provider multiplies no other int8 weights. `output_name` is the parameter of the
    vocabulary projection, which 4-bit models keep in 8 bits. Parameters whose tensors share their memory are stored
    once. `prepare(name, tensor)` gives what is to be stored of a parameter, when it is stored.
    """

    graph: ir.Graph
    tensors: dict[str, torch.Tensor]
    dtype: Dtype
    quantization: Quantization
    output_name: str = "lm_head.weight"
    compute_dtype: Dtype = "float32"
    device: Device = "cpu"
    prepare: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _zero_points: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)
    _constants: dict[str, ir.Value] = field(default_factory=dict)

    @property
    def _computed(self) -> ir.DataType:
        return DTYPES[self.compute_dtype][1]

    def attach(self, parameters: dict[str, ir.Value]) -> None:
        self._shapes = {name: _static_shape(value) for name, value in parameters.items()}
        parameters = self._share_tied(parameters)
        linears = [linear for name, value in parameters.items() for linear in _linears(name, value)]
        if self.quantization == "int8" and self.device == "cpu":
            for group in self._by_input(linears):
                self._replace_by_int8(group)
            linears = []
        for linear in linears:
            if self.quantization != "none":
                is_wide = self.quantization == "int8" or linear.name == self.output_name
                self._replace_by_nbits(linear, bits=8 if is_wide else 4)
            elif len(parameters[linear.name].uses()) == 1:
                self._store_transposed(linear)
        for name, value in parameters.items():
            if value.uses():
                self._store(name, value)
        if self.quantization != "none":
            self.graph.opset_imports[CONTRIB_DOMAIN] = 1

    def _share_tied(self, parameters: dict[str, ir.Value]) -> dict[str, ir.Value]:
        """The parameters with those that are tied as one, under the first name."""
        first: dict[int, str] = {}
        distinct = {}
        for name, value in parameters.items():
            shared = first.setdefault(self.tensors[name].data_ptr(), name)
            if shared == name:
                distinct[name] = value
            else:
                ir.convenience.replace_all_uses_with(value, distinct[shared])
                self.output_name = shared if name == self.output_name else self.output_name
        return distinct

    def _by_input(self, linears: list[_Linear]) -> list[list[_Linear]]:
        """Those that read the same value together, such as query, key and value projections, in the graph's order."""
        order = {node: index for index, node in enumerate(self.graph)}
        groups: dict[ir.Value | None, list[_Linear]] = {}
        for linear in sorted(linears, key=lambda linear: order[linear.matmul]):
            groups.setdefault(linear.matmul.inputs[0], []).append(linear)
        return list(groups.values())

    def _store(self, name: str, value: ir.Value) -> None:
        """The parameter as it is; where the graph computes in another dtype a Cast follows it, or follows the Gather
        that picks rows of it."""
        _, stored = DTYPES[self.dtype]
        initializer = self._initializer(name, stored, self._shapes[name], lambda: self._as_stored(self._read(name)))
        for node, index in list(value.uses()):
            if stored == self._computed:
                node.replace_input_with(index, initializer)
            elif node.op_type == "Gather":
                node.replace_input_with(index, initializer)
                self._cast_after(node)
            else:
                node.replace_input_with(index, self._cast_before(node, initializer))

    def _store_transposed(self, linear: _Linear) -> None:
        _, stored = DTYPES[self.dtype]
        name = linear.name
        columns, rows = self._shapes[name]
        initializer = self._initializer(name, stored, (rows, columns), lambda: self._as_stored(self._read(name).t()))
        value = initializer if stored == self._computed else self._cast_before(linear.matmul, initializer)
        linear.matmul.replace_input_with(1, value)
        self.graph.remove(linear.transpose, safe=True)

    def _replace_by_int8(self, linears: list[_Linear]) -> None:
        """MatMuls of one input -> one integer product on activations quantised per row (token), so that no row depends
        on another, and a Split. The product's kernel scales the columns; a row's scale is left to one Mul."""
        names = [linear.name for linear in linears]
        rows = self._shapes[names[0]][1]
        columns = [self._shapes[name][0] for name in names]
        quantized = _Once(lambda: _side_by_side([q.quantize_int8(self._as_float32(name)) for name in names]))
        name = "+".join(names)
        weight = self._initializer(f"{name}.int8", ir.DataType.INT8, (rows, sum(columns)), lambda: quantized()[0])
        scale = self._initializer(f"{name}.scale", ir.DataType.FLOAT, (sum(columns),), lambda: quantized()[1])
        matmul = linears[0].matmul
        tokens, row_scale = self._quantize_rows(matmul, rows)
        one = self._constant("int8.one", np.float32(1))
        zero = self._constant("int8.zero", np.uint8(q.ACTIVATION_ZERO_POINT))
        product = ir.node("MatMulIntegerToFloat", [tokens, weight, one, scale, zero], domain=CONTRIB_DOMAIN)
        by_row = ir.node("Mul", [product.outputs[0], row_scale])
        nodes = [product, by_row]
        if len(linears) > 1:
            sizes = self._constant(f"{name}.columns", np.array(columns, np.int64))
            nodes.append(ir.node("Split", [by_row.outputs[0], sizes], {"axis": -1}, num_outputs=len(linears)))
        self.graph.insert_before(matmul, nodes)
        for linear, output in zip(linears, nodes[-1].outputs, strict=True):
            self._replace(linear, output)

    def _quantize_rows(self, matmul: ir.Node, num_values: int) -> tuple[ir.Value, ir.Value]:
        """uint8 tokens and float32 scales [B, T, 1] of the MatMul's input [B, T, num_values]."""
        x = matmul.inputs[0]
        assert x is not None
        last = self._constant("int8.last_axis", np.array([-1], np.int64))
        magnitude = ir.node("Abs", [x])
        largest = ir.node("ReduceMax", [magnitude.outputs[0], last], {"keepdims": 1})
        bounded = ir.node("Max", [largest.outputs[0], self._constant("int8.tiny", np.float32(q.SMALLEST_ROW_MAXIMUM))])
        scale = ir.node("Div", [bounded.outputs[0], self._constant("int8.range", np.float32(q.ACTIVATION_LIMIT))])
        self.graph.insert_before(matmul, [magnitude, largest, bounded, scale])
        # One block along the last axis is one row.
        inputs = [x, scale.outputs[0], self._zero_points_like(scale.outputs[0], x.shape, matmul)]
        tokens = ir.node("QuantizeLinear", inputs, {"axis": -1, "block_size": num_values})
        self.graph.insert_before(matmul, [tokens])
        return tokens.outputs[0], scale.outputs[0]

    def _zero_points_like(self, scale: ir.Value, shape: ir.Shape | None, before: ir.Node) -> ir.Value:
        """A zero point for each row; computed once for all inputs that have the same rows."""
        rows = None if shape is None or None in shape[:-1] else tuple(str(size) for size in shape[:-1])
        if rows is None or rows not in self._zero_points:
            size = ir.node("Shape", [scale])
            value = ir.tensor(np.array([q.ACTIVATION_ZERO_POINT], np.uint8))
            points = ir.node("ConstantOfShape", [size.outputs[0]], {"value": value})
            self.graph.insert_before(before, [size, points])
            if rows is None:
                return points.outputs[0]
            self._zero_points[rows] = points.outputs[0]
        return self._zero_points[rows]

    def _replace_by_nbits(self, linear: _Linear, bits: int) -> None:
        """MatMul -> com.microsoft MatMulNBits: blocks of rows with a scale each, in the activations' type."""
        name = linear.name
        columns, rows = self._shapes[name]
        blocks = -(-rows // q.BLOCK_SIZE)
        scale_dtype = self._computed.numpy()
        quantized = _Once(lambda: q.quantize_blocks(self._as_float32(name), bits, scale_dtype))
        packed_shape = (columns, blocks, q.BLOCK_SIZE * bits // 8)
        weight = self._initializer(f"{name}.int{bits}", ir.DataType.UINT8, packed_shape, lambda: quantized()[0])
        scale = self._initializer(f"{name}.scale", self._computed, (columns, blocks), lambda: quantized()[1])
        attributes = {"K": rows, "N": columns, "bits": bits, "block_size": q.BLOCK_SIZE}
        if self.device == "cpu":
            attributes["accuracy_level"] = q.INT8_ACCUMULATION
        node = ir.node("MatMulNBits", [linear.matmul.inputs[0], weight, scale], attributes, domain=CONTRIB_DOMAIN)
        self.graph.insert_before(linear.matmul, node)
        self._replace(linear, node.outputs[0])

    def _replace(self, linear: _Linear, new: ir.Value) -> None:
        old = linear.matmul.outputs[0]
        new.shape, new.type = old.shape, old.type
        new.name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove([linear.matmul, linear.transpose], safe=True)

    def _cast_before(self, node: ir.Node, value: ir.Value) -> ir.Value:
        cast = ir.node("Cast", [value], {"to": int(self._computed)})
        self.graph.insert_before(node, cast)
        return cast.outputs[0]

    def _cast_after(self, node: ir.Node) -> None:
        output = node.outputs[0]
        cast = ir.node("Cast", [output], {"to": int(self._computed)})
        ir.convenience.replace_all_uses_with(output, cast.outputs[0])
        cast.replace_input_with(0, output)
        cast.outputs[0].shape, cast.outputs[0].type = output.shape, output.type
        output.type = None
        self.graph.insert_after(node, cast)

    def _as_stored(self, tensor: torch.Tensor) -> Array:
        dtype, _ = DTYPES[self.dtype]
        converted = tensor.to(dtype).contiguous()
        if dtype == torch.bfloat16:
            return converted.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return converted.numpy()

    def _as_float32(self, name: str) -> npt.NDArray[np.float32]:
        return self._read(name).to(torch.float32).numpy()

    def _read(self, name: str) -> torch.Tensor:
        return self.prepare(name, self.tensors[name])

    def _initializer(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Callable[[], Array]
    ) -> ir.Value:
        tensor = ir.LazyTensor(lambda: ir.Tensor(compute(), dtype=dtype, name=name), dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _constant(self, name: str, content: npt.ArrayLike) -> ir.Value:
        if name not in self._constants:
            array = np.asarray(content)
            self._constants[name] = self._initializer(
                name, ir.DataType.from_numpy(array.dtype), array.shape, lambda: array
            )
        return self._constants[name]


def _static_shape(parameter: ir.Value) -> tuple[int, ...]:
    assert parameter.shape is not None
    return tuple(size for size in parameter.shape if isinstance(size, int))


class _Once:
    """Keeps a result until both of its two readers have had it."""

    def __init__(self, compute: Callable[[], tuple[Array, Array]]) -> None:
        self.compute = compute
        self.result: tuple[Array, Array] | None = None

    def __call__(self) -> tuple[Array, Array]:
        if self.result is not None:
            result, self.result = self.result, None
            return result
        self.result = self.compute()
        return self.result


def _side_by_side(quantized: list[tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]]) -> tuple[Array, Array]:
    """Weights [K, N] and scales [N] of several linear layers as those of one."""
    weights, scales = zip(*quantized, strict=True)
    return (weights[0], scales[0]) if len(quantized) == 1 else (np.concatenate(weights, axis=1), np.concatenate(scales))


def _linears(name: str, value: ir.Value) -> list[_Linear]:
    found = []
    for transpose, _ in value.uses():
        if transpose.op_type != "Transpose" or value.shape is None or len(value.shape) != 2:
            continue
        users = list(transpose.outputs[0].uses())
        if len(users) == 1 and users[0].node.op_type == "MatMul" and users[0].idx == 1:
            found.append(_Linear(name, transpose, users[0].node))
    return found
