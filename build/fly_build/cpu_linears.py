"""What stands around the Int8Linear nodes of a graph, taken into them: operators of plugins/cpu read a row once and do
what comes before and behind its product while they have it.

Each pass looks at one node and what reads or computes its values; what does not match stays as it is. It knows no
architecture, and runs when the products are in the graph.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from fly_build.graph_patterns import (
    attribute,
    axes_of,
    is_constant,
    is_last_axis,
    is_number,
    last_size,
    node_of,
    only_reader,
    other_input,
    parts_of,
    set_input,
    take_place,
)

LINEAR, ATTENTION = "Int8Linear", "CacheAttention"
NORM, BIAS, RESIDUAL = 3, 4, 5  # inputs of Int8Linear
ONNX_END = 2**63 - 1  # of a Slice that goes to the end, as torch exports it


class Prologue(IntEnum):
    """Int8Linear's attribute `prologue`: what is done to a row before its product."""

    NONE = 0
    RMS_NORM = 1
    SILU_GATE = 2
    GELU_TANH_GATE = 3


def fuse_linears(model: ir.Model) -> None:
    """Runs all passes, in place. Nodes and initializers that nobody reads any more are removed."""
    graph = model.graph
    for take in (_take_bias, _take_residual, _take_norm, _take_gate):
        for node in [node for node in graph if node.op_type == LINEAR]:
            take(graph, node)
    for node in graph:
        if node.op_type == ATTENTION:
            _join_inputs(node)
    graph.sort()
    ir_passes.RemoveUnusedNodesPass()(model)


def _take_bias(graph: ir.Graph, node: ir.Node) -> None:
    """A constant that is added to each part of the output."""
    parts = parts_of(node.outputs[0])
    adds = [add for part in parts if (add := only_reader(part, "Add")) is not None]
    if len(adds) < len(parts):
        return
    biases = [other_input(add, part) for add, part in zip(adds, parts, strict=True)]
    for bias, part in zip(biases, parts, strict=True):
        if not is_constant(bias) or bias is None or bias.shape is None or bias.shape != (last_size(part),):
            return
    bias = biases[0]
    if len(biases) > 1:
        joined = ir.node("Concat", biases, {"axis": 0})
        graph.insert_before(node, joined)
        bias = joined.outputs[0]
    set_input(node, BIAS, bias)
    for add, part in zip(adds, parts, strict=True):
        take_place(add.outputs[0], part)


def _take_residual(graph: ir.Graph, node: ir.Node) -> None:
    """What the output is added to."""
    output = node.outputs[0]
    add = only_reader(output, "Add")
    if add is None:
        return
    residual, total = other_input(add, output), add.outputs[0]
    if residual is None or is_constant(residual) or (axes := axes_of(output)) is None:
        return
    if not axes == axes_of(residual) == axes_of(total):  # what is broadcast has other sums
        return
    set_input(node, RESIDUAL, residual)
    take_place(total, output)


def _take_norm(graph: ir.Graph, node: ir.Node) -> None:
    """An RMS norm that nobody else reads; between it and the product rows may be picked."""
    reader, index, x = node, 0, node.inputs[0]
    while x is not None and only_reader(x, reader.op_type) is reader and (rows := _picked_rows(x)) is not None:
        reader, index, x = rows, 0, rows.inputs[0]
    norm = node_of(x, "RMSNormalization")
    if norm is None or x is None or only_reader(x, reader.op_type) is not reader or not is_last_axis(norm, x):
        return
    weight = norm.inputs[1]
    if weight is None or weight.shape is None or weight.shape != (last_size(x),):
        return
    reader.replace_input_with(index, norm.inputs[0])
    set_input(node, NORM, weight)
    _set_prologue(node, Prologue.RMS_NORM)
    node.attributes.add(ir.AttrFloat32("epsilon", attribute(norm, "epsilon", 1e-5)))


def _picked_rows(x: ir.Value) -> ir.Node | None:
    """The node that computes x by picking or numbering rows of its first input, which keep their last axis."""
    node = node_of(x, "Reshape") or node_of(x, "Gather")
    if node is None or (node.op_type == "Gather" and attribute(node, "axis", 0) != 0):
        return None
    size = last_size(x)
    return node if size is not None and size == last_size(node.inputs[0]) else None


def _take_gate(graph: ir.Graph, node: ir.Node) -> None:
    """An activation of the first half of a value times the second half."""
    x = node.inputs[0]
    product = node_of(x, "Mul")
    if product is None or x is None or only_reader(x, LINEAR) is not node or _has_prologue(node):
        return
    for activated, passed in (product.inputs, product.inputs[::-1]):
        for prologue, gate_of in GATES:
            gate = gate_of(activated)
            halves = node_of(gate, "Split")
            if halves is None or list(halves.outputs) != [gate, passed] or not is_last_axis(halves, halves.inputs[0]):
                continue
            if last_size(gate) is None or last_size(gate) != last_size(passed):
                continue
            node.replace_input_with(0, halves.inputs[0])
            _set_prologue(node, prologue)
            return


def _silu_of(value: ir.Value | None) -> ir.Value | None:
    """x of x * sigmoid(x)."""
    product = node_of(value, "Mul")
    if product is None:
        return None
    for x, weight in (product.inputs, product.inputs[::-1]):
        sigmoid = node_of(weight, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return x
    return None


def _gelu_tanh_of(value: ir.Value | None) -> ir.Value | None:
    gelu = node_of(value, "Gelu")
    return gelu.inputs[0] if gelu is not None and attribute(gelu, "approximate", "none") == "tanh" else None


GATES: tuple[tuple[Prologue, Callable[[ir.Value | None], ir.Value | None]], ...] = (
    (Prologue.SILU_GATE, _silu_of),
    (Prologue.GELU_TANH_GATE, _gelu_tanh_of),
)


def _has_prologue(node: ir.Node) -> bool:
    return bool(attribute(node, "prologue", Prologue.NONE) != Prologue.NONE)


def _set_prologue(node: ir.Node, prologue: Prologue) -> None:
    node.attributes.add(ir.AttrInt64("prologue", int(prologue)))


def _join_inputs(attention: ir.Node) -> None:
    """Query, key and value that lie side by side in one value are read there."""
    joined = _split(attention.inputs[:3]) or _sliced(attention.inputs[:3])
    if joined is not None:
        for index, value in enumerate((joined, None, None)):
            attention.replace_input_with(index, value)


def _split(parts: Sequence[ir.Value | None]) -> ir.Value | None:
    """The value whose Split these are, in order."""
    split = node_of(parts[0], "Split")
    if split is None or list(split.outputs) != list(parts) or not is_last_axis(split, split.inputs[0]):
        return None
    return split.inputs[0]


def _sliced(parts: Sequence[ir.Value | None]) -> ir.Value | None:
    """The value of which these are slices, one behind the other, of the whole last axis."""
    slices = [node for part in parts if (node := node_of(part, "Slice", 5)) is not None]
    whole = slices[0].inputs[0] if slices else None
    size, position = last_size(whole), 0
    if whole is None or whole.shape is None or size is None or len(slices) < len(parts):
        return None
    for node, part in zip(slices, parts, strict=True):
        x, start, end, axis, step = node.inputs
        next_position = position + (last_size(part) or 0)
        is_next = x is whole and is_number(start, position) and is_number(step, 1)
        ends = is_number(end, next_position) or (next_position == size and is_number(end, ONNX_END))
        if not is_next or not ends or not (is_number(axis, -1) or is_number(axis, len(whole.shape) - 1)):
            return None
        position = next_position
    return whole if position == size else None
