"""Query, key and value of a layer on their way from one product to attention, in fewer passes: they are brought into
heads together, and query and key are rotated together, where the graph does it one by one. The same bits.

It knows what torch leaves between a projection and attention, and leaves alone what is anything else, such as
projections with a bias, norms of query and key, or layers without positions.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fly_build.graph_edits import GraphEdits

TO_HEADS = [0, 2, 1, 3]


def join_heads(edits: GraphEdits) -> None:
    """Replaces each Split of a joint product into query, key and value, with what follows up to the rotation."""
    for node in list(edits.graph):
        if node.op_type == "Split" and len(node.outputs) == 3:
            ways = [_Way.of(output) for output in node.outputs]
            if all(ways):
                _join(edits, node, [way for way in ways if way is not None])


@dataclass(frozen=True)
class _Way:
    """Of a projection [B, T, H * D] to heads [B, H, T, D]."""

    reshape: ir.Node
    transpose: ir.Node
    rotary: ir.Node | None

    @classmethod
    def of(cls, value: ir.Value) -> "_Way | None":
        reshape = _only_user(value, "Reshape")
        transpose = reshape and _only_user(reshape.outputs[0], "Transpose")
        if reshape is None or transpose is None or list(transpose.attributes["perm"].as_ints()) != TO_HEADS:
            return None
        return cls(reshape, transpose, _only_user(transpose.outputs[0], "RotaryEmbedding"))

    @property
    def result(self) -> ir.Value:
        return (self.rotary or self.transpose).outputs[0]

    @property
    def num_heads(self) -> int | None:
        shape = self.transpose.outputs[0].shape
        heads = None if shape is None else shape[1]
        return heads if isinstance(heads, int) else None

    @property
    def nodes(self) -> list[ir.Node]:
        return [node for node in (self.rotary, self.transpose, self.reshape) if node is not None]


def _join(edits: GraphEdits, split: ir.Node, ways: list[_Way]) -> None:
    query, key, value = ways
    counts = [way.num_heads for way in ways]
    if query.rotary is None or key.rotary is None or value.rotary is not None or None in counts:
        return
    has_same_form = len({way.reshape.inputs[1] for way in ways}) == 1
    if not has_same_form or query.rotary.inputs[1:] != key.rotary.inputs[1:]:
        return
    (joined, _), before = split.inputs, query.rotary
    assert joined is not None
    num_queries, num_keys, num_values = (count for count in counts if count is not None)
    form = query.reshape
    reshaped = ir.node("Reshape", [joined, form.inputs[1]], form.attributes)
    heads = ir.node("Transpose", [reshaped.outputs[0]], {"perm": TO_HEADS})
    rotated, values = _split_heads(edits, heads.outputs[0], [num_queries + num_keys, num_values])
    rotary = ir.node("RotaryEmbedding", [rotated, *before.inputs[1:]], before.attributes)
    queries, keys = _split_heads(edits, rotary.outputs[0], [num_queries, num_keys])
    new = [reshaped, heads, values.producer(), rotary, keys.producer()]
    edits.graph.insert_before(before, [node for node in new if node is not None])
    for way, result in zip(ways, (queries, keys, values), strict=True):
        old = way.result
        result.name, result.type, result.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, result)
    edits.graph.remove([node for way in ways for node in way.nodes] + [split], safe=True)


def _split_heads(edits: GraphEdits, value: ir.Value, counts: list[int]) -> tuple[ir.Value, ir.Value]:
    sizes = edits.constant("heads." + ".".join(map(str, counts)), np.array(counts, np.int64))
    first, second = ir.node("Split", [value, sizes], {"axis": 1}, num_outputs=2).outputs
    return first, second


def _only_user(value: ir.Value, operator: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].idx == 0 and uses[0].node.op_type == operator:
        return uses[0].node
    return None
