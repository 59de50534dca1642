"""TensorRT's runtime without a GPU, as far as fly_trt calls it, on the memory and streams of simulated_cuda.py.

A plan holds an ONNX graph in the form that fly_build makes for TensorRT; ONNX Runtime computes it in place, at the
addresses that were bound, and simulated_nccl.py what ranks sum. What TensorRT or the GPU would refuse, or get wrong
without a word, ends up in the GPU's `faults`: a shape outside the profile, a tensor without an address, a cache that is
not updated in place, scratch memory in use twice, a context that changed after its graph was captured, an engine that
is used while another device than its own is current, or with that one's memory. Names are those of `tensorrt_rtx`.
"""

import ctypes
import enum
import json
import sys
import types
import weakref
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import simulated_nccl
from plan_segments import SegmentedPlan, Sum, segmented
from simulated_cuda import ALIGNMENT, UNWRITTEN, Error, Failure, SimulatedCuda, Stream, Work

BFLOAT16 = 16  # of onnx.TensorProto
SCRATCH_BYTES = 4096
VERSION = "1.7.1.116"
DTYPES = {
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,  # its bits
}


class ILogger:
    Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None: ...


ExecutionContextAllocationStrategy = enum.Enum(
    "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"], start=0
)
DynamicShapesKernelSpecializationStrategy = enum.Enum(
    "DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"], start=0
)


class IRuntimeCache:
    """Knows the shapes that kernels were compiled for."""

    def __init__(self) -> None:
        self._shapes: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps([VERSION, sorted(self._shapes)]).encode()

    def deserialize(self, blob: Any) -> bool:
        try:
            version, shapes = json.loads(bytes(blob))
        except ValueError:
            return False
        if version == VERSION:
            self._shapes.update(shapes)
        return bool(version == VERSION)


class IRuntimeConfig:
    __slots__ = ("_allocation", "_cache", "dynamic_shapes_kernel_specialization_strategy")

    def __init__(self) -> None:
        self._cache = IRuntimeCache()
        self._allocation = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._allocation = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class IPluginRegistry:
    """There are no plugins here."""

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> None: ...

    def load_library(self, plugin_path: str) -> None: ...


def serialise(onnx_model: bytes, library: str, profiles: list[Any]) -> bytes:
    """A plan: an ONNX model, and for which library and which least and most (B, T, L) it was built."""
    return json.dumps({"library": library, "profiles": profiles}).encode() + b"\n" + onnx_model


