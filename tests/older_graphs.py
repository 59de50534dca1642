"""Decoder graphs as older versions of fly-build wrote them."""

import numpy as np
import onnx_ir as ir

from fly_trt.engines.base import POSITION_INPUTS


def find_positions(model: ir.Model) -> None:
    """Makes a graph, in place, one from before a step could be asked of some positions: it speaks of all of them and
    finds the tokens that follow by itself."""
    graph = model.graph
    ids = next(value for value in graph.inputs if value.name == "input_ids")

    def constant(name: str, value: int | list[int]) -> ir.Value:
        tensor = ir.tensor(np.array(value, np.int64), name=f"older.{name}")
        constant = ir.val(f"older.{name}", const_value=tensor)
        graph.register_initializer(constant)
        return constant

    size, shape = ir.node("Size", [ids]), ir.node("Shape", [ids])
    every = ir.node("Range", [constant("zero", 0), size.outputs[0], constant("one", 1)])
    positions = ir.node("Reshape", [every.outputs[0], shape.outputs[0]])
    begin, second, end, axis = (constant(f"slice.{at}", [at]) for at in (0, 1, 2**62, -1))
    shifted = ir.node("Slice", [ids, second, end, axis])
    first = ir.node("Slice", [ids, begin, second, axis])
    following = ir.node("Concat", [shifted.outputs[0], first.outputs[0]], {"axis": 1})
    for node in reversed([size, shape, every, positions, shifted, first, following]):
        graph.insert_before(graph[0], node)
    for name, node in zip(POSITION_INPUTS, (positions, following), strict=True):
        (value,) = [value for value in graph.inputs if value.name == name]
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        graph.inputs.remove(value)
    for value in graph.outputs:
        if value.shape is not None:
            value.shape = ir.Shape([ids.shape[1] if str(size) == "L" else size for size in value.shape])
