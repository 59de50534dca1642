"""What the engines of a GPU need of CUDA: device and pinned memory, one stream, copies, captured graphs.

A thin layer over cuda-python's runtime bindings: every call is checked and raises EngineError with CUDA's own name for
the error. It knows nothing of engines. Memory, streams and work belong to the device that is current in the calling
thread; `use_device` makes it so.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fly_trt.errors import ConfigError, EngineError

Bytes = npt.NDArray[np.uint8]


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError(
            f"{error.name or error}: not installed: pip install 'fly-trt[tensorrt]' (or 'fly-trt[tensorrt-rtx]', or "
            "'fly-trt[cuda]')"
        ) from None
    return runtime


def _check(result: tuple[Any, ...], device: int | None = None) -> Any:
    """The value of a CUDA call's (error, value, ...), which is about the current device unless `device` is given."""
    error, *values = result
    if error.value:
        if device is None:
            _, device = _runtime().cudaGetDevice()
        raise EngineError(
            f"CUDA: {error.name}: see nvidia-smi for the driver and the memory that is free on device {device}"
        )
    return values[0] if values else None


def _num_devices() -> int:
    error, count = _runtime().cudaGetDeviceCount()
    if error.value or not count:
        raise EngineError(
            f"no CUDA device ({error.name}): run on a machine with one, or build for the CPU: --device cpu"
        )
    return int(count)


def choose_device(device_id: int | None) -> int:
    """The device of that number, or the calling thread's current one for None; the thread's current one from now on.

    Raises ConfigError for a device that does not exist and EngineError where there is none or it cannot be used.
    """
    count = _num_devices()
    device = int(_check(_runtime().cudaGetDevice())) if device_id is None else device_id
    _check_device(device, count, "a device_id")
    use_device(device)
    return device


def check_devices(devices: Sequence[int]) -> None:
    """Raises ConfigError for one that does not exist, and EngineError where there is none."""
    count = _num_devices()
    for device in devices:
        _check_device(device, count, "devices")


def _check_device(device: int, count: int, what: str) -> None:
    if not 0 <= device < count:
        known = "1 CUDA device (0)" if count == 1 else f"{count} CUDA devices (0 to {count - 1})"
        raise ConfigError(
            f"device {device}: this machine has {known}: give {what} that it has, or change CUDA_VISIBLE_DEVICES"
        )


def use_device(device: int) -> None:
    """Makes `device` the calling thread's current one, which costs next to nothing where it is that already.

    The one before is not restored: setting a device makes a context on it, hundreds of MB, where the process has none
    yet. A process that uses one GPU would so take memory of device 0 as well, once for each instance of a server.
    """
    _check(_runtime().cudaSetDevice(device), device)


def compute_capability() -> str:
    """Of the current device, such as "9.0". Raises EngineError where there is none."""
    _num_devices()
    runtime = _runtime()
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


def device_name() -> str:
    """Of the current device, such as "NVIDIA H200". Raises EngineError where there is none."""
    _num_devices()
    runtime = _runtime()
    properties = _check(runtime.cudaGetDeviceProperties(_check(runtime.cudaGetDevice())))
    return bytes(properties.name).split(b"\0")[0].decode(errors="replace")


def _free_with(owner: object, free: Callable[[Any], Any], what: Any) -> None:
    """Not at the interpreter's end, where the newest would go first, before the engines that still use it are closed:
    what is left then goes with the process."""
    weakref.finalize(owner, free, what).atexit = False


class DeviceBuffer:
    """`num_bytes` of device memory at `address`, freed with the object. cudaMalloc aligns it to 256 bytes.

    Like all that is freed here it is found by its address, whatever device is current where the last reference goes; a
    garbage collector must not change the device of the thread that it happens to run in.
    """

    def __init__(self, num_bytes: int) -> None:
        runtime = _runtime()
        self.num_bytes = num_bytes
        self.address: int = int(_check(runtime.cudaMalloc(max(num_bytes, 1))))
        _free_with(self, runtime.cudaFree, self.address)


class PinnedBuffer:
    """`num_bytes` of page-locked host memory; `array` uint8 [num_bytes] views it and keeps it alive."""

    def __init__(self, num_bytes: int) -> None:
        runtime = _runtime()
        self.address: int = int(_check(runtime.cudaMallocHost(max(num_bytes, 1))))
        memory = (ctypes.c_uint8 * num_bytes).from_address(self.address)
        _free_with(memory, runtime.cudaFreeHost, self.address)
        self.array: Bytes = np.ctypeslib.as_array(memory)
        self.array[:] = 0


class Graph:
    """Work that was captured from a stream and is launched as one."""

    def __init__(self, runtime: Any, executable: Any, stream: int) -> None:
        self._runtime = runtime
        self._executable = executable
        self._stream = stream
        _free_with(self, runtime.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        _check(self._runtime.cudaGraphLaunch(self._executable, self._stream))


class Stream:
    """A CUDA stream; everything but `synchronize` is asynchronous. `handle` is its address."""

    def __init__(self) -> None:
        self._runtime = runtime = _runtime()
        stream = _check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.handle = int(stream)
        _free_with(self, runtime.cudaStreamDestroy, self.handle)

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

    def clear(self, address: int, num_bytes: int) -> None:
        """Zeroes device memory."""
        _check(self._runtime.cudaMemsetAsync(address, 0, num_bytes, self.handle))

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

    def end_capture(self) -> None:
        """Makes the stream usable again where somebody else's capture failed and was left open."""
        error, graph = self._runtime.cudaStreamEndCapture(self.handle)
        if not error.value and graph is not None:
            self._runtime.cudaGraphDestroy(graph)
        self._runtime.cudaGetLastError()
