"""Query, key and value of a layer on their way from one product to attention, in fewer passes: they are brought into
heads together, and query and key are rotated together, where the graph does it one by one. The same bits.

It knows what torch leaves between a projection and attention, and leaves alone what is anything else, such as
projections with a bias, norms of query and key, or layers without positions.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fly_build.graph_edits import GraphEdits
from fly_build.graph_patterns import HEADS_FIRST, attribute, axes_of, is_last_axis, only_reader, remove_unread


def join_heads(edits: GraphEdits) -> None:
    """Replaces each Split of a joint product into query, key and value, with what follows up to the rotation."""
    for node in list(edits.graph):
        if node.op_type == "Split" and len(node.outputs) == 3 and is_last_axis(node, node.inputs[0]):
            ways = [way for output in node.outputs if (way := _Way.of(output)) is not None]
            if len(ways) == 3:
                _join(edits, node, ways)


@dataclass(frozen=True)
class _Way:
    """Of a projection [B, T, H * D] to heads [B, H, T, D]."""

    reshape: ir.Node
    transpose: ir.Node
    rotary: ir.Node | None
    num_heads: int
    head_dim: int

    @classmethod
    def of(cls, value: ir.Value) -> "_Way | None":
        reshape = only_reader(value, "Reshape", 0)
        transpose = None if reshape is None else only_reader(reshape.outputs[0], "Transpose")
        if reshape is None or transpose is None or tuple(attribute(transpose, "perm", ())) != HEADS_FIRST:
            return None
        heads = transpose.outputs[0]
        match axes_of(value), axes_of(heads):
            case (batch, length, int(width)), (batch_too, int(num_heads), length_too, int(head_dim)):
                if (batch, length, width) != (batch_too, length_too, num_heads * head_dim):
                    return None
                return cls(reshape, transpose, only_reader(heads, "RotaryEmbedding", 0), num_heads, head_dim)
        return None

    @property
    def result(self) -> ir.Value:
        return (self.rotary or self.transpose).outputs[0]

    @property
    def nodes(self) -> list[ir.Node]:
        return [node for node in (self.rotary, self.transpose, self.reshape) if node is not None]


def _join(edits: GraphEdits, split: ir.Node, ways: list[_Way]) -> None:
    query, key, value = ways
    if query.rotary is None or key.rotary is None or value.rotary is not None:
        return
    if query.rotary.inputs[1:] != key.rotary.inputs[1:] or not query.head_dim == key.head_dim == value.head_dim:
        return
    joined, before = split.inputs[0], query.rotary
    # As many heads as all three have, whatever each Reshape says of its own.
    form = edits.constant(f"heads.form.{query.head_dim}", np.array([0, 0, -1, query.head_dim], np.int64))
    reshaped = ir.node("Reshape", [joined, form])
    heads = ir.node("Transpose", [reshaped.outputs[0]], {"perm": HEADS_FIRST})
    rotated, values = _split_heads(edits, heads.outputs[0], [query.num_heads + key.num_heads, value.num_heads])
    rotary = ir.node("RotaryEmbedding", [rotated, *before.inputs[1:]], before.attributes)
    queries, keys = _split_heads(edits, rotary.outputs[0], [query.num_heads, key.num_heads])
    new = [reshaped, heads, values.producer(), rotary, keys.producer()]
    edits.graph.insert_before(before, [node for node in new if node is not None])
    for way, result in zip(ways, (queries, keys, values), strict=True):
        old = way.result
        result.name, result.type, result.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, result)
    forms = [way.reshape.inputs[1] for way in ways]
    edits.graph.remove([node for way in ways for node in way.nodes] + [split], safe=True)
    remove_unread(edits.graph, forms)


def _split_heads(edits: GraphEdits, value: ir.Value, counts: list[int]) -> tuple[ir.Value, ir.Value]:
    sizes = edits.constant("heads." + ".".join(map(str, counts)), np.array(counts, np.int64))
    first, second = ir.node("Split", [value, sizes], {"axis": 1}, num_outputs=2).outputs
    return first, second
