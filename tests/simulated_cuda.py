"""cuda-python's runtime API without a GPU, as far as fly_trt calls it; simulated_tensorrt.py runs engines on it.

Device memory is host memory, filled with ones so that what was never written reads as NaN. Work put on a stream waits
for a synchronisation, or is recorded by a capture and repeated by graph launches. What a GPU would answer with an error
or with silent corruption ends up in `faults`: memory that is foreign, freed or too short, an allocation or a
synchronisation while capturing. Names and conventions are those of `cuda.bindings.runtime`.
"""

# ruff: noqa: N815

import bisect
import enum
import functools
import re
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ALIGNMENT = 256
UNWRITTEN = 0xFF
Error = enum.IntEnum(
    "cudaError_t",
    {
        "cudaSuccess": 0,
        "cudaErrorInvalidValue": 1,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorNoDevice": 100,
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
    is_device: bool
    content: np.ndarray

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
    queue: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    is_capture_valid: bool = True


def _api(function: Callable[..., Any]) -> Callable[..., Any]:
    """Counts the call and gives cuda-python's tuple: the error, and the value where the function has one."""

    @functools.wraps(function)
    def call(cuda: "SimulatedCuda", *arguments: Any) -> tuple[Any, ...]:
        cuda.calls[function.__name__] += 1
        error, value = Error.cudaSuccess, None
        try:
            if (refused := cuda.refused.get(function.__name__)) is not None:
                raise Failure(refused)
            if cuda.fatal_error is not None and not re.search("Free|Destroy", function.__name__):
                raise Failure(cuda.fatal_error)
            value = function(cuda, *arguments)
        except Failure as failure:
            error = cuda.last_error = failure.error
            if failure.reason:
                cuda.faults.append(f"{function.__name__}: {failure.reason}")
        return (error,) if function.__annotations__["return"] is None else (error, value)

    return call


class SimulatedCuda:
    """`cuda.bindings.runtime`: what begins with "cuda" is its API. The rest is for tests.

    `calls` counts calls by name, `copies` finished copies by direction; `refused` makes a call fail, and `free_bytes`
    is how much device memory there is.
    """

    cudaError_t = Error
    cudaStreamNonBlocking = 1
    cudaDeviceAttr = enum.IntEnum(
        "cudaDeviceAttr", {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76}
    )
    cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyDefault": 4})
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})

    def __init__(self) -> None:
        self.compute_capability = (9, 0)
        self.num_devices = 1
        self.free_bytes = 1 << 40
        self.captures_of_engines = "succeed"  # or "are refused", or "are spoiled" without a word
        self.refused: dict[str, Error] = {}
        self.last_error = Error.cudaSuccess  # until cudaGetLastError; TensorRT takes it for an error of its own
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
        target = self.stream(stream)
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

    def refuse_while_capturing(self) -> None:
        capturing = [stream for stream in self.streams.values() if stream.captured is not None]
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
        return 0

    @_api
    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> int:
        return self.compute_capability[self.cudaDeviceAttr(attr) - self.cudaDeviceAttr(75)]

    @_api
    def cudaGetLastError(self) -> None:
        self.last_error = Error.cudaSuccess

    @_api
    def cudaMalloc(self, size: int) -> int:
        if size > self.free_bytes:
            raise Failure(Error.cudaErrorMemoryAllocation)
        self.free_bytes -= size
        return self._allocate(size, is_device=True)

    @_api
    def cudaMallocHost(self, size: int) -> int:
        return self._allocate(size, is_device=False)

    @_api
    def cudaFree(self, devPtr: int) -> None:
        self.free_bytes += self._free(devPtr, is_device=True)

    @_api
    def cudaFreeHost(self, ptr: int) -> None:
        self._free(ptr, is_device=False)

    def _allocate(self, size: int, *, is_device: bool) -> int:
        self.refuse_while_capturing()
        memory = np.full(size + ALIGNMENT, UNWRITTEN, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        content = memory[address - memory.ctypes.data :][:size]
        self.allocations[address] = Allocation(address, size, is_device, content)
        bisect.insort(self._addresses, address)
        return address

    def _free(self, address: int, *, is_device: bool) -> int:
        self.refuse_while_capturing()
        found = self.allocations.get(address)
        if found is None or found.is_device != is_device:
            raise Failure(Error.cudaErrorInvalidValue, f"{address:#x} was not allocated, or freed before")
        del self.allocations[address]
        self._addresses.remove(address)
        found.content[:] = UNWRITTEN
        self._freed.append(found.content)
        return found.size

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
        self.enqueue(stream, Work(lambda: self.view(devPtr, count).fill(value)))

    @_api
    def cudaStreamCreateWithFlags(self, flags: int) -> Handle:
        handle = Handle(0x5000 + 16 * self.calls["cudaStreamCreateWithFlags"])
        self.streams[int(handle)] = Stream()
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
        capturing = self.stream(stream)
        capturing.captured, capturing.is_capture_valid = [], True

    @_api
    def cudaStreamEndCapture(self, stream: Any) -> Handle:
        capturing = self.stream(stream)
        captured, capturing.captured = capturing.captured, None
        if captured is None or not capturing.is_capture_valid:
            raise Failure(Error.cudaErrorStreamCaptureInvalidated)
        return self._keep(self.graphs, captured)

    @_api
    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> Handle:
        return self._keep(self.executables, list(self._look_up(self.graphs, graph)))

    @_api
    def cudaGraphLaunch(self, graphExec: Handle, stream: Any) -> None:
        works = self._look_up(self.executables, graphExec)
        launching = self.stream(stream)
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
