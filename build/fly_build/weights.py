"""Gives the traced graph its weights: as they are, in half precision, or quantised for ONNX Runtime's CPU kernels.

Every initializer is lazy: it is computed from the checkpoint's tensor when the file is written and dropped right
after, so the peak is the checkpoint plus the tensors in flight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from fly_build import quantization as q
from fly_trt.manifest import Dtype, Quantization

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
    Runtime, whose CPU provider has no bfloat16 arithmetic and emulates float16. `output_name` is the parameter of the
    vocabulary projection, which 4-bit models keep in 8 bits.
    """

    graph: ir.Graph
    tensors: dict[str, torch.Tensor]
    dtype: Dtype
    quantization: Quantization
    output_name: str
    compute_dtype: Dtype = "float32"
    _quantized_inputs: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    _constants: dict[str, ir.Value] = field(default_factory=dict)

    @property
    def _computed(self) -> ir.DataType:
        return DTYPES[self.compute_dtype][1]

    def attach(self, parameters: dict[str, ir.Value]) -> None:
        for name, value in parameters.items():
            for linear in _linears(name, value):
                if self.quantization == "int8":
                    self._replace_by_int8(linear)
                elif self.quantization == "int4":
                    self._replace_by_nbits(linear, bits=8 if name == self.output_name else 4)
                elif len(value.uses()) == 1:
                    self._store_transposed(linear)
            if value.uses():
                self._store(name, value)
        if self.quantization == "int4":
            self.graph.opset_imports[CONTRIB_DOMAIN] = 1

    def _store(self, name: str, value: ir.Value) -> None:
        """The parameter as it is; where the graph computes in another dtype a Cast follows it, or follows the Gather
        that picks rows of it."""
        _, stored = DTYPES[self.dtype]
        shape = tuple(self.tensors[name].shape)
        initializer = self._initializer(name, stored, shape, lambda: self._as_stored(self.tensors[name]))
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
        tensor = self.tensors[linear.name]
        shape = (tensor.shape[1], tensor.shape[0])
        name = linear.name
        initializer = self._initializer(name, stored, shape, lambda: self._as_stored(self.tensors[name].t()))
        value = initializer if stored == self._computed else self._cast_before(linear.matmul, initializer)
        linear.matmul.replace_input_with(1, value)
        self.graph.remove(linear.transpose, safe=True)

    def _replace_by_int8(self, linear: _Linear) -> None:
        """MatMul -> MatMulInteger on activations quantised per row (token), so that no row depends on another."""
        matmul, name = linear.matmul, linear.name
        rows, columns = self.tensors[name].shape[1], self.tensors[name].shape[0]
        quantized = _Once(lambda: q.quantize_int8(self._as_float32(name)))
        weight = self._initializer(f"{name}.int8", ir.DataType.INT8, (rows, columns), lambda: quantized()[0])
        scale = self._initializer(f"{name}.scale", ir.DataType.FLOAT, (columns,), lambda: quantized()[1])
        tokens, row_scale = self._quantize_rows(matmul)
        product = ir.node(
            "MatMulInteger", [tokens, weight, self._constant("int8.zero", np.uint8(q.ACTIVATION_ZERO_POINT))]
        )
        as_float = ir.node("Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        by_row = ir.node("Mul", [as_float.outputs[0], row_scale])
        by_column = ir.node("Mul", [by_row.outputs[0], scale])
        self._replace(linear, [product, as_float, by_row, by_column])

    def _quantize_rows(self, matmul: ir.Node) -> tuple[ir.Value, ir.Value]:
        """uint8 tokens and float32 scales [B, T, 1] of the MatMul's input; computed once for all that share it."""
        x = matmul.inputs[0]
        assert x is not None
        if x not in self._quantized_inputs:
            last = self._constant("int8.last_axis", np.array([-1], np.int64))
            magnitude = ir.node("Abs", [x])
            largest = ir.node("ReduceMax", [magnitude.outputs[0], last], {"keepdims": 1})
            bounded = ir.node(
                "Max", [largest.outputs[0], self._constant("int8.tiny", np.float32(q.SMALLEST_ROW_MAXIMUM))]
            )
            scale = ir.node("Div", [bounded.outputs[0], self._constant("int8.range", np.float32(q.ACTIVATION_LIMIT))])
            scaled = ir.node("Div", [x, scale.outputs[0]])
            # Every value is positive after the shift, so the Cast's truncation rounds to nearest.
            offset = self._constant("int8.offset", np.float32(q.ACTIVATION_ZERO_POINT + 0.5))
            shifted = ir.node("Add", [scaled.outputs[0], offset])
            tokens = ir.node("Cast", [shifted.outputs[0]], {"to": int(ir.DataType.UINT8)})
            nodes = [magnitude, largest, bounded, scale, scaled, shifted, tokens]
            self.graph.insert_before(matmul, nodes)
            self._quantized_inputs[x] = (tokens.outputs[0], scale.outputs[0])
        return self._quantized_inputs[x]

    def _replace_by_nbits(self, linear: _Linear, bits: int) -> None:
        """MatMul -> com.microsoft MatMulNBits: weights in blocks of rows with a scale each, float32 activations."""
        name = linear.name
        columns, rows = self.tensors[name].shape
        blocks = -(-rows // q.BLOCK_SIZE)
        quantized = _Once(lambda: q.quantize_blocks(self._as_float32(name), bits))
        packed_shape = (columns, blocks, q.BLOCK_SIZE * bits // 8)
        weight = self._initializer(f"{name}.int{bits}", ir.DataType.UINT8, packed_shape, lambda: quantized()[0])
        scale = self._initializer(f"{name}.scale", ir.DataType.FLOAT, (columns, blocks), lambda: quantized()[1])
        attributes = {
            "K": rows,
            "N": columns,
            "bits": bits,
            "block_size": q.BLOCK_SIZE,
            "accuracy_level": q.INT8_ACCUMULATION,
        }
        node = ir.node("MatMulNBits", [linear.matmul.inputs[0], weight, scale], attributes, domain=CONTRIB_DOMAIN)
        self._replace(linear, [node])

    def _replace(self, linear: _Linear, nodes: list[ir.Node]) -> None:
        old, new = linear.matmul.outputs[0], nodes[-1].outputs[0]
        new.shape, new.type = old.shape, old.type
        self.graph.insert_before(linear.matmul, nodes)
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
        return self.tensors[name].to(torch.float32).numpy()

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


def _linears(name: str, value: ir.Value) -> list[_Linear]:
    found = []
    for transpose, _ in value.uses():
        if transpose.op_type != "Transpose" or value.shape is None or len(value.shape) != 2:
            continue
        users = list(transpose.outputs[0].uses())
        if len(users) == 1 and users[0].node.op_type == "MatMul" and users[0].idx == 1:
            found.append(_Linear(name, transpose, users[0].node))
    return found
