"""Attention of a traced decoder as CacheAttention of plugins/cpu: one node that rotates queries and keys, writes keys
and values to the cache and attends to what is valid of it, instead of transposes, norms of heads, rotations,
TensorScatter, masks and Attention.

It knows the operators that operators.py emits, and no architecture. Keys lie in blocks in such a cache, so it is all of
a graph's attention or none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from fly_build.cpu_rotary import RotaryTables
from fly_build.graph_patterns import (
    HEADS_FIRST,
    attribute,
    is_last_axis,
    last_size,
    node_of,
    nodes_behind,
    only_reader,
    take_place,
)
from fly_build.step_tensors import StepInputs, holds_keys, is_cache
from fly_trt.engines.base import CPU_DOMAIN, KEY_BLOCK_TOKENS
from fly_trt.manifest import Quantization

NUM_INPUTS = 7  # of Attention


class _UnlikeError(Exception):
    """What a layer's attention does and CacheAttention does not, in words."""


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

    @property
    def computed(self) -> list[ir.Value]:
        """What it reads beside caches."""
        query, key = self.query, self.key
        optional = (query.cos, query.sin, query.norm, key.norm)
        return [query.source, key.source, self.value, *(value for value in optional if value is not None)]


def fuse_attention(model: ir.Model, num_heads: int, num_kv_heads: int, quantization: Quantization) -> str | None:
    """Makes every Attention a CacheAttention, in place; or says, in a few words, why not all of them can be, and then
    nothing was done. The cache is float16 where the products have 8 bits anyway, and float32 otherwise."""
    graph = model.graph
    step = StepInputs.of(graph)
    nodes, layers = [node for node in graph if node.op_type == "Attention"], []
    for index, node in enumerate(nodes):
        try:
            layers.append(_layer(node, step, num_heads, num_kv_heads))
        except _UnlikeError as reason:
            return f"layer {index}: {reason}"
    if (reader := _other_reader(graph, layers)) is not None:
        return f"{reader.op_type} reads keys of the cache, which would lie in blocks"
    tables = RotaryTables(graph, step)
    for node, layer in zip(nodes, layers, strict=True):
        _place(node, layer, step, tables, num_heads, num_kv_heads)
    cache = ir.DataType.FLOAT16 if quantization == "int8" else ir.DataType.FLOAT
    for value in (*graph.inputs, *graph.outputs):
        _set_layout(value, cache)
    graph.sort()
    ir_passes.RemoveUnusedNodesPass()(model)
    return None


def _layer(node: ir.Node, step: StepInputs, num_heads: int, num_kv_heads: int) -> _Layer:
    """Raises _UnlikeError."""
    query4, key4, value4, mask, *caches, ends = (*node.inputs, *[None] * NUM_INPUTS)[:NUM_INPUTS]
    if attribute(node, "is_causal", 0) != 1:
        raise _UnlikeError("it is not causal")
    if any(caches) or not step.are_ends(ends):
        raise _UnlikeError("which keys are valid is not said by the step's positions alone")
    if (window := step.window(mask)) is None:
        raise _UnlikeError("its mask is not that of a sliding window")
    (past_key, present_key, key4), (past_value, present_value, value4) = (
        _scattered(value, step) for value in (key4, value4)
    )
    query, key = _heads(query4, num_heads, "queries"), _heads(key4, num_kv_heads, "keys")
    value = _heads(value4, num_kv_heads, "values")
    if (query.cos, query.sin) != (key.cos, key.sin):
        raise _UnlikeError("queries and keys are rotated by different angles")
    if query.norm is not None and key.norm is not None and query.epsilon != key.epsilon:
        raise _UnlikeError("the norms of queries and keys have different epsilons")
    if value.norm is not None or value.cos is not None:
        raise _UnlikeError("values are normed or rotated")
    head_dim = last_size(past_key)
    if head_dim is None or head_dim % KEY_BLOCK_TOKENS:
        raise _UnlikeError(f"heads of {head_dim} channels, expected a multiple of {KEY_BLOCK_TOKENS}")
    return _Layer(
        query,
        key,
        value.source,
        (past_key, past_value),
        (present_key, present_value),
        _joined_heads(node.outputs[0]),
        attribute(node, "scale", head_dim**-0.5),
        attribute(node, "softcap", 0.0),
        window,
    )


