"""cuda-python's runtime API without a GPU, as far as fly_trt calls it; simulated_tensorrt.py runs engines on it.

Device memory is host memory, filled with ones so that what was never written reads as NaN. Work put on a stream waits
for a synchronisation, or is recorded by a capture and repeated by graph launches. What a GPU would answer with an error
or with silent corruption ends up in `faults`: memory that is foreign, freed or too short, an allocation or a
synchronisation while capturing, work for a device that is not the thread's current one. Any number of threads may use
any number of devices. Names and conventions are those of `cuda.bindings.runtime`.
"""

# ruff: noqa: N815

import bisect
import enum
import functools
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

ALIGNMENT = 256
UNWRITTEN = 0xFF
WITHOUT_CONTEXT = {"cudaGetDeviceCount", "cudaGetDevice", "cudaDeviceGetAttribute", "cudaGetLastError"}
Error = enum.IntEnum(
    "cudaError_t",
    {
        "cudaSuccess": 0,
        "cudaErrorInvalidValue": 1,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorNoDevice": 100,
        "cudaErrorInvalidDevice": 101,
        "cudaErrorInvalidResourceHandle": 400,
        "cudaErrorIllegalAddress": 700,
        "cudaErrorLaunchFailure": 719,
        "cudaErrorStreamCaptureUnsupported": 900,
        "cudaErrorStreamCaptureInvalidated": 901,
    },
)


class Failure(Exception):  # noqa: N818
    """An error code, and what was done wrong; no reason where nothing was."""

    def __init__(self, error: Error, reason: str = "") -> None:
        self.error, self.reason = error, reason


@dataclass
class Allocation:
    address: int
    size: int
    device: int | None
    content: np.ndarray

    @property
    def is_device(self) -> bool:
        return self.device is not None

    def bytes(self, address: int, size: int) -> np.ndarray:
        return self.content[address - self.address :][:size]


@dataclass(eq=False)
class Handle:
    """An opaque handle, which has a number as cuda-python's have."""

    number: int

    def __int__(self) -> int:
        return self.number


@dataclass
class Work:
    """Something a stream does; `scratch` is the memory that it needs for itself meanwhile."""

    run: Callable[[], None]
    scratch: int | None = None


@dataclass
class Stream:
    device: int
    queue: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    capturing_thread: int | None = None
    is_capture_valid: bool = True


class Thread(threading.local):
    """What CUDA keeps for each host thread: its device, and the last error until cudaGetLastError takes it."""

    device = 0
    last_error = Error.cudaSuccess


def _api(function: Callable[..., Any]) -> Callable[..., Any]:
    """Counts the call and gives cuda-python's tuple: the error, and the value where the function has one."""

    name = function.__name__

    @functools.wraps(function)
    def call(cuda: "SimulatedCuda", *arguments: Any) -> tuple[Any, ...]:
        error, value = Error.cudaSuccess, None
        with cuda.lock:
            cuda.calls[name] += 1
            try:
                if (refused := cuda.refused.get(name)) is not None:
                    raise Failure(refused)
                if cuda.fatal_error is not None and not re.search("Free|Destroy|GetDevice$", name):
                    raise Failure(cuda.fatal_error)
                value = function(cuda, *arguments)
            except Failure as failure:
                error = cuda.thread.last_error = failure.error
                if failure.reason:
                    cuda.faults.append(f"{name}: {failure.reason}")
            if name not in WITHOUT_CONTEXT and not error:
                cuda.used_devices.add(cuda.thread.device)
        return (error,) if function.__annotations__["return"] is None else (error, value)

    return call


