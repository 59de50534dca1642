"""What TensorRT is told about a decoder graph, or wants of it, that its ONNX parser does not see to."""

import onnx_ir as ir

from fly_build.step_tensors import is_cache
from fly_build.tensorrt_builder import AttentionNames


def fix_cache_length(model: ir.Model, cache_tokens: int) -> None:
    """Gives the cache tensors of a decoder graph their static length, as KVCacheUpdate demands."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if is_cache(value) and value.shape is not None:
            batch, heads, _, channels = value.shape
            value.shape = ir.Shape([batch, heads, cache_tokens, channels])


def attention_names(model: ir.Model) -> list[AttentionNames]:
    found = []
    for node in model.graph:
        if node.op_type == "Attention":
            names = [value.name for value in (*node.inputs[:4], node.outputs[0]) if value is not None]
            found.append(AttentionNames(*(str(name) for name in names)))
    return found