def _scattered(value: ir.Value | None, step: StepInputs) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """The cache before and after the step, and what is written to it at the step's positions. Raises _UnlikeError."""
    node = node_of(value, "TensorScatter", 3)
    past = None if node is None else node.inputs[0]
    if node is None or past is None or value is None or node.inputs[2] is not step.write_indices:
        raise _UnlikeError("keys and values are not written to the cache at the step's positions")
    if attribute(node, "axis", -2) not in (2, -2) or attribute(node, "mode", "linear") != "linear":
        raise _UnlikeError("keys and values are not written to the cache one behind the other")
    if len(list(value.uses())) != 1:
        raise _UnlikeError("somebody else reads its cache")
    return past, value, node.inputs[1]


def _heads(value: ir.Value | None, num_heads: int, what: str) -> _Heads:
    """How a value [B, H, T, D] came of a projection. Raises _UnlikeError."""
    norm, epsilon = None, 0.0
    cos = sin = None
    if (rotation := node_of(value, "RotaryEmbedding", 3)) is not None:
        value, cos, sin = rotation.inputs
        if attribute(rotation, "interleaved", 0):
            raise _UnlikeError(f"{what} are rotated by neighbouring channels")
        if attribute(rotation, "rotary_embedding_dim", 0) not in (0, 2 * (last_size(cos) or 0)):
            raise _UnlikeError(f"{what} are rotated in other channels than there are angles for")
    while (node := node_of(value, "RMSNormalization") or node_of(value, "Transpose")) is not None:
        if node.op_type == "RMSNormalization":
            if norm is not None or not is_last_axis(node, value):
                raise _UnlikeError(f"{what} are not normed once and by head")
            norm, epsilon = node.inputs[1], attribute(node, "epsilon", 1e-5)
        elif tuple(attribute(node, "perm", ())) != HEADS_FIRST:
            raise _UnlikeError(f"{what} are transposed in another way")
        value = node.inputs[0]
    if node_of(value, "RotaryEmbedding") is not None and norm is not None:
        raise _UnlikeError(f"{what} are normed after the rotation")
    reshape, head_dim = node_of(value, "Reshape"), last_size(value)
    source = None if reshape is None else reshape.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 3 or head_dim is None:
        by = "nothing" if value is None or (producer := value.producer()) is None else producer.op_type
        raise _UnlikeError(f"{what} come of {by}, expected a projection's output in heads")
    if last_size(source) != num_heads * head_dim:
        raise _UnlikeError(f"{what} are {last_size(source)} channels, expected {num_heads} heads of {head_dim}")
    return _Heads(source, norm, epsilon, cos, sin)


def _joined_heads(value: ir.Value) -> ir.Value:
    """[B, T, H D] that is made of the value [B, H, T, D]. Raises _UnlikeError."""
    transpose = only_reader(value, "Transpose")
    reshape = None if transpose is None else only_reader(transpose.outputs[0], "Reshape")
    if transpose is None or reshape is None or tuple(attribute(transpose, "perm", ())) != HEADS_FIRST:
        raise _UnlikeError("its heads do not go to a projection as they are")
    output = reshape.outputs[0]
    if output.shape is None or len(output.shape) != 3:
        raise _UnlikeError("its heads do not go to a projection one behind the other")
    return output


def _other_reader(graph: ir.Graph, layers: Sequence[_Layer]) -> ir.Node | None:
    """A node that stays when the layers are CacheAttention, and reads more of a cache of keys than what both layouts
    have alike: the sizes of their first two axes."""
    results = [*graph.outputs, *(value for layer in layers for value in layer.computed)]
    replaced = {value for layer in layers for value in (layer.output, *layer.present)}
    for node in nodes_behind(results, replaced):
        if any(value is not None and holds_keys(value) for value in node.inputs):
            is_alike = node.op_type == "Shape" and 0 <= attribute(node, "start", 0) <= attribute(node, "end", -1) <= 2
            if not is_alike:
                return node
    return None


def _place(
    node: ir.Node, layer: _Layer, step: StepInputs, tables: RotaryTables, num_heads: int, num_kv_heads: int
) -> None:
    graph, query, key = node.graph, layer.query, layer.key
    assert graph is not None
    inputs = [query.source, key.source, layer.value, step.write_indices, *layer.past]
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
    if not is_cache(value) or value.shape is None:
        return
    value.type = ir.TensorType(cache)
    if holds_keys(value):
        batch, heads, _, channels = value.shape
        value.shape = ir.Shape([batch, heads, ir.SymbolicDim("S16"), channels, KEY_BLOCK_TOKENS])
