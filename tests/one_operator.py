"""The operators of plugins/cpu, one at a time, through ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from fly_build.cpu_library import find_library
from fly_trt.engines.base import CPU_DOMAIN
from fly_trt.engines.onnxruntime import session_options

OPSET_VERSION = 24


def cpu_kernels() -> Path:
    """The compiled library. Skips the test where there is no compiler."""
    library = find_library("auto")
    if library is None:
        pytest.skip("no C++ compiler, or not an x86-64 machine: the operators of plugins/cpu are not built")
    return library


class Operator:
    """A node as a model: inputs by name, with their types and numbers of axes."""

    def __init__(
        self, name: str, inputs: Mapping[str, tuple[type[np.generic], int]], num_outputs: int, **attributes: Any
    ) -> None:
        values = [
            ir.Value(
                name=key, type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))), shape=ir.Shape([None] * rank)
            )
            for key, (dtype, rank) in inputs.items()
        ]
        node = ir.node(name, values, attributes, domain=CPU_DOMAIN, num_outputs=num_outputs)
        for at, output in enumerate(node.outputs):
            output.name = f"output.{at}"
        opsets = {"": OPSET_VERSION, CPU_DOMAIN: 1}
        graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports=opsets, name=name)
        proto = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
        options = session_options()
        options.register_custom_ops_library(str(cpu_kernels()))
        self._session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])

    def __call__(self, **inputs: Any) -> list[np.ndarray]:
        outputs: list[np.ndarray] = self._session.run(None, inputs)
        return outputs
