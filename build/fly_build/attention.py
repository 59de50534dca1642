"""Makes the logits of a token independent of the shape of its step, for ONNX Runtime's CPU provider.

That provider multiplies a matrix of one row with a kernel of its own, which adds in another order. In a step of one
token per sequence, attention probabilities times values is such a product in every head, so a token would get other
bits there than in a longer step. Each Attention therefore gets a branch for steps of one token in which its products
have more rows: the query heads that share a key-value head, or the same row twice where every query head has its own.

Nothing else in a graph with unquantised or int8 weights depends on batch size, length, padding or cache capacity. In
int4, MatMulNBits does too: a step of one token in one sequence still differs.
"""

import onnx_ir as ir


def make_shape_invariant(model: ir.Model, num_heads: int, num_kv_heads: int) -> None:
    """Replaces each Attention of a decoder graph by If(T == 1, products of several rows, Attention), in place."""
    graph = model.graph
    attentions = [node for node in graph if node.op_type == "Attention"]
    has_one_token = _has_one_token(graph)
    for node in attentions:
        output = node.outputs[0]
        one_token = _one_token_attention(graph, node, num_heads, num_kv_heads)
        unchanged = ir.node("Attention", node.inputs, node.attributes)
        branches = {
            "then_branch": _subgraph(f"{output.name}.one_token", one_token, output),
            "else_branch": _subgraph(f"{output.name}.tokens", [unchanged], output),
        }
        chosen = ir.node("If", [has_one_token], branches)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [chosen], [output], chosen.outputs)


def _has_one_token(graph: ir.Graph) -> ir.Value:
    input_ids = next(value for value in graph.inputs if value.name == "input_ids")
    length = ir.node("Shape", [input_ids], {"start": 1, "end": 2})
    is_one = ir.node("Equal", [length.outputs[0], _constant(graph, 1)])
    scalar = ir.node("Squeeze", [is_one.outputs[0]])
    graph.insert_before(graph[0], [length, is_one, scalar])
    return scalar.outputs[0]


def _one_token_attention(graph: ir.Graph, node: ir.Node, num_heads: int, num_kv_heads: int) -> list[ir.Node]:
    """The nodes that compute the Attention `node` for a query [B, Hq, 1, D]; the last one has the result.

    They need no causal mask: the only position of the step is the last, and the operator's count of valid keys hides
    what lies behind it. A window's mask [B, 1, 1, S] is repeated, since ONNX Runtime does not broadcast it over rows.
    """
    query, key, value, mask, *others = node.inputs
    is_grouped = num_heads > num_kv_heads
    num_rows = num_heads // num_kv_heads if is_grouped else 2
    rows = _reshape(graph, query, num_kv_heads, num_rows) if is_grouped else _repeat(graph, query, num_rows)
    masks = [_repeat(graph, mask, num_rows)] if mask is not None else []
    attention = ir.node(
        "Attention",
        [rows.outputs[0], key, value, masks[0].outputs[0] if masks else None, *others],
        {name: attribute for name, attribute in node.attributes.items() if name != "is_causal"},
    )
    product = attention.outputs[0]
    result = _reshape(graph, product, num_heads, 1) if is_grouped else _first_row(graph, product)
    return [rows, *masks, attention, result]


def _reshape(graph: ir.Graph, value: ir.Value | None, num_heads: int, num_rows: int) -> ir.Node:
    """0 keeps a dimension, here the first and the last."""
    return ir.node("Reshape", [value, _constant(graph, 0, num_heads, num_rows, 0)])


def _repeat(graph: ir.Graph, value: ir.Value | None, num_rows: int) -> ir.Node:
    return ir.node("Tile", [value, _constant(graph, 1, 1, num_rows, 1)])


def _first_row(graph: ir.Graph, value: ir.Value) -> ir.Node:
    start, end, axis = (_constant(graph, number) for number in (0, 1, 2))
    return ir.node("Slice", [value, start, end, axis])


def _subgraph(name: str, nodes: list[ir.Node], result_like: ir.Value) -> ir.Graph:
    """A branch that returns the last node's output. Names in it must be unique in the whole model."""
    values = [value for node in nodes for value in node.outputs]
    for index, value in enumerate(values):
        value.name = f"{name}.{index}"
    values[-1].type = result_like.type
    return ir.Graph([], values[-1:], nodes=nodes, name=name)


def _constant(graph: ir.Graph, *values: int) -> ir.Value:
    name = "fly.int64." + ".".join(map(str, values))
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(values, ir.DataType.INT64, name=name)))
    return graph.initializers[name]