def deserialise(plan: bytes) -> tuple[bytes, str, list[Any]]:
    """What `serialise` was given. Raises ValueError for anything else."""
    header, _, onnx_model = plan.partition(b"\n")
    record = json.loads(header)
    return onnx_model, record["library"], record["profiles"]


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._cuda, self._logger = sys.modules["cuda.bindings"].runtime, logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "ICudaEngine | None":
        try:
            onnx_model, library, profiles = deserialise(bytes(serialized_engine))
            return ICudaEngine(self._cuda, self._logger, library, profiles, segmented(onnx_model))
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            self._logger.log(ILogger.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization\n({error})")
            return None


class ICudaEngine:
    device_memory_size_v2 = SCRATCH_BYTES

    def __init__(self, cuda: SimulatedCuda, logger: Any, library: str, profiles: Any, plan: SegmentedPlan) -> None:
        self._cuda, self._logger, self._library, self._profiles = cuda, logger, library, profiles
        self._graph = plan
        self._device = cuda.thread.device
        self._inputs = plan.inputs
        self._tensors = plan.inputs | plan.outputs

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, strategy: Any = None) -> "IExecutionContext | None":
        try:
            self._check_device()
        except Failure as failure:
            self._refuse(failure.reason)
            return None
        eager = DynamicShapesKernelSpecializationStrategy.EAGER
        has_final_kernels, kernels = self._library == "tensorrt", None
        if isinstance(strategy, IRuntimeConfig):
            has_final_kernels = strategy.dynamic_shapes_kernel_specialization_strategy is eager
            strategy, kernels = strategy._allocation, strategy._cache
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise NotImplementedError("contexts with memory of their own")
        return IExecutionContext(self, has_final_kernels, kernels)

    def _check_device(self) -> None:
        if self._cuda.thread.device != self._device:
            raise Failure(Error.cudaErrorInvalidResourceHandle, self._cuda.describe(self._device, "TensorRT engine"))

    def _refuse(self, reason: str) -> bool:
        if reason:
            self._cuda.faults.append(reason)
        self._logger.log(ILogger.ERROR, f"IExecutionContext: Error Code 3: API Usage Error ({reason})")
        return False


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, has_final_kernels: bool, kernels: IRuntimeCache | None) -> None:
        self._engine, self._has_final_kernels, self._kernels = engine, has_final_kernels, kernels
        self._scratch = (0, 0)
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._version = 0  # of all that a captured graph depends on
        self._executed_shapes: dict[str, tuple[int, ...]] = {}
        self._communicator: simulated_nccl.Communicator | None = None
        self._refuse = engine._refuse
        engine._cuda.contexts.add(self)

    def set_communicator(self, communicator: Any) -> bool:
        """Waits for the other ranks, and says no where that was aborted."""
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self._communicator = simulated_nccl.communicators.get(address(communicator, None))
        if self._communicator is None:
            return self._refuse("not a communicator, or aborted before")
        self._version += 1
        return self._communicator.sum_up(np.zeros(0, np.float32)) or self._refuse("")

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = (memory, size)
        self._version += 1

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Any) -> bool:
        if not 0 <= profile_index < len(self._engine._profiles):
            return self._refuse(f"profile {profile_index} of {len(self._engine._profiles)}")
        self._profile = profile_index
        self._shapes.clear()
        self._version += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self._engine._inputs:
            return self._refuse(f"{name} is no input")
        if self._profile is None:
            return self._refuse(f"{name}: a shape before a profile")
        limits = dict(zip("BTL", zip(*self._engine._profiles[self._profile], strict=True), strict=True))
        for got, size in zip(shape, self._engine._inputs[name].shape, strict=True):
            least, most = limits.get(size, (size, size))
            if not least <= got <= most:
                return self._refuse(f"{name}: shape {shape} lies outside of profile {self._profile}")
        if self._shapes.get(name) != shape:
            self._shapes[name] = shape
            self._version += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            return self._refuse(f"{name} is no tensor")
        if self._addresses.get(name) != memory:
            self._addresses[name] = memory
            self._version += 1
        return True

    def execute_async_v3(self, stream_handle: Any) -> bool:
        cuda = self._engine._cuda
        try:
            with cuda.lock:
                self._enqueue(stream_handle)
        except Failure as failure:
            return self._refuse(failure.reason)
        self._executed_shapes = dict(self._shapes)
        if self._kernels is not None and (shape := str(self._shapes["input_ids"])) not in self._kernels._shapes:
            self._kernels._shapes.add(shape)
            cuda.calls["compile kernels"] += 1
        return True

    def _enqueue(self, stream_handle: Any) -> None:
        cuda = self._engine._cuda
        arguments = self._check()
        self._prepare_for(cuda.current_stream(stream_handle))
        is_captured = cuda.stream(stream_handle).captured is not None
        context, version = weakref.ref(self), self._version
        engine, scratch, communicator = self._engine, self._scratch, self._communicator

        def sum_up(array: np.ndarray, num_ranks: int) -> None:
            assert communicator is not None
            assert communicator._nranks == num_ranks, f"{communicator._nranks} ranks sum what {num_ranks} have"
            communicator.sum_up(array, is_captured=is_captured)

        def run() -> None:
            if is_captured and (context() is None or context()._version != version):
                raise Failure(Error.cudaErrorLaunchFailure, "the context changed after its graph was captured")
            cuda.view(*scratch).fill(UNWRITTEN)
            execute(cuda, engine._graph, arguments, sum_up)

        cuda.enqueue(stream_handle, Work(run, scratch[0]))

    def _prepare_for(self, stream: Stream) -> None:
        cuda = self._engine._cuda
        if error := cuda.thread.last_error:
            raise Failure(error, f"{error.name} of an earlier call was never taken")
        if stream.captured is None:
            return
        stream.is_capture_valid &= cuda.captures_of_engines != "are spoiled"
        if cuda.captures_of_engines == "are refused":
            raise Failure(Error.cudaErrorStreamCaptureUnsupported)
        if self._executed_shapes != self._shapes:
            raise Failure(Error.cudaErrorLaunchFailure, "captured before these shapes ran once")
        if not self._has_final_kernels:
            raise Failure(Error.cudaErrorLaunchFailure, "captured kernels that will be replaced")

    def _check(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Address and shape of every tensor, which are those of now also when the work runs later."""
        engine, illegal = self._engine, Error.cudaErrorInvalidValue
        engine._check_device()
        if missing := sorted(engine._inputs.keys() - self._shapes.keys()):
            raise Failure(illegal, f"no shape for {missing}")
        if missing := sorted(engine._tensors.keys() - self._addresses.keys()):
            raise Failure(illegal, f"no address for {missing}")
        if engine._graph.num_ranks > 1 and self._communicator is None:
            raise Failure(illegal, f"a plan of {engine._graph.num_ranks} ranks without a communicator")
        address, size = self._scratch
        memory = engine._cuda.find(address, size)
        if size < engine.device_memory_size_v2 or address % ALIGNMENT or memory.device != engine._device:
            raise Failure(illegal, f"{size} bytes of device memory at {address:#x}")
        sizes: dict[Any, int] = {}
        for name, shape in self._shapes.items():
            for dimension, got in zip(engine._inputs[name].shape, shape, strict=True):
                if sizes.setdefault(dimension, got) != got:
                    raise Failure(illegal, f"{name}: {dimension} is {got} here and {sizes[dimension]} elsewhere")
        arguments = {}
        for name, value in engine._tensors.items():
            address = self._addresses[name]
            shape = tuple(sizes.get(size, size) for size in value.shape)
            num_bytes = int(np.prod(shape)) * np.dtype(DTYPES[value.type]).itemsize
            if address % ALIGNMENT or engine._cuda.find(address, num_bytes).device != engine._device:
                raise Failure(illegal, f"{name}: {address:#x} is not aligned, or not on device {engine._device}")
            if name.startswith("past_") and address != self._addresses[name.replace("past", "present", 1)]:
                raise Failure(illegal, f"{name}: the cache is not updated in place")
            arguments[name] = (address, shape)
        return arguments


def execute(
    cuda: SimulatedCuda, graph: SegmentedPlan, arguments: dict[str, tuple[int, Any]], sum_up: Sum | None = None
) -> None:
    """Computes on the CPU what a GPU would, in place: the tensors by name, each with its address and shape."""
    types = {name: value.type for name, value in (graph.inputs | graph.outputs).items()}
    arrays = {}
    for name, (address, shape) in arguments.items():
        dtype = np.dtype(DTYPES[types[name]])
        arrays[name] = cuda.view(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
    if (arrays["write_indices"] + arrays["input_ids"].shape[1] > arrays["past_key.0"].shape[2]).any():
        raise Failure(Error.cudaErrorIllegalAddress, f"written at {arrays['write_indices']}, behind the cache's end")
    if not np.isin(arrays["input_ids"], range(arrays["logits"].shape[2])).all():
        raise Failure(Error.cudaErrorLaunchFailure, "a token that is not in the vocabulary")
    values = {}
    for name, array in arrays.items():
        if types[name] == "tensor(bfloat16)":
            values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
        else:
            values[name] = ort.OrtValue.ortvalue_from_numpy(array)
    try:
        graph.run(values, sum_up)
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code
        raise Failure(Error.cudaErrorLaunchFailure, " ".join(str(error).split())) from None


def install(patch: pytest.MonkeyPatch, library: str = "tensorrt_rtx") -> SimulatedCuda:
    """Makes this the process's only GPU and TensorRT library, until the patch is undone."""
    cuda = SimulatedCuda()
    if library == "tensorrt_rtx":
        cuda.compute_capability = (8, 9)  # it has no kernels for Hopper
    trt = types.ModuleType(library)
    names = [ILogger, Runtime, ICudaEngine, IExecutionContext, IPluginRegistry, ExecutionContextAllocationStrategy]
    if library == "tensorrt_rtx":
        names += [IRuntimeCache, IRuntimeConfig, DynamicShapesKernelSpecializationStrategy]
    vars(trt).update({part.__name__: part for part in names}, __version__=VERSION, get_plugin_registry=IPluginRegistry)
    bindings: Any = types.ModuleType("cuda.bindings")
    bindings.runtime = cuda
    for other in ("tensorrt", "tensorrt_rtx"):
        patch.setitem(sys.modules, other, trt if other == library else None)
    for name, module in (
        ("cuda", types.ModuleType("cuda")),
        ("cuda.bindings", bindings),
        ("cuda.bindings.runtime", cuda),
    ):
        patch.setitem(sys.modules, name, module)
    simulated_nccl.install(patch)
    return cuda
