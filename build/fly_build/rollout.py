"""Several greedy steps of a draft model as one graph: a Loop around the decoder, each of whose steps reads the token
that the one before chose.

A small draft model's step costs what its call costs, more than what it computes. The loop's body is the decoder with
its gate as they were built, so that a token has the same bits either way. It knows the tensors of a step
(fly_trt/engines/base.py) and CacheAttention, which can write to a cache that a loop's body only refers to.
"""

from collections.abc import Iterable

import onnx_ir as ir

from fly_build.graph_patterns import nodes_behind
from fly_build.step_tensors import is_past
from fly_trt.engines.base import CPU_DOMAIN
from fly_trt.engines.rollouts import NUM_STEPS, ROLLOUT_OUTPUTS


def make_rollout(model: ir.Model) -> bool:
    """Makes a decoder with a head into its rollout, in place: inputs are those of a step that its gate needs, of which
    input_ids is [B, 1], and `num_steps` int64; outputs are [K, B, 1], of K steps. False, and nothing is done, where the
    caches are not CacheAttention's alone."""
    graph = model.graph
    given = {value.name: value for value in graph.inputs}
    readers = {use.node for value in graph.inputs if is_past(value) for use in value.uses()}
    if not readers or any((node.domain, node.op_type) != (CPU_DOMAIN, "CacheAttention") for node in readers):
        return False
    said = {value.name: value for value in graph.outputs}
    results = [said[name] for name in ROLLOUT_OUTPUTS]
    graph.outputs.clear()
    nodes = _computing(graph, results)
    graph.remove(list(graph))
    one = ir.val("one", const_value=ir.tensor([1], dtype=ir.DataType.INT64, name="one"))
    graph.register_initializer(one)
    num_steps = ir.val(NUM_STEPS, ir.DataType.INT64, [])
    first = [given["input_ids"], given["write_indices"]]
    loop = ir.node(
        "Loop", [num_steps, None, *first], {"body": _body(nodes, first, results, one)}, num_outputs=2 + len(results)
    )
    graph.append(loop)
    for name, output, result in zip(ROLLOUT_OUTPUTS, loop.outputs[2:], results, strict=True):
        output.name, output.type, output.shape = name, result.type, ir.Shape(["K", "B", 1])
        graph.outputs.append(output)
    used = {id(value) for node in [loop, *nodes] for value in node.inputs}
    kept = [num_steps, *(value for value in graph.inputs if id(value) in used)]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    for name in [name for name, value in graph.initializers.items() if id(value) not in used and value is not one]:
        del graph.initializers[name]
    return True


def _computing(graph: ir.Graph, results: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that the results need, in their order, without what they say of the caches."""
    needed = nodes_behind(results)
    return [_without_presents(node) for node in graph if node in needed]


def _without_presents(node: ir.Node) -> ir.Node:
    """CacheAttention whose caches nobody reads but the next step."""
    if node.op_type == "CacheAttention":
        for present in node.outputs[1:]:
            present.name = ""
    return node


def _body(nodes: list[ir.Node], first: list[ir.Value], results: list[ir.Value], one: ir.Value) -> ir.Graph:
    condition = ir.val("is_continued", ir.DataType.BOOL, [])
    tokens = ir.val("step.input_ids", ir.DataType.INT64, ["B", 1])
    position = ir.val("step.write_indices", ir.DataType.INT64, ["B"])
    for outer, inner in zip(first, (tokens, position), strict=True):
        ir.convenience.replace_all_uses_with(outer, inner)
    for name, result in zip(ROLLOUT_OUTPUTS, results, strict=True):
        result.name, result.shape = f"step.{name}", tokens.shape
    following = [
        ir.node("Identity", [condition]),
        ir.node("Identity", [results[0]]),
        ir.node("Add", [position, one]),
    ]
    for node, like in zip(following, (condition, tokens, position), strict=True):
        output = node.outputs[0]
        output.name, output.type, output.shape = f"next.{like.name}", like.type, like.shape
    return ir.Graph(
        [ir.val("iteration", ir.DataType.INT64, []), condition, tokens, position],
        [*(node.outputs[0] for node in following), *results],
        nodes=[*nodes, *following],
        name="step",
    )
