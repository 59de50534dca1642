"""What is done to a traced graph to give a linear layer its weight: finding it, adding initializers and nodes, and
replacing its product.

Every initializer is lazy: it is computed when the file is written and dropped right after.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from fly_build.quantization import Array, FloatArray
from fly_trt.manifest import Dtype

DTYPES: dict[Dtype, tuple[torch.dtype, ir.DataType]] = {
    "float32": (torch.float32, ir.DataType.FLOAT),
    "float16": (torch.float16, ir.DataType.FLOAT16),
    "bfloat16": (torch.bfloat16, ir.DataType.BFLOAT16),
}
NUMPY_DTYPES: dict[Dtype, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
CONTRIB_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Linear:
    """A `MatMul(x, Transpose(weight))` of the traced graph. The last dimension of x is the layer's inputs."""

    name: str
    transpose: ir.Node
    matmul: ir.Node

    @property
    def input(self) -> ir.Value:
        value = self.matmul.inputs[0]
        assert value is not None
        return value


def find_linears(name: str, value: ir.Value) -> list[Linear]:
    """The linear layers whose weight is the parameter `value`."""
    found = []
    for transpose, _ in value.uses():
        if transpose.op_type != "Transpose" or value.shape is None or len(value.shape) != 2:
            continue
        users = list(transpose.outputs[0].uses())
        if len(users) == 1 and users[0].node.op_type == "MatMul" and users[0].idx == 1:
            found.append(Linear(name, transpose, users[0].node))
    return found


@dataclass
class GraphEdits:
    """Adds to one graph that computes in `compute_dtype`. Constants of one name are one initializer."""

    graph: ir.Graph
    compute_dtype: Dtype
    _constants: dict[str, ir.Value] = field(default_factory=dict)

    @property
    def computed(self) -> ir.DataType:
        return DTYPES[self.compute_dtype][1]

    def initializer(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Callable[[], Array]
    ) -> ir.Value:
        tensor = ir.LazyTensor(lambda: ir.Tensor(compute(), dtype=dtype, name=name), dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def constant(self, name: str, content: npt.ArrayLike) -> ir.Value:
        if name not in self._constants:
            array = np.asarray(content)
            self._constants[name] = self.initializer(
                name, ir.DataType.from_numpy(array.dtype), array.shape, lambda: array
            )
        return self._constants[name]

    def scales(self, name: str, shape: tuple[int, ...], compute: Callable[[], FloatArray]) -> ir.Value:
        """An initializer in the type of the activations."""
        stored = NUMPY_DTYPES[self.compute_dtype]
        return self.initializer(name, self.computed, shape, lambda: compute().astype(stored).reshape(shape))

    def insert(self, before: ir.Node, operator: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        """The output of a new node of standard ONNX, or of the one given as `domain`."""
        domain = str(attributes.pop("domain", ""))
        node = ir.node(operator, inputs, attributes, domain=domain)  # type: ignore[arg-type]
        self.graph.insert_before(before, node)
        if domain:
            self.graph.opset_imports[domain] = 1
        return node.outputs[0]

    def replace_joined(self, linears: list[Linear], new: ir.Value, sizes: list[int]) -> None:
        """The same for layers of one input, whose outputs, of these sizes, `new` has side by side."""
        outputs = [new]
        if len(linears) > 1:
            lengths = self.constant("outputs." + ".".join(map(str, sizes)), np.array(sizes, np.int64))
            split = ir.node("Split", [new, lengths], {"axis": -1}, num_outputs=len(sizes))
            self.graph.insert_before(linears[0].matmul, split)
            outputs = list(split.outputs)
        for linear, output in zip(linears, outputs, strict=True):
            self.replace(linear, output)

    def drop_unused(self) -> None:
        """ONNX Runtime warns of constants that nothing reads."""
        for name in [name for name, value in self._constants.items() if not value.uses()]:
            del self.graph.initializers[name], self._constants[name]

    def replace(self, linear: Linear, new: ir.Value) -> None:
        """`new`, which is computed before the linear layer's product, takes its place."""
        old = linear.matmul.outputs[0]
        new.shape, new.type = old.shape, old.type
        new.name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove([linear.matmul, linear.transpose], safe=True)
