"""What the TensorRT engine needs of CUDA: device and pinned memory, one stream, copies, captured graphs.

A thin layer over cuda-python's runtime bindings: every call is checked and raises EngineError with CUDA's own name for
the error. It knows nothing of engines. The device is the process's current one; CUDA_VISIBLE_DEVICES chooses it.
"""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fly_trt.errors import EngineError

Bytes = npt.NDArray[np.uint8]


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError(
            f"{error.name or error}: not installed: pip install 'fly-trt[tensorrt]' (or 'fly-trt[tensorrt-rtx]')"
        ) from None
    return runtime


def _check(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call's (error, value, ...)."""
    error, *values = result
    if error.value:
        raise EngineError(f"CUDA: {error.name}: see nvidia-smi for the driver and the memory that is free")
    return values[0] if values else None


def compute_capability() -> str:
    """Of the current device, such as "9.0". Raises EngineError where there is none."""
    runtime = _runtime()
    error, count = runtime.cudaGetDeviceCount()
    if error.value or not count:
        raise EngineError(f"no CUDA device ({error.name}): run on a machine with one, or build for onnxruntime")
    device = _check(runtime.cudaGetDevice())
    attributes = runtime.cudaDeviceAttr
    major, minor = (
        _check(runtime.cudaDeviceGetAttribute(attribute, device))
        for attribute in (
            attributes.cudaDevAttrComputeCapabilityMajor,
            attributes.cudaDevAttrComputeCapabilityMinor,
        )
    )
    return f"{major}.{minor}"


class DeviceBuffer:
    """`num_bytes` of device memory at `address`, freed with the object. cudaMalloc aligns it to 256 bytes."""

    def __init__(self, num_bytes: int) -> None:
        runtime = _runtime()
        self.num_bytes = num_bytes
        self.address: int = int(_check(runtime.cudaMalloc(max(num_bytes, 1))))
        weakref.finalize(self, runtime.cudaFree, self.address)


class PinnedBuffer:
    """`num_bytes` of page-locked host memory; `array` uint8 [num_bytes] views it and keeps it alive."""

    def __init__(self, num_bytes: int) -> None:
        runtime = _runtime()
        self.address: int = int(_check(runtime.cudaMallocHost(max(num_bytes, 1))))
        memory = (ctypes.c_uint8 * num_bytes).from_address(self.address)
        weakref.finalize(memory, runtime.cudaFreeHost, self.address)
        self.array: Bytes = np.ctypeslib.as_array(memory)
        self.array[:] = 0


class Graph:
    """Work that was captured from a stream and is launched as one."""

    def __init__(self, runtime: Any, executable: Any, stream: int) -> None:
        self._runtime = runtime
        self._executable = executable
        self._stream = stream
        weakref.finalize(self, runtime.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        _check(self._runtime.cudaGraphLaunch(self._executable, self._stream))


class Stream:
    """A CUDA stream; everything but `synchronize` is asynchronous. `handle` is its address."""

    def __init__(self) -> None:
        self._runtime = runtime = _runtime()
        stream = _check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.handle = int(stream)
        weakref.finalize(self, runtime.cudaStreamDestroy, self.handle)

    def synchronize(self) -> None:
        _check(self._runtime.cudaStreamSynchronize(self.handle))

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Between any two addresses, host (pinned) or device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        _check(self._runtime.cudaMemcpyAsync(target, source, num_bytes, kind, self.handle))

    def copy_rows(self, target: tuple[int, int], source: tuple[int, int], row_bytes: int, num_rows: int) -> None:
        """`num_rows` rows of `row_bytes` each; `target` and `source` are (address, bytes from row to row)."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        _check(self._runtime.cudaMemcpy2DAsync(*target, *source, row_bytes, num_rows, kind, self.handle))

    def clear(self, buffer: DeviceBuffer) -> None:
        _check(self._runtime.cudaMemsetAsync(buffer.address, 0, buffer.num_bytes, self.handle))

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what `work` puts on this stream, without running it. Raises EngineError where that is not allowed;
        the stream is usable again afterwards."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _check(runtime.cudaStreamBeginCapture(self.handle, mode))
        graph = None
        try:
            try:
                work()
            finally:
                error, graph = runtime.cudaStreamEndCapture(self.handle)
            _check((error,))
            executable = _check(runtime.cudaGraphInstantiate(graph, 0))
        except BaseException:
            runtime.cudaGetLastError()  # or TensorRT would take the failure for one of its own
            raise
        finally:
            if graph is not None:
                runtime.cudaGraphDestroy(graph)
        return Graph(runtime, executable, self.handle)
