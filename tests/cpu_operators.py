"""Operators of plugins/cpu on their own, in a process of its own for each kind of vector unit: a process runs one kind.

    CpuOperators(library).run("avx2", [Node("Int8Linear", {"x": ..., "weight": ..., "scales": ...})])

As a program (`python cpu_operators.py LIBRARY FILE`) it is that process.
"""

import ctypes
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

DOMAIN = "fly.cpu"
VARIABLE = "FLY_TRT_CPU_ISA"


@dataclass(frozen=True)
class Node:
    """One operator with its inputs in order; None stands for one that is left out."""

    operator: str
    inputs: dict[str, np.ndarray | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)
    output_types: tuple[int, ...] = (TensorProto.FLOAT,)

    def model(self) -> bytes:
        given = {name: value for name, value in self.inputs.items() if value is not None}
        node = helper.make_node(
            self.operator,
            [name if name in given else "" for name in self.inputs],
            self.outputs,
            domain=DOMAIN,
            **self.attributes,
        )
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), [f"{name}{axis}" for axis in range(value.ndim)]
            )
            for name, value in given.items()
        ]
        outputs = [
            helper.make_tensor_value_info(name, kind, None)
            for name, kind in zip(self.outputs, self.output_types, strict=True)
        ]
        graph = helper.make_graph([node], "node", inputs, outputs)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
        return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())

    def values(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in self.inputs.items() if value is not None}


@dataclass(frozen=True)
class CpuOperators:
    library: Path
    num_threads: int = 1

    def run(self, kind: str, nodes: list[Node]) -> list[list[np.ndarray]]:
        """The outputs of each node. Raises RuntimeError with what the process said where it fails."""
        outputs: list[list[np.ndarray] | str] = self._call(kind, [(node.model(), node.values()) for node in nodes])[1]
        for refusal in outputs:
            if isinstance(refusal, str):
                raise RuntimeError(refusal)
        return outputs  # type: ignore[return-value]

    def refusals(self, nodes: list[Node]) -> list[str]:
        """What ONNX Runtime says of each node, none of which runs."""
        outputs = self._call("", [(node.model(), node.values()) for node in nodes])[1]
        assert [number for number, refusal in enumerate(outputs) if not isinstance(refusal, str)] == []
        return list(outputs)

    def peak_memory(self, nodes: list[Node]) -> int:
        """Bytes of a process that runs them one after the other."""
        return int(self._call("", [(node.model(), node.values()) for node in nodes])[2])

    def name(self, kind: str) -> str:
        """The kind that runs where `kind` is asked for; "" asks for none."""
        return self._call(kind, [])[0]

    def _call(self, kind: str, runs: list[tuple[bytes, dict[str, np.ndarray]]]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "runs"
            file.write_bytes(pickle.dumps((self.num_threads, runs)))
            done = subprocess.run(
                [sys.executable, __file__, str(self.library), str(file)],
                env=os.environ | {VARIABLE: kind},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            return pickle.loads(file.read_bytes())


def main(library: str, file: str) -> None:
    num_threads, runs = pickle.loads(Path(file).read_bytes())
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.register_custom_ops_library(library)
    sessions: dict[bytes, ort.InferenceSession] = {}
    outputs: list[Any] = []
    for model, inputs in runs:
        try:
            if model not in sessions:
                sessions[model] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            outputs.append(sessions[model].run(None, inputs))
        except Exception as error:  # ONNX Runtime's own
            outputs.append(str(error))
    peak_memory = 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    name = ctypes.CDLL(library).fly_cpu_kernels_name
    name.restype = ctypes.c_char_p
    Path(file).write_bytes(pickle.dumps((name().decode(), outputs, peak_memory)))


if __name__ == "__main__":
    main(*sys.argv[1:])
