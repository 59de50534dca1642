"""Attention of a traced decoder as CacheAttention of plugins/cpu: one node that rotates queries and keys, writes keys
and values to the cache and attends to what is valid of it, instead of transposes, norms of heads, rotations,
TensorScatter, masks and Attention.

It knows the operators that operators.py emits, and no architecture. Keys lie in blocks in such a cache, so it is all of
a graph's attention or none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from fly_build.graph_patterns import (
    HEADS_FIRST,
    attribute,
    is_last_axis,
    is_number,
    last_size,
    node_of,
    numbers,
    only_reader,
    take_place,
)
from fly_trt.engines.base import CPU_DOMAIN, KEY_BLOCK_TOKENS
from fly_trt.manifest import Quantization

KEY_INPUT, VALUE_INPUT = "past_key.", "past_value."


@dataclass(frozen=True)
class _Heads:
    """A projection [B, T, H D] on its way to attention: normed by head with `norm`, rotated with cos and sin."""

    source: ir.Value
    norm: ir.Value | None = None
    epsilon: float = 0.0
    cos: ir.Value | None = None
    sin: ir.Value | None = None


@dataclass(frozen=True)
class _Layer:
    """What CacheAttention gets in place of an Attention node. `output` [B, T, Hq D] is taken over."""

    query: _Heads
    key: _Heads
    value: ir.Value
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    output: ir.Value
    scale: float
    softcap: float
    window: int


def fuse_attention(model: ir.Model, num_heads: int, num_kv_heads: int, quantization: Quantization) -> bool:
    """Makes every Attention a CacheAttention, in place; False where not all of them can be, and nothing was done. The
    cache is float16 where the products have 8 bits anyway, and float32 otherwise."""
    graph = model.graph
    step = _Step.of(graph)
    nodes = [node for node in graph if node.op_type == "Attention"]
    found = [step.layer(node, num_heads, num_kv_heads) for node in nodes]
    layers = [layer for layer in found if layer is not None]
    if len(layers) < len(found):
        return False
    tables = _Tables(graph, step)
    for node, layer in zip(nodes, layers, strict=True):
        _place(graph, node, layer, tables, num_heads, num_kv_heads)
    cache = ir.DataType.FLOAT16 if quantization == "int8" else ir.DataType.FLOAT
    for value in (*graph.inputs, *graph.outputs):
        _set_layout(value, cache)
    graph.sort()
    ir_passes.RemoveUnusedNodesPass()(model)
    return True


@dataclass(frozen=True)
class _Step:
    """The inputs of a step, and what is computed of them alone."""

    input_ids: ir.Value
    write_indices: ir.Value

    @classmethod
    def of(cls, graph: ir.Graph) -> "_Step":
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
        return is_number(first.inputs[1], 1) and self._is_range(offsets.inputs[0], self._is_length)

    def ends(self, value: ir.Value | None) -> bool:
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
        positions, keys = (_without(value, "Unsqueeze") for value in distance.inputs)
        if not self.are_positions(positions) or not self._is_range(keys, _is_capacity):
            return None
        return int(size.item())

    def layer(self, node: ir.Node, num_heads: int, num_kv_heads: int) -> _Layer | None:
        """None for attention that CacheAttention does not compute."""
        query4, key4, value4, mask, *others = node.inputs
        if attribute(node, "is_causal", 0) != 1 or any(others[:2]) or not self.ends(others[2]):
            return None
        (past_key, key), (past_value, value) = self._scattered(key4), self._scattered(value4)
        query, new_key, new_value = _heads(query4, num_heads), _heads(key, num_kv_heads), _heads(value, num_kv_heads)
        output, window = _joined_heads(node.outputs[0]), self.window(mask)
        if query is None or new_key is None or new_value is None or output is None or window is None:
            return None
        if past_key is None or past_value is None or key4 is None or value4 is None:
            return None
        head_dim = last_size(past_key)
        same_rotation = (query.cos, query.sin) == (new_key.cos, new_key.sin)
        same_epsilon = query.norm is None or new_key.norm is None or query.epsilon == new_key.epsilon
        is_plain = new_value.norm is None and new_value.cos is None
        if not (same_rotation and same_epsilon and is_plain) or head_dim is None or head_dim % KEY_BLOCK_TOKENS:
            return None
        return _Layer(
            query,
            new_key,
            new_value.source,
            (past_key, past_value),
            (key4, value4),
            output,
            attribute(node, "scale", head_dim**-0.5),
            attribute(node, "softcap", 0.0),
            window,
        )

    def _scattered(self, value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
        """The cache, and what is written to it at the step's positions."""
        node = node_of(value, "TensorScatter", 3)
        if node is None or value is None or node.inputs[2] is not self.write_indices or len(list(value.uses())) != 1:
            return None, None
        is_in_place = attribute(node, "axis", -2) in (2, -2) and attribute(node, "mode", "linear") == "linear"
        return (node.inputs[0], node.inputs[1]) if is_in_place else (None, None)

    def _is_length(self, value: ir.Value | None) -> bool:
        """T."""
        shape = node_of(_without(value, "Squeeze"), "Shape")
        return shape is not None and shape.inputs[0] is self.input_ids and attribute(shape, "start") == 1

    @staticmethod
    def _is_range(value: ir.Value | None, is_limit: Callable[[ir.Value | None], bool]) -> bool:
        node = node_of(value, "Range")
        if node is None:
            return False
        start, limit, delta = node.inputs
        return is_number(start, 0) and is_number(delta, 1) and is_limit(limit)


