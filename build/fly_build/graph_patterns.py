"""Questions that a pass asks of a graph: what computes a value, who reads it, whether it is a constant.

It knows ONNX and no model. Answers are None where a value is not what was asked for, so that a pattern is a chain of
questions that ends at the first None.
"""

from collections.abc import Collection, Iterable
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

FEW = 16  # constants of more elements are weights, which are not looked at
HEADS_FIRST = (0, 2, 1, 3)  # of a Transpose between [B, T, H, D] and [B, H, T, D]
FOLDED = ("Add", "Cast", "Concat", "Mul")  # of constants: computed when a graph is loaded


def node_of(value: ir.Value | None, operator: str, num_inputs: int | None = None) -> ir.Node | None:
    """The node that computes the value, if it is one of this type (and has so many inputs)."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != operator or num_inputs not in (None, len(node.inputs)):
        return None
    return node


def only_reader(value: ir.Value, operator: str | None = None, index: int | None = None) -> ir.Node | None:
    """The node that alone reads the value, once, if it is of this type (and reads it as this input)."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    ((node, at),) = uses
    return node if operator in (None, node.op_type) and index in (None, at) else None


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


def axes_of(value: ir.Value) -> tuple[int | str, ...] | None:
    """Size or name of each axis; None where one has neither."""
    known = [axis.value if isinstance(axis, ir.SymbolicDim) else axis for axis in value.shape or ()]
    axes = tuple(axis for axis in known if axis is not None)
    return None if value.shape is None or len(axes) < len(known) else axes


def nodes_behind(results: Iterable[ir.Value], given: Collection[ir.Value] = ()) -> set[ir.Node]:
    """The nodes that the results need, without those that only compute what is given."""
    needed, waiting = set[ir.Node](), list[ir.Value | None](results)
    while waiting:
        value = waiting.pop()
        node = None if value is None or value in given else value.producer()
        if node is not None and node not in needed:
            needed.add(node)
            waiting.extend(node.inputs)
    return needed


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


def remove_unread(graph: ir.Graph, values: Iterable[ir.Value | None]) -> None:
    """Removes what computes the values, as far as nobody reads it."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value is None or value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if value.is_initializer():
            del graph.initializers[str(value.name)]
        elif node is not None and node.graph is graph and len(node.outputs) == 1:
            waiting.extend(node.inputs)
            graph.remove(node, safe=True)
