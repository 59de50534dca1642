"""The tensors of a step in a decoder graph: which of them are caches, and what is computed of the step's inputs alone.

It knows the contract's names and how torch writes down positions and windows, and nothing of attention.
"""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from fly_build.graph_patterns import attribute, is_last_axis, is_number, node_of, numbers

PAST, PRESENT = "past_", "present_"


def is_past(value: ir.Value) -> bool:
    """Whether the value is a cache as it comes into a step."""
    return (value.name or "").startswith(PAST)


def is_cache(value: ir.Value) -> bool:
    """Whether it is a cache as it comes into a step or leaves it."""
    return (value.name or "").startswith((PAST, PRESENT))


def holds_keys(value: ir.Value) -> bool:
    """Whether it is such a cache, of keys."""
    return (value.name or "").startswith((f"{PAST}key.", f"{PRESENT}key."))


def without(value: ir.Value | None, operator: str) -> ir.Value | None:
    """What the value was before it got, or lost, axes of one."""
    while (node := node_of(value, operator)) is not None:
        value = node.inputs[0]
    return value


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a step, by which its values are known."""

    input_ids: ir.Value
    write_indices: ir.Value

    @classmethod
    def of(cls, graph: ir.Graph) -> "StepInputs":
        by_name = {value.name: value for value in graph.inputs}
        return cls(by_name["input_ids"], by_name["write_indices"])

    def are_positions(self, value: ir.Value | None) -> bool:
        """int64 [B, T]: those of the step's tokens."""
        total = node_of(value, "Add")
        if total is None:
            return False
        first, offsets = (node_of(part, "Unsqueeze") for part in total.inputs)
        if first is None or first.inputs[0] is not self.write_indices or offsets is None:
            return False
        return is_number(first.inputs[1], 1) and _is_range(offsets.inputs[0], self._is_length)

    def are_ends(self, value: ir.Value | None) -> bool:
        """int64 [B]: the positions behind the step."""
        total = node_of(value, "Add")
        last = None if total is None else node_of(total.inputs[0], "Gather")
        if total is None or last is None or not is_last_axis(last, last.inputs[0]):
            return False
        return is_number(total.inputs[1], 1) and is_number(last.inputs[1], -1) and self.are_positions(last.inputs[0])

    def window(self, mask: ir.Value | None) -> int | None:
        """Of a mask `position - key position < window` [B, 1, T, S]; 0 without a mask, None for any other."""
        if mask is None:
            return 0
        less = node_of(mask, "Less")
        distance = None if less is None else node_of(less.inputs[0], "Sub")
        if less is None or distance is None or (size := numbers(less.inputs[1])) is None or size.size != 1:
            return None
        positions, keys = (without(value, "Unsqueeze") for value in distance.inputs)
        if not self.are_positions(positions) or not _is_range(keys, _is_capacity):
            return None
        return int(size.item())

    def _is_length(self, value: ir.Value | None) -> bool:
        """T."""
        shape = node_of(without(value, "Squeeze"), "Shape")
        return shape is not None and shape.inputs[0] is self.input_ids and attribute(shape, "start") == 1


def _is_range(value: ir.Value | None, is_limit: Callable[[ir.Value | None], bool]) -> bool:
    node = node_of(value, "Range")
    if node is None:
        return False
    start, limit, delta = node.inputs
    return is_number(start, 0) and is_number(delta, 1) and is_limit(limit)


def _is_capacity(value: ir.Value | None) -> bool:
    """S."""
    shape = node_of(without(value, "Squeeze"), "Shape")
    cache = None if shape is None else shape.inputs[0]
    return shape is not None and cache is not None and is_past(cache) and attribute(shape, "start") == 2
