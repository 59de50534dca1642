"""The portable verification head alone, as a model whose logits are an input, so that a test chooses them."""

from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from fly_build.head import HeadForm, append_head
from fly_trt.engines.onnxruntime import session_options


def head_session(
    vocab_size: int,
    stops: list[int],
    top_k: int = 3,
    form: HeadForm = "functions",
    cpu_kernels: Path | None = None,
) -> ort.InferenceSession:
    """Inputs are those of the head and the logits as `given` float32 [B, L, V]. cpu_kernels is the library of the
    operators, for that form."""
    wide = ir.Shape([ir.SymbolicDim("B"), ir.SymbolicDim("L"), vocab_size])
    given = ir.Value(name="given", type=ir.TensorType(ir.DataType.FLOAT), shape=wide)
    node = ir.node("Identity", [given])
    logits = node.outputs[0]
    logits.name, logits.type, logits.shape = "logits", given.type, wide
    graph = ir.Graph([given], [logits], nodes=[node], opset_imports={"": 24}, name="head")
    model = ir.Model(graph, ir_version=11)
    append_head(model, top_k, stops, form=form)
    proto = ir.to_proto(model).SerializeToString()
    options = session_options()
    if cpu_kernels is not None:
        options.register_custom_ops_library(str(cpu_kernels))
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