def _is_capacity(value: ir.Value | None) -> bool:
    """S."""
    shape = node_of(_without(value, "Squeeze"), "Shape")
    cache = None if shape is None else shape.inputs[0]
    if shape is None or cache is None or attribute(shape, "start") != 2:
        return False
    return (cache.name or "").startswith((KEY_INPUT, VALUE_INPUT))


def _without(value: ir.Value | None, operator: str) -> ir.Value | None:
    """What the value was before it got, or lost, axes of one."""
    while (node := node_of(value, operator)) is not None:
        value = node.inputs[0]
    return value


def _heads(value: ir.Value | None, num_heads: int) -> _Heads | None:
    """How a value [B, H, T, D] came of a projection."""
    norm, epsilon = None, 0.0
    cos = sin = None
    if (rotation := node_of(value, "RotaryEmbedding", 3)) is not None:
        value, cos, sin = rotation.inputs
        if attribute(rotation, "interleaved", 0) or attribute(rotation, "rotary_embedding_dim", 0) not in (
            0,
            2 * (last_size(cos) or 0),
        ):
            return None
    while (node := node_of(value, "RMSNormalization") or node_of(value, "Transpose")) is not None:
        if node.op_type == "RMSNormalization":
            if norm is not None or not is_last_axis(node, value):
                return None
            norm, epsilon = node.inputs[1], attribute(node, "epsilon", 1e-5)
        elif tuple(attribute(node, "perm", ())) != HEADS_FIRST:
            return None
        value = node.inputs[0]
    reshape, head_dim = node_of(value, "Reshape"), last_size(value)
    source = None if reshape is None else reshape.inputs[0]
    if source is None or source.shape is None or head_dim is None:
        return None
    if len(source.shape) != 3 or last_size(source) != num_heads * head_dim:
        return None
    return _Heads(source, norm, epsilon, cos, sin)


def _joined_heads(value: ir.Value) -> ir.Value | None:
    """[B, T, H D] that is made of the value [B, H, T, D]."""
    transpose = only_reader(value, "Transpose")
    if transpose is None or tuple(attribute(transpose, "perm", ())) != HEADS_FIRST:
        return None
    reshape = only_reader(transpose.outputs[0], "Reshape")
    output = None if reshape is None else reshape.outputs[0]
    return output if output is not None and output.shape is not None and len(output.shape) == 3 else None


def _place(graph: ir.Graph, node: ir.Node, layer: _Layer, tables: "_Tables", num_heads: int, num_kv_heads: int) -> None:
    query, key = layer.query, layer.key
    inputs = [query.source, key.source, layer.value, tables.step.write_indices, *layer.past]
    optional = [*tables.of(query.cos, query.sin), query.norm, key.norm]
    while optional and optional[-1] is None:
        optional.pop()
    attributes: dict[str, int | float] = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "scale": layer.scale,
        "softcap": layer.softcap,
        "window": layer.window,
        "epsilon": query.epsilon or key.epsilon,
    }
    fused = ir.node("CacheAttention", [*inputs, *optional], attributes, domain=CPU_DOMAIN, num_outputs=3)
    graph.insert_before(node, fused)
    graph.opset_imports[CPU_DOMAIN] = 1
    take_place(layer.output, fused.outputs[0])
    for old, new in zip(layer.present, fused.outputs[1:], strict=True):
        new.shape, new.type, new.name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _set_layout(value: ir.Value, cache: ir.DataType) -> None:
    """Of an input or output of the cache: its type, and keys [B, Hkv, S / 16, D, 16]."""
    name = (value.name or "").replace("present_", "past_")
    if not name.startswith((KEY_INPUT, VALUE_INPUT)) or value.shape is None:
        return
    value.type = ir.TensorType(cache)
    if name.startswith(KEY_INPUT):
        batch, heads, _, channels = value.shape
        value.shape = ir.Shape([batch, heads, ir.SymbolicDim("S16"), channels, KEY_BLOCK_TOKENS])


class _Tables:
    """Cosines and sines [B, T, R / 2] of the step's positions: of RotaryTables, where that is what they are, one for
    all layers; otherwise as they were traced."""

    def __init__(self, graph: ir.Graph, step: _Step) -> None:
        self.step = step
        self._graph = graph
        self._made: dict[tuple[bytes, float], tuple[ir.Value, ir.Value]] = {}

    def of(self, cos: ir.Value | None, sin: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
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
            inputs = [self.step.write_indices, self.step.input_ids, value]
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
        positions = _without(cast.inputs[0], "Unsqueeze")
        if attribute(cast, "to") != ir.DataType.FLOAT or not self.step.are_positions(positions):
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
