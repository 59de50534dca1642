"""The rank graphs of a tensor-parallel decoder in one graph that ONNX Runtime runs: their collective is a Sum, so that
what is sharded can be held against what is not, without a GPU. Nothing of the ranks' graphs is left out or simplified.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from fly_build.checkpoint import Checkpoint
from fly_build.collectives import OPERATOR
from fly_build.head import append_head
from fly_build.linear_form import Kernels
from fly_build.sharding import Sharding, shard
from fly_build.weights import WeightWriter
from fly_trt.engines.onnxruntime import session_options
from fly_trt.manifest import Quantization
from tiny_models import EXACT_PRODUCTS, MAX_SEQ_LEN, SILENT_BELOW_ERROR, Runner
from traced_once import export_once

SHARED_INPUTS = ("input_ids", "write_indices", "num_context", "num_draft", "entropy_threshold", "use_full_entropy")
SHARED_INPUTS += ("window", "lookahead", "logits_positions", "next_tokens")


def rank_graph(
    checkpoint: Checkpoint,
    sharding: Sharding,
    rank: int,
    kernels: Kernels = "cpu",
    quantization: Quantization = "none",
) -> ir.Model:
    """What a backend writes for one rank, in float32 and with the head."""
    decoder = export_once(checkpoint, MAX_SEQ_LEN, attention="mask", sharding=sharding)
    tensors = {**checkpoint.load_weights(), **sharding.rank_vectors()}
    graph = decoder.model.graph
    prepare = lambda name, tensor: sharding.part(name, tensor, rank)  # noqa: E731
    writer = WeightWriter(graph, tensors, "float32", quantization, prepare=prepare, kernels=kernels)
    writer.attach(decoder.parameters)
    append_head(decoder.model, 3, [2])
    return decoder.model


def merge(models: Sequence[ir.Model]) -> ir.Model:
    """One graph: the ranks' values have the rank's number before their names, but for the step's inputs, which the
    ranks share. The collectives are paired by their place among the nodes, which is the same in all ranks."""
    inputs: dict[str, ir.Value] = {}
    for rank, model in enumerate(models):
        _rename(model.graph, rank, inputs)
    nodes: list[ir.Node] = []
    for group in zip(*(list(model.graph) for model in models), strict=True):
        assert len({node.op_type for node in group}) == 1
        if group[0].op_type == OPERATOR:
            nodes += _sums(group)
        else:
            nodes += group
    outputs = [value for model in models for value in model.graph.outputs]
    initializers = [value for model in models for value in model.graph.initializers.values()]
    for model in models:
        model.graph.remove(list(model.graph))
        model.graph.outputs.clear()
        model.graph.inputs.clear()
        model.graph.initializers.clear()
    first = models[0]
    merged = ir.Graph(
        list(inputs.values()), outputs, nodes=nodes, initializers=initializers, opset_imports=first.graph.opset_imports
    )
    return ir.Model(merged, ir_version=first.ir_version, functions=list(first.functions.values()))


def _rename(graph: ir.Graph, rank: int, shared: dict[str, ir.Value]) -> None:
    for value in list(graph.inputs):
        if value.name in SHARED_INPUTS and value.name in shared:
            ir.convenience.replace_all_uses_with(value, shared[value.name])
        else:
            name = str(value.name) if value.name in SHARED_INPUTS else f"{rank}/{value.name}"
            value.name = name
            shared[name] = value
    initializers = list(graph.initializers.values())
    graph.initializers.clear()
    for value in initializers:
        value.name = f"{rank}/{value.name}"
        graph.register_initializer(value)
    for node in graph:
        node.name = None
        for value in node.outputs:
            value.name = f"{rank}/{value.name}"


def _sums(collectives: Iterable[ir.Node]) -> list[ir.Node]:
    """Each rank's sum of what all ranks gave to one collective."""
    collectives = list(collectives)
    given = [node.inputs[0] for node in collectives]
    sums = []
    for node in collectives:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        assert (attributes["collective_operation"], attributes["reduce_op"]) == ("all_reduce", "sum")
        assert attributes["nb_rank"] == len(collectives)
        (old,) = node.outputs
        total = ir.node("Sum", given)
        new = total.outputs[0]
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        new.name, new.type, new.shape = old.name, old.type, old.shape
        node.graph.remove(node)
        sums.append(total)
    return sums


class MergedRunner(Runner):
    """Runs merged rank graphs as tiny_models.Runner runs a whole one: `step` returns the outputs of rank 0, after a
    look at those of the others, which must be the same."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        num_ranks: int,
        path: Path,
        batch_size: int = 2,
        kernels: Kernels = "cpu",
        quantization: Quantization = "none",
    ) -> None:
        config = checkpoint.config
        self.num_ranks = num_ranks
        self.sharding = shard(checkpoint.name, config, checkpoint.head_dim, num_ranks)
        graphs = [rank_graph(checkpoint, self.sharding, rank, kernels, quantization) for rank in range(num_ranks)]
        model = merge(graphs)
        ir.save(model, path, external_data=f"{path.name}.data")
        options = session_options()
        options.log_severity_level = SILENT_BELOW_ERROR
        options.add_session_config_entry(*EXACT_PRODUCTS)
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        shape = (batch_size, self.sharding.rank_kv_heads, MAX_SEQ_LEN, checkpoint.head_dim)
        noise = np.random.default_rng(1)
        self.cache = {
            f"{rank}/past_{kind}.{layer}": 9 * noise.standard_normal(shape, np.float32)
            for rank in range(num_ranks)
            for layer in range(config.num_hidden_layers)
            for kind in ("key", "value")
        }

    def step(self, input_ids: Any, write_indices: list[int], **head_inputs: Any) -> dict[str, np.ndarray]:
        outputs = super().step(input_ids, write_indices, **head_inputs)
        first = {name.removeprefix("0/"): value for name, value in outputs.items() if name.startswith("0/")}
        for rank in range(1, self.num_ranks):
            for name, value in first.items():
                np.testing.assert_array_equal(outputs[f"{rank}/{name}"], value, err_msg=name)
        return first
