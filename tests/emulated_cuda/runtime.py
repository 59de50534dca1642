"""cuda-python's runtime API over the emulated CUDA runtime (cudart.c), as far as fly_trt/engines/cuda.py calls it, so
that fly_trt and ONNX Runtime use one and the same CUDA in a process.
"""

import ctypes
import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

LIBRARY = ctypes.CDLL("libcudart.so.13")
COUNTERS = ("launches", "captured_launches", "captures", "graphs", "graph_launches", "host_copies", "faults")
cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)  # noqa: N816
cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)  # noqa: N816
cudaStreamNonBlocking = 1  # noqa: N816


class Error(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInvalidDevice = 101  # noqa: N815
    cudaErrorStreamCaptureUnsupported = 900  # noqa: N815


def _number(name: str) -> Any:
    return ctypes.c_long.in_dll(LIBRARY, f"emulated_{name}")


def counters() -> dict[str, int]:
    return {name: _number(name).value for name in COUNTERS}


def take_largest_device_copy() -> int:
    """Bytes of the largest copy within the device since the last call."""
    number = _number("largest_device_copy")
    found, number.value = number.value, 0
    return int(found)


def last_fault() -> str:
    return ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(LIBRARY, "emulated_last_fault"))).decode()


def _call(name: str, *arguments: Any) -> tuple[Error]:
    numbers = [argument if hasattr(argument, "contents") else ctypes.c_size_t(int(argument)) for argument in arguments]
    return (Error(getattr(LIBRARY, name)(*numbers)),)


def _made(name: str, *arguments: Any) -> tuple[Error, int]:
    """Of a function that writes what it made to its first argument."""
    made = ctypes.c_size_t()
    error = getattr(LIBRARY, name)(ctypes.byref(made), *(ctypes.c_size_t(int(argument)) for argument in arguments))
    return Error(error), made.value


def cudaGetDeviceCount() -> tuple[Error, int]:
    return _made("cudaGetDeviceCount")


def cudaGetDevice() -> tuple[Error, int]:
    return _made("cudaGetDevice")


def cudaSetDevice(device: int) -> tuple[Error]:
    return _call("cudaSetDevice", device)


def cudaDeviceGetAttribute(attribute: int, device: int) -> tuple[Error, int]:
    return _made("cudaDeviceGetAttribute", attribute, device)


def cudaMalloc(size: int) -> tuple[Error, int]:
    return _made("cudaMalloc", size)


def cudaMallocHost(size: int) -> tuple[Error, int]:
    return _made("cudaMallocHost", size)


def cudaFree(address: int) -> tuple[Error]:
    return _call("cudaFree", address)


def cudaFreeHost(address: int) -> tuple[Error]:
    return _call("cudaFreeHost", address)


def cudaStreamCreateWithFlags(flags: int) -> tuple[Error, int]:
    return _made("cudaStreamCreateWithFlags", flags)


def cudaStreamDestroy(stream: int) -> tuple[Error]:
    return _call("cudaStreamDestroy", stream)


def cudaStreamSynchronize(stream: int) -> tuple[Error]:
    return _call("cudaStreamSynchronize", stream)


def cudaMemcpyAsync(target: int, source: int, size: int, kind: int, stream: int) -> tuple[Error]:
    return _call("cudaMemcpyAsync", target, source, size, kind, stream)


def cudaMemcpy2DAsync(*arguments: int) -> tuple[Error]:
    return _call("cudaMemcpy2DAsync", *arguments)


def cudaMemsetAsync(address: int, value: int, size: int, stream: int) -> tuple[Error]:
    return _call("cudaMemsetAsync", address, value, size, stream)


def install() -> None:
    """Makes this the process's cuda-python."""
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = sys.modules[__name__]
    sys.modules |= {"cuda": ModuleType("cuda"), "cuda.bindings": bindings, "cuda.bindings.runtime": bindings.runtime}
