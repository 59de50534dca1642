"""onnxruntime-gpu without a GPU, as far as fly_trt calls it, on the memory and streams of simulated_cuda.py.

Its CUDA provider computes with the CPU's, in place, at the addresses that were bound. It keeps graphs as the real one
does: the first run with a number runs three times and records the addresses, later ones use what was recorded, whatever
is bound then. What the GPU would refuse, or get wrong without a word, ends up in the GPU's `faults`: tensors that are
not bound or not where they should be, a cache that is not updated in place, a graph that is run with another binding.
"""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from fly_trt.engines import onnxruntime_cuda
from plan_segments import SILENT_BELOW_ERROR, whole
from simulated_cuda import ALIGNMENT, Error, Failure, SimulatedCuda, Work
from simulated_tensorrt import DTYPES, execute

PROVIDER = "CUDAExecutionProvider"
RUNS_BEFORE_A_GRAPH = 2
ELEMENT_TYPES = {"tensor(bfloat16)": 16} | {name: dtype for name, dtype in DTYPES.items() if "bfloat" not in name}
NO_GRAPH = -1


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class IOBinding:
    def __init__(self, session: "InferenceSession") -> None:
        self.session = session
        self.tensors: dict[str, tuple[int, tuple[int, ...]]] = {}

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        self._bind(self.session.inputs, name, (device_type, device_id), element_type, shape, buffer_ptr)

    def bind_output(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        self._bind(self.session.outputs, name, (device_type, device_id), element_type, shape, buffer_ptr)

    def _bind(
        self, known: dict[str, Any], name: str, device: tuple[str, int], element_type: Any, shape: Any, address: int
    ) -> None:
        if element_type != ELEMENT_TYPES[known[name].type]:
            raise RuntimeError(f"{name}: {element_type} for {known[name].type}")
        if device != ("cuda", self.session.device):
            self.session.cuda.faults.append(f"{name}: bound to {device}")
        self.tensors[name] = (address, tuple(shape))


class InferenceSession:
    def __init__(
        self, library: "SimulatedOnnxRuntime", path: str, sess_options: Any, providers: list[Any], enable_fallback: int
    ) -> None:
        self.cuda = library.cuda
        ((name, settings),) = providers
        if (name, enable_fallback) != (PROVIDER, 0):
            self.cuda.faults.append(f"{providers} with fallback {enable_fallback}: the CPU would do for it")
        self.is_loaded = library.loads_provider
        self.device, self.stream = int(settings["device_id"]), int(settings["user_compute_stream"])
        self.captures = settings["enable_cuda_graph"] == "1"
        self.cuda.current_stream(self.stream)
        sess_options.log_severity_level = SILENT_BELOW_ERROR
        self.real = ort.InferenceSession(path, sess_options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.real.get_inputs()}
        self.outputs = {value.name: value for value in self.real.get_outputs()}
        self.graphs: dict[int, dict[str, tuple[int, tuple[int, ...]]]] = {}
        library.sessions.append(self)

    def get_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"] if self.is_loaded else ["CPUExecutionProvider"]

    def io_binding(self) -> IOBinding:
        return IOBinding(self)

    def run_with_iobinding(self, iobinding: IOBinding, run_options: RunOptions) -> None:
        graph_id = int(run_options.entries["gpu_graph_id"])
        is_captured = self.captures and graph_id != NO_GRAPH
        try:
            with self.cuda.lock:
                tensors = self._check(iobinding.tensors)
                runs = 1
                if is_captured:
                    runs = 1 if graph_id in self.graphs else 1 + RUNS_BEFORE_A_GRAPH
                    if runs > 1 and self.cuda.captures_of_engines != "succeed":
                        raise Failure(Error.cudaErrorStreamCaptureUnsupported)
                    if self.graphs.setdefault(graph_id, tensors) != tensors:
                        raise Failure(Error.cudaErrorLaunchFailure, f"graph {graph_id} was captured with other tensors")
                    self.cuda.calls["graph launches of sessions"] += runs == 1
                for _ in range(runs):
                    self.cuda.enqueue(self.stream, Work(lambda: execute(self.cuda, whole(self.real), tensors)))
        except Failure as failure:
            if failure.reason:
                self.cuda.faults.append(failure.reason)
            raise RuntimeError(f"CUDA failure: {failure.error.name} {failure.reason}") from None

    def _check(self, tensors: dict[str, tuple[int, tuple[int, ...]]]) -> dict[str, tuple[int, tuple[int, ...]]]:
        illegal = Error.cudaErrorInvalidValue
        if self.cuda.fatal_error is not None:
            raise Failure(self.cuda.fatal_error)
        if missing := sorted((self.inputs | self.outputs).keys() - tensors.keys()):
            raise Failure(illegal, f"{missing} are not bound")
        for name, (address, shape) in tensors.items():
            value = (self.inputs | self.outputs)[name]
            num_bytes = int(np.prod(shape)) * np.dtype(DTYPES[value.type]).itemsize
            if address % ALIGNMENT or self.cuda.find(address, num_bytes).device != self.device:
                raise Failure(illegal, f"{name}: {address:#x} is not aligned, or not on device {self.device}")
            if name.startswith("past_") and address != tensors[name.replace("past", "present", 1)][0]:
                raise Failure(illegal, f"{name}: the cache is not updated in place")
        return dict(tensors)


class SimulatedOnnxRuntime:
    """The module of the package onnxruntime-gpu. Without `loads_provider` NVIDIA's libraries are missing."""

    RunOptions = RunOptions

    def __init__(self, cuda: SimulatedCuda) -> None:
        self.cuda = cuda
        self.__version__ = "1.31.1"
        self.loads_provider = True
        self.sessions: list[InferenceSession] = []

    def get_available_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]

    def set_default_logger_severity(self, severity: int) -> None: ...

    def preload_dlls(self, directory: str | None = None) -> None:
        print("Failed to load libcudart.so.13")

    def InferenceSession(
        self, path_or_bytes: str, sess_options: Any, providers: list[Any], *, enable_fallback: int
    ) -> InferenceSession:
        return InferenceSession(self, path_or_bytes, sess_options, providers, enable_fallback)


def install(patch: pytest.MonkeyPatch, cuda: SimulatedCuda) -> SimulatedOnnxRuntime:
    """Makes this the ONNX Runtime of engines of a GPU, until the patch is undone; the CPU's keep the real one."""
    library = SimulatedOnnxRuntime(cuda)
    patch.setattr(onnxruntime_cuda, "ort", library)
    missing = "libcublas.so.13: cannot open shared object file"
    patch.setattr(onnxruntime_cuda, "_missing_library", lambda: None if library.loads_provider else missing)
    return library