class SimulatedCuda:
    """`cuda.bindings.runtime`: what begins with "cuda" is its API. The rest is for tests.

    `calls` counts calls by name, `copies` finished copies by direction; `refused` makes a call fail, and `free_bytes`
    is how much memory each device has. `used_devices` are those that CUDA made a context on, which takes memory:
    all that were current in a call but those that only ask.
    """

    cudaError_t = Error
    cudaStreamNonBlocking = 1
    cudaDeviceAttr = enum.IntEnum(
        "cudaDeviceAttr", {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76}
    )
    cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyDefault": 4})
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.thread = Thread()
        self.compute_capability = (8, 9)
        self.compute_capabilities: dict[int, tuple[int, int]] = {}  # of devices that have another one
        self.num_devices = 1
        self.used_devices: set[int] = set()
        self.free_bytes = 1 << 40
        self.captures_of_engines = "succeed"  # or "are refused", or "are spoiled" without a word
        self.refused: dict[str, Error] = {}
        self.fatal_error: Error | None = None  # of work that failed; from then on most calls do
        self.faults: list[str] = []
        self.calls: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.allocations: dict[int, Allocation] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[Handle, list[Work]] = {}
        self.executables: dict[Handle, list[Work]] = {}
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self._addresses: list[int] = []
        self._freed: list[np.ndarray] = []  # kept, so that no address is given out twice

    def find(self, address: int, size: int) -> Allocation:
        """The live allocation that holds this range."""
        index = bisect.bisect_right(self._addresses, address) - 1
        found = self.allocations[self._addresses[index]] if index >= 0 else None
        if found is None or address + size > found.address + found.size:
            raise Failure(Error.cudaErrorIllegalAddress, f"{size} bytes at {address:#x} lie in no live allocation")
        return found

    def view(self, address: int, size: int) -> np.ndarray:
        return self.find(address, size).bytes(address, size)

    def enqueue(self, stream: Any, work: Work) -> None:
        target = self.current_stream(stream)
        if target.captured is not None:
            target.captured.append(work)
            return
        self.check_scratch(target, [work])
        target.queue.append(work)

    def check_scratch(self, stream: Stream, works: list[Work]) -> None:
        wanted = {work.scratch for work in works} - {None}
        for other in self.streams.values():
            if other is not stream and wanted & {work.scratch for work in other.queue}:
                raise Failure(Error.cudaErrorLaunchFailure, "two streams use one scratch memory at the same time")

    def stream(self, handle: Any) -> Stream:
        if int(handle) not in self.streams:
            raise Failure(Error.cudaErrorInvalidResourceHandle, "no such stream")
        return self.streams[int(handle)]

    def current_stream(self, handle: Any) -> Stream:
        """A stream to put work on. CUDA takes copies also while another device is current; whoever needs that has most
        likely forgotten to choose the device, so here it is refused like the rest."""
        stream = self.stream(handle)
        if stream.device != self.thread.device:
            raise Failure(Error.cudaErrorInvalidResourceHandle, self.describe(stream.device, "stream"))
        return stream

    def describe(self, device: int, what: str) -> str:
        return f"a {what} of device {device} while device {self.thread.device} is current"

    def refuse_while_capturing(self) -> None:
        """By this thread: captures in ThreadLocal mode do not see what other threads do."""
        here = threading.get_ident()
        capturing = [stream for stream in self.streams.values() if stream.capturing_thread == here]
        for stream in capturing:
            stream.is_capture_valid = False
        if capturing:
            raise Failure(Error.cudaErrorStreamCaptureUnsupported, "not allowed while a stream captures")

    @_api
    def cudaGetDeviceCount(self) -> int:
        if not self.num_devices:
            raise Failure(Error.cudaErrorNoDevice)
        return self.num_devices

    @_api
    def cudaGetDevice(self) -> int:
        return self.thread.device

    @_api
    def cudaSetDevice(self, device: int) -> None:
        if not 0 <= device < self.num_devices:
            raise Failure(Error.cudaErrorInvalidDevice)
        self.thread.device = device

    @_api
    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> int:
        capability = self.compute_capabilities.get(device, self.compute_capability)
        return capability[self.cudaDeviceAttr(attr) - self.cudaDeviceAttr(75)]

    @_api
    def cudaGetDeviceProperties(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(name=f"Simulated GPU {device}".encode() + bytes(8))

    @_api
    def cudaGetLastError(self) -> None:
        self.thread.last_error = Error.cudaSuccess

    @_api
    def cudaMalloc(self, size: int) -> int:
        device = self.thread.device
        if size > self.free_bytes - sum(found.size for found in self.allocations.values() if found.device == device):
            raise Failure(Error.cudaErrorMemoryAllocation)
        return self._allocate(size, device)

    @_api
    def cudaMallocHost(self, size: int) -> int:
        return self._allocate(size, None)

    @_api
    def cudaFree(self, devPtr: int) -> None:
        self._free(devPtr, is_device=True)

    @_api
    def cudaFreeHost(self, ptr: int) -> None:
        self._free(ptr, is_device=False)

    def _allocate(self, size: int, device: int | None) -> int:
        self.refuse_while_capturing()
        memory = np.full(size + ALIGNMENT, UNWRITTEN, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        content = memory[address - memory.ctypes.data :][:size]
        self.allocations[address] = Allocation(address, size, device, content)
        bisect.insort(self._addresses, address)
        return address

    def _free(self, address: int, *, is_device: bool) -> None:
        self.refuse_while_capturing()
        found = self.allocations.get(address)
        if found is None or found.is_device != is_device:
            raise Failure(Error.cudaErrorInvalidValue, f"{address:#x} was not allocated, or freed before")
        del self.allocations[address]
        self._addresses.remove(address)
        found.content[:] = UNWRITTEN
        self._freed.append(found.content)

    @_api
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> None:
        self._copy(dst, count, src, count, count, 1, kind, stream)

    @_api
    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> None:
        self._copy(dst, dpitch, src, spitch, width, height, kind, stream)

    def _copy(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> None:
        if kind is not self.cudaMemcpyKind.cudaMemcpyDefault or width > min(dpitch, spitch):
            raise Failure(Error.cudaErrorInvalidValue, f"rows of {width} bytes, pitches {dpitch} and {spitch}")

        def run() -> None:
            ends = [(address, (height - 1) * pitch + width, pitch) for address, pitch in ((dst, dpitch), (src, spitch))]
            places = ["device" if self.find(address, size).is_device else "host" for address, size, _ in ends]
            rows = [
                np.lib.stride_tricks.as_strided(self.view(address, size), (height, width), (pitch, 1))
                for address, size, pitch in ends
            ]
            rows[0][:] = rows[1]
            self.copies[f"{places[1]} to {places[0]}"] += 1

        self.enqueue(stream, Work(run))

    @_api
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> None:
        def run() -> None:
            if self.find(devPtr, count).device != device:
                raise Failure(Error.cudaErrorIllegalAddress, f"{devPtr:#x} is no memory of device {device}")
            self.view(devPtr, count).fill(value)

        device = self.stream(stream).device
        self.enqueue(stream, Work(run))

    @_api
    def cudaStreamCreateWithFlags(self, flags: int) -> Handle:
        handle = Handle(0x5000 + 16 * self.calls["cudaStreamCreateWithFlags"])
        self.streams[int(handle)] = Stream(self.thread.device)
        return handle

    @_api
    def cudaStreamDestroy(self, stream: Any) -> None:
        if self.stream(stream).queue:
            raise Failure(Error.cudaErrorInvalidResourceHandle, "destroyed with work that nobody waited for")
        del self.streams[int(stream)]

    @_api
    def cudaStreamSynchronize(self, stream: Any) -> None:
        self.refuse_while_capturing()
        waiting = self.stream(stream)
        queue, waiting.queue = waiting.queue, []
        try:
            for work in queue:
                work.run()
        except Failure as failure:
            self.fatal_error = failure.error
            raise

    @_api
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        if mode is not self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal:
            raise Failure(Error.cudaErrorInvalidValue, f"capture mode {mode}")
        capturing = self.current_stream(stream)
        capturing.captured, capturing.is_capture_valid = [], True
        capturing.capturing_thread = threading.get_ident()

    @_api
    def cudaStreamEndCapture(self, stream: Any) -> Handle:
        capturing = self.stream(stream)
        captured, capturing.captured, capturing.capturing_thread = capturing.captured, None, None
        if captured is None or not capturing.is_capture_valid:
            raise Failure(Error.cudaErrorStreamCaptureInvalidated)
        return self._keep(self.graphs, captured)

    @_api
    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> Handle:
        return self._keep(self.executables, list(self._look_up(self.graphs, graph)))

    @_api
    def cudaGraphLaunch(self, graphExec: Handle, stream: Any) -> None:
        works = self._look_up(self.executables, graphExec)
        launching = self.current_stream(stream)
        self.check_scratch(launching, works)
        launching.queue += works

    @_api
    def cudaGraphDestroy(self, graph: Handle) -> None:
        self._look_up(self.graphs, graph)
        del self.graphs[graph]

    @_api
    def cudaGraphExecDestroy(self, graphExec: Handle) -> None:
        self._look_up(self.executables, graphExec)
        del self.executables[graphExec]

    def _keep(self, table: dict[Handle, list[Work]], works: list[Work]) -> Handle:
        handle = Handle(len(table))
        table[handle] = works
        return handle

    def _look_up(self, table: dict[Handle, list[Work]], handle: Handle) -> list[Work]:
        if handle not in table:
            raise Failure(Error.cudaErrorInvalidResourceHandle, "no such graph, or destroyed before")
        return table[handle]
