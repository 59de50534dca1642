"""Questions that a pass asks of a graph: what computes a value, who reads it, whether it is a constant.

It knows ONNX and no model. Answers are None where a value is not what was asked for, so that a pattern is a chain of
questions that ends at the first None.
"""

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

FEW = 16  # constants of more elements are weights, which are not looked at
FOLDED = ("Add", "Cast", "Concat", "Mul")  # of constants: computed when a graph is loaded


def node_of(value: ir.Value | None, operator: str, num_inputs: int | None = None) -> ir.Node | None:
    """The node that computes the value, if it is one of this type (and has so many inputs)."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != operator or num_inputs not in (None, len(node.inputs)):
        return None
    return node


def only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    """The node of this type that alone reads the value, once."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != operator:
        return None
    return uses[0].node


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """What a node of two inputs reads beside the value."""
    first, second = node.inputs
    return second if first is value else first


def parts_of(value: ir.Value) -> list[ir.Value]:
    """The outputs of a Split along the last axis that alone reads the value; the value itself where there is none."""
    split = only_reader(value, "Split")
    if split is None or not is_last_axis(split, value):
        return [value]
    return list(split.outputs)


def is_last_axis(node: ir.Node, value: ir.Value | None) -> bool:
    axis = attribute(node, "axis", 0)
    return axis == -1 or (value is not None and value.shape is not None and axis == len(value.shape) - 1)


def attribute(node: ir.Node, name: str, otherwise: Any = None) -> Any:
    return node.attributes[name].value if name in node.attributes else otherwise


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is known when the graph is loaded."""
    if value is None:
        return False
    node = value.producer()
    if node is None:
        return value.const_value is not None
    return node.op_type in FOLDED and all(map(is_constant, node.inputs))


def numbers(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """A small constant of the graph."""
    tensor = None if value is None else value.const_value
    return None if tensor is None or tensor.size > FEW else tensor.numpy()


def is_number(value: ir.Value | None, number: float) -> bool:
    """Whether the value is this number, alone."""
    found = numbers(value)
    return found is not None and found.size == 1 and bool(found.item() == number)


def last_size(value: ir.Value | None) -> int | None:
    """Of the last axis, where it is fixed."""
    if value is None or value.shape is None or len(value.shape) == 0:
        return None
    size = value.shape[-1]
    return size if isinstance(size, int) else None


def have_same_shape(*values: ir.Value) -> bool:
    """Whether all axes of the values are known, by size or by name, and the same."""
    shapes = {None if value.shape is None else tuple(_axes(value.shape)) for value in values}
    return len(shapes) == 1 and all(shape is not None and None not in shape for shape in shapes)


def _axes(shape: ir.Shape) -> Iterator[int | str | None]:
    return (axis.value if isinstance(axis, ir.SymbolicDim) else axis for axis in shape)


def set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    """Gives a node an optional input, which it may not have yet."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Everybody reads `new` instead of `old`, whose type, shape and name it gets, and whose node is removed."""
    new.shape, new.type, new.name = old.shape, old.type, old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    node = old.producer()
    assert node is not None
    assert node.graph is not None
    node.graph.remove(node, safe=True)
