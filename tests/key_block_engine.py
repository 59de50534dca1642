"""A decoder of attention layers alone whose keys lie in blocks: such caches in an engine, without a checkpoint."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from fly_build.head import append_head
from fly_trt.engines.base import POSITIONS_INPUT, EngineInfo
from fly_trt.engines.onnxruntime import OnnxRuntimeEngine
from fly_trt.manifest import ModelEngine, Source

VOCAB, LAYERS, HEADS, KV_HEADS, DIM = 880, 3, 4, 2, 16


def key_block_engine(folder: Path, library: Path, *, num_slots: int, cache: str = "float32") -> OnnxRuntimeEngine:
    """Embeddings of query, key and value side by side; CacheAttention and a product in each layer."""
    rng = np.random.default_rng(0)
    dtype = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}[cache]

    def value(name: str, kind: ir.DataType, shape: list[int | str]) -> ir.Value:
        dims = [ir.SymbolicDim(size) if isinstance(size, str) else size for size in shape]
        return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(dims))

    def constant(name: str, *shape: int) -> ir.Value:
        array = (rng.normal(size=shape) / np.sqrt(shape[0] if shape[0] < VOCAB else 1)).astype(np.float32)
        return ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType.FLOAT))

    def attention(layer: int, states: ir.Value) -> ir.Node:
        past = [
            value(f"past_key.{layer}", dtype, ["B", KV_HEADS, "S16", DIM, 16]),
            value(f"past_value.{layer}", dtype, ["B", KV_HEADS, "S", DIM]),
        ]
        inputs = [states, None, None, write, *past]
        attributes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "scale": 0.3}
        node = ir.node("CacheAttention", inputs, attributes, domain="fly.cpu", num_outputs=3)
        for output, like in zip(node.outputs[1:], past, strict=True):
            output.name, output.type, output.shape = like.name.replace("past", "present"), like.type, like.shape
        pasts.extend(past)
        presents.extend(node.outputs[1:])
        return node

    ids, write = value("input_ids", ir.DataType.INT64, ["B", "T"]), value("write_indices", ir.DataType.INT64, ["B"])
    positions = value(POSITIONS_INPUT, ir.DataType.INT64, ["B", "L"])
    pasts, presents = [], []
    wide = (HEADS + 2 * KV_HEADS) * DIM
    weights = [constant("embedding", VOCAB, wide)]
    nodes = [ir.node("Gather", [weights[0], ids])]
    for layer in range(LAYERS):
        nodes.append(attention(layer, nodes[-1].outputs[0]))
        if layer == LAYERS - 1:
            row = ir.Value(name="row", const_value=ir.tensor([-1, HEADS * DIM], ir.DataType.INT64, name="row"))
            weights.append(row)
            nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], row]))
            nodes.append(ir.node("Gather", [nodes[-1].outputs[0], positions]))
        weights.append(constant(f"linear.{layer}", HEADS * DIM, VOCAB if layer == LAYERS - 1 else wide))
        nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], weights[-1]]))
    logits = nodes[-1].outputs[0]
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape([*positions.shape, VOCAB])
    graph = ir.Graph(
        [ids, write, positions, *pasts],
        [logits, *presents],
        nodes=nodes,
        initializers=weights,
        opset_imports={"": 24, "fly.cpu": 1},
        name="decoder",
    )
    model = ir.Model(graph, ir_version=11)
    append_head(model, 3, [])
    path = folder / "model.onnx"
    ir.save(model, path)
    record = ModelEngine(
        model=path.name,
        source=Source(checkpoint="none", architecture="none", num_parameters=1),
        vocab_size=VOCAB,
        num_layers=LAYERS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype="float32",
        quantization="none",
        kv_cache_dtype=cache,
    )
    info = EngineInfo(
        max_batch_size=num_slots,
        max_seq_len=4096,
        max_draft_len=15,
        max_num_tokens=4096,
        vocab_size=VOCAB,
        entropy_top_k=3,
        stop_token_ids=frozenset(),
        has_top_tokens=True,
        has_positions=True,
    )
    return OnnxRuntimeEngine(path, record, info, num_slots=num_slots, cpu_kernels=library)
