"""Cosines and sines of a step's positions as RotaryTables of plugins/cpu, one node for all layers that rotate alike.

It knows how torch writes down what a rotary module of transformers computes; what is anything else stays as it is.
"""

import numpy as np
import onnx_ir as ir

from fly_build.graph_patterns import attribute, is_last_axis, is_number, last_size, node_of, numbers
from fly_build.step_tensors import StepInputs, without
from fly_trt.engines.base import CPU_DOMAIN


class RotaryTables:
    """Makes the nodes, of which each pair of tables needs one."""

    def __init__(self, graph: ir.Graph, step: StepInputs) -> None:
        self._step = step
        self._graph = graph
        self._made: dict[tuple[bytes, float], tuple[ir.Value, ir.Value]] = {}

    def of(self, cos: ir.Value | None, sin: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
        """Cosines and sines [B, T, R / 2] for those that were traced, which are given back where they are others."""
        found, other = self._frequencies(cos, "Cos"), self._frequencies(sin, "Sin")
        if found is None or other is None:
            return cos, sin
        (frequencies, scaling), (others, other_scaling) = found, other
        if scaling != other_scaling or not np.array_equal(frequencies, others):
            return cos, sin
        key = frequencies.tobytes(), scaling
        if key not in self._made:
            name = f"rotary.{len(self._made)}.frequencies"
            value = ir.val(name, const_value=ir.tensor(frequencies, ir.DataType.FLOAT, name=name))
            self._graph.register_initializer(value)
            inputs = [self._step.write_indices, self._step.input_ids, value]
            node = ir.node("RotaryTables", inputs, {"scaling": scaling}, domain=CPU_DOMAIN, num_outputs=2)
            self._graph.insert_before(self._graph[0], node)
            self._made[key] = node.outputs[0], node.outputs[1]
        return self._made[key]

    def _frequencies(self, value: ir.Value | None, function: str) -> tuple[np.ndarray, float] | None:
        """f [R / 2] and the factor of a value `factor * function(position f)`; what was traced has it twice, side by
        side, of which the first half is taken."""
        half = node_of(value, "Slice")
        if half is None or (size := last_size(value)) is None or not _is_first_half(half, size):
            return None
        scaling, x = 1.0, half.inputs[0]
        if (scaled := node_of(x, "Mul")) is not None:
            x, factor = scaled.inputs
            if (number := numbers(factor)) is None or number.size != 1:
                return None
            scaling = float(number.item())
        taken = node_of(x, function)
        doubled = None if taken is None else node_of(taken.inputs[0], "Concat", 2)
        if doubled is None or doubled.inputs[0] is not doubled.inputs[1] or not is_last_axis(doubled, x):
            return None
        return self._angles(doubled.inputs[0], size, scaling)

    def _angles(self, value: ir.Value | None, size: int, scaling: float) -> tuple[np.ndarray, float] | None:
        product = node_of(value, "Mul")
        if product is None:
            return None
        cast = node_of(product.inputs[0], "Cast")
        frequencies = product.inputs[1]
        if cast is None or frequencies is None or frequencies.const_value is None:
            return None
        positions = without(cast.inputs[0], "Unsqueeze")
        if attribute(cast, "to") != ir.DataType.FLOAT or not self._step.are_positions(positions):
            return None
        numbers_of = frequencies.const_value.numpy().reshape(-1)
        return (numbers_of, scaling) if numbers_of.size == size and numbers_of.dtype == np.float32 else None


def _is_first_half(node: ir.Node, size: int) -> bool:
    """Whether a Slice takes the first `size` of twice as many channels."""
    x, start, end, axis = node.inputs[:4]
    if last_size(x) != 2 * size or x is None or x.shape is None:
        return False
    rank = len(x.shape)
    return is_number(start, 0) and is_number(end, size) and (is_number(axis, -1) or is_number(axis, rank - 1))
