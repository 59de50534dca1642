"""The plugins' kernels as Python functions over NumPy arrays: built with nvcc for a GPU or with g++ for the CPU.

It knows the launch functions' arguments and where their memory lives. It knows neither TensorRT nor what the right
results are. On a GPU, torch holds the memory.
"""

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PLUGINS = Path(__file__).resolve().parents[1]
SOURCES = (
    "entropy_gate/entropy_gate.cu",
    "loose_window_accept/loose_window_accept.cu",
    "packed_accept/packed_accept.cu",
    "check/c_api.cpp",
)
CPU_FLAGS = "-std=c++17 -O2 -Wall -Wextra -Werror -Wno-unknown-pragmas -U_FORTIFY_SOURCE -DFLY_ON_CPU -shared -fPIC"
GPU_FLAGS = "-std=c++17 -O3 -Werror all-warnings -Xcompiler -Wall,-Wextra,-fPIC -shared"

# Bfloat16 has no type in NumPy: its bits are kept as uint16.
LOGITS_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}
GATE_OUTPUTS = {
    "argmax": np.int64,
    "entropy": np.float32,
    "entropy_topk": np.float32,
    "argmax_logprob": np.float32,
    "token_logprob": np.float32,
    "top_ids": np.int64,
    "top_logprobs": np.float32,
}
TOP_OUTPUTS = frozenset({"top_ids", "top_logprobs"})  # these have top_k numbers for each row, the others have one
ACCEPT_INPUTS = {
    "next_tokens": np.int64,
    "argmax": np.int64,
    "entropy": np.float32,
    "entropy_topk": np.float32,
    "num_context": np.int64,
    "num_draft": np.int64,
    "entropy_threshold": np.float32,
    "use_full_entropy": np.int32,
    "window": np.int64,
    "lookahead": np.int64,
    "stop_token_ids": np.int64,
}
ACCEPT_OUTPUTS = {"num_accepted": np.int64, "next_token": np.int64}
MAX_PACKED_STOP_TOKENS = 64
_WORKSPACE_ALIGNMENT = 256
_GARBAGE = 0xFF  # as float32 and as any type of logits a NaN, as int64 -1


class NoCompilerError(SystemExit):
    """What the kernels would be built with is not installed."""


class GateArgs(ctypes.Structure):
    """fly::EntropyGateArgs."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("logits_type", ctypes.c_int32),
        ("num_rows", ctypes.c_int64),
        ("vocab_size", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("next_tokens", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in GATE_OUTPUTS),
    ]


class AcceptArgs(ctypes.Structure):
    """fly::LooseWindowAcceptArgs."""

    _fields_ = [
        ("batch_size", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("num_stop_tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ACCEPT_INPUTS),
        *((name, ctypes.c_void_p) for name in ACCEPT_OUTPUTS),
    ]


class PackedArgs(ctypes.Structure):
    """fly::PackedLooseAcceptArgs."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("rewritten", ctypes.c_void_p),
        ("logits_type", ctypes.c_int32),
        ("num_rows", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("num_sequences", ctypes.c_int64),
        ("row_size", ctypes.c_int32),
        ("vocab_size", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("last_token_ids", ctypes.c_void_p),
        ("input_ids", ctypes.c_void_p),
        ("context_lengths", ctypes.c_void_p),
        ("entropy_threshold", ctypes.c_float),
        ("use_full_entropy", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("lookahead", ctypes.c_int32),
        ("num_stop_tokens", ctypes.c_int32),
        ("stop_token_ids", ctypes.c_int32 * MAX_PACKED_STOP_TOKENS),
    ]


@dataclass(frozen=True)
class PackedStep:
    """The device tensors of one step of a TensorRT-LLM engine: logits [R, V] as for entropy_gate, the others int32."""

    logits: Array
    last_token_ids: Array  # [R]
    input_ids: Array  # [T]
    context_lengths: Array  # [S]


@dataclass(frozen=True)
class PackedPolicy:
    """PackedLooseAccept's fields; a vocab_size of 0 is that of the rows."""

    entropy_threshold: float = 0.3
    use_full_entropy: bool = False
    entropy_top_k: int = 3
    window: int = 6
    lookahead: int = 5
    vocab_size: int = 0
    stop_token_ids: tuple[int, ...] = ()


class Memory(Protocol):
    """Bytes where the kernels can reach them. A buffer begins `offset` bytes after a multiple of 256."""

    stream: int | None

    def upload(self, array: Array, offset: int = 0) -> Any: ...

    def pointer(self, buffer: Any) -> int: ...

    def download(self, buffer: Any, dtype: npt.DTypeLike) -> Array: ...


class CpuMemory:
    stream = None

    def upload(self, array: Array, offset: int = 0) -> Array:
        storage = np.full(array.nbytes + offset + _WORKSPACE_ALIGNMENT, _GARBAGE, np.uint8)
        start = -storage.ctypes.data % _WORKSPACE_ALIGNMENT + offset
        buffer = storage[start : start + array.nbytes]
        buffer[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return buffer

    def pointer(self, buffer: Array) -> int:
        return int(buffer.ctypes.data)

    def download(self, buffer: Array, dtype: npt.DTypeLike) -> Array:
        return np.frombuffer(buffer.tobytes(), dtype)


class GpuMemory:
    def __init__(self) -> None:
        try:
            import torch
        except ImportError:
            raise SystemExit("torch is not installed: the GPU check needs it for memory; --cpu does without") from None
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no CUDA device: --cpu checks the kernels without one")
        self.torch = torch

    @property
    def stream(self) -> int:
        return int(self.torch.cuda.current_stream().cuda_stream)

    def upload(self, array: Array, offset: int = 0) -> Any:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        storage = self.torch.full((len(data) + offset,), _GARBAGE, dtype=self.torch.uint8, device="cuda")
        storage[offset:] = self.torch.from_numpy(data.copy()).cuda()
        return storage[offset:]

    def pointer(self, buffer: Any) -> int:
        return int(buffer.data_ptr())

    def download(self, buffer: Any, dtype: npt.DTypeLike) -> Array:
        self.torch.cuda.synchronize()
        return np.frombuffer(buffer.cpu().numpy().tobytes(), dtype)


class Kernels:
    """The kernels of a built library. Every call gets fresh output buffers and a fresh workspace, full of garbage."""

    def __init__(self, library: Path, memory: Memory) -> None:
        self.memory = memory
        self.library = ctypes.CDLL(str(library))
        self.library.flyEntropyGateWorkspaceBytes.restype = ctypes.c_size_t
        self.library.flyEntropyGateWorkspaceBytes.argtypes = [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self.library.flyEntropyGate.argtypes = [ctypes.POINTER(GateArgs), pointer, size, pointer]
        self.library.flyLooseWindowAccept.argtypes = [ctypes.POINTER(AcceptArgs), pointer]
        self.library.flyPackedLooseAcceptWorkspaceBytes.restype = ctypes.c_size_t
        self.library.flyPackedLooseAcceptWorkspaceBytes.argtypes = [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
        self.library.flyPackedLooseAccept.argtypes = [ctypes.POINTER(PackedArgs), pointer, size, pointer]

    def workspace_bytes(self, num_rows: int, vocab_size: int, top_k: int) -> int:
        return int(self.library.flyEntropyGateWorkspaceBytes(num_rows, vocab_size, top_k))

    def launch_entropy_gate(self, args: GateArgs, workspace: int | None, workspace_bytes: int) -> int:
        """The CUDA error of the launch; 0 is success, 1 an invalid value."""
        return int(self.library.flyEntropyGate(ctypes.byref(args), workspace, workspace_bytes, self.memory.stream))

    def launch_loose_window_accept(self, args: AcceptArgs) -> int:
        return int(self.library.flyLooseWindowAccept(ctypes.byref(args), self.memory.stream))

    def packed_workspace_bytes(self, num_rows: int, vocab_size: int, top_k: int) -> int:
        return int(self.library.flyPackedLooseAcceptWorkspaceBytes(num_rows, vocab_size, top_k))

    def launch_packed_loose_accept(self, args: PackedArgs, workspace: int | None, workspace_bytes: int) -> int:
        return int(
            self.library.flyPackedLooseAccept(ctypes.byref(args), workspace, workspace_bytes, self.memory.stream)
        )

    def entropy_gate(self, logits: Array, next_tokens: Array, top_k: int, offset: int = 0) -> dict[str, Array]:
        """logits [R, V] float32, float16 or the uint16 bits of bfloat16; next_tokens int64 [R] -> arrays [R], and
        those of TOP_OUTPUTS [R, top_k].

        `offset` is the number of elements by which the logits begin after an aligned address.
        """
        num_rows, vocab_size = logits.shape
        memory = self.memory
        given = memory.upload(logits, offset * logits.itemsize)
        tokens = memory.upload(next_tokens.astype(np.int64))
        shapes = {name: (num_rows, top_k) if name in TOP_OUTPUTS else (num_rows,) for name in GATE_OUTPUTS}
        outputs = {name: self._empty(math.prod(shapes[name]), dtype) for name, dtype in GATE_OUTPUTS.items()}
        num_bytes = self.workspace_bytes(num_rows, vocab_size, top_k)
        workspace = self._empty(num_bytes, np.uint8)
        if isinstance(memory, CpuMemory):
            self.library.flyWatchLoads(ctypes.c_void_p(memory.pointer(given)), ctypes.c_size_t(logits.nbytes))
        args = GateArgs(
            memory.pointer(given),
            LOGITS_TYPES[logits.dtype],
            num_rows,
            vocab_size,
            top_k,
            memory.pointer(tokens),
            *(memory.pointer(buffer) for buffer in outputs.values()),
        )
        _check(self.launch_entropy_gate(args, memory.pointer(workspace), num_bytes), "EntropyGate")
        return {
            name: memory.download(buffer, GATE_OUTPUTS[name]).reshape(shapes[name]) for name, buffer in outputs.items()
        }

    def loose_window_accept(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The arrays named in ACCEPT_INPUTS: [B, T], parameters [B], stop tokens [N] -> two arrays [B]."""
        memory = self.memory
        given = [memory.upload(np.asarray(inputs[name], dtype)) for name, dtype in ACCEPT_INPUTS.items()]
        batch_size, num_tokens = inputs["argmax"].shape
        outputs = {name: self._empty(batch_size, dtype) for name, dtype in ACCEPT_OUTPUTS.items()}
        pointers = [memory.pointer(buffer) for buffer in (*given, *outputs.values())]
        args = AcceptArgs(batch_size, num_tokens, len(inputs["stop_token_ids"]), *pointers)
        _check(self.launch_loose_window_accept(args), "LooseWindowAccept")
        return {name: memory.download(buffer, ACCEPT_OUTPUTS[name]) for name, buffer in outputs.items()}

    def packed_loose_accept(
        self, step: PackedStep, policy: PackedPolicy, offset: int = 0, *, in_place: bool = False
    ) -> Array:
        """The rewritten logits [R, V] of the step, which begin `offset` elements after an aligned address, as those
        given do; in_place: they are written over those given."""
        memory = self.memory
        given = memory.upload(step.logits, offset * step.logits.itemsize)
        garbage = np.full(step.logits.nbytes, _GARBAGE, np.uint8)
        rewritten = given if in_place else memory.upload(garbage, offset * step.logits.itemsize)
        ids = [
            memory.upload(array.astype(np.int32))
            for array in (step.last_token_ids, step.input_ids, step.context_lengths)
        ]
        args = packed_args(step, policy)
        args.logits, args.rewritten = memory.pointer(given), memory.pointer(rewritten)
        args.last_token_ids, args.input_ids, args.context_lengths = map(memory.pointer, ids)
        num_bytes = self.packed_workspace_bytes(len(step.last_token_ids), args.vocab_size, policy.entropy_top_k)
        workspace = self._empty(num_bytes, np.uint8)
        if isinstance(memory, CpuMemory):
            self.library.flyWatchLoads(ctypes.c_void_p(memory.pointer(given)), ctypes.c_size_t(step.logits.nbytes))
        _check(self.launch_packed_loose_accept(args, memory.pointer(workspace), num_bytes), "PackedLooseAccept")
        return memory.download(rewritten, step.logits.dtype).reshape(step.logits.shape)

    def _empty(self, count: int, dtype: npt.DTypeLike) -> Any:
        return self.memory.upload(np.full(count * np.dtype(dtype).itemsize, _GARBAGE, np.uint8))


def packed_args(step: PackedStep, policy: PackedPolicy) -> PackedArgs:
    """All but the pointers."""
    num_rows, row_size = step.logits.shape
    args = PackedArgs(
        logits_type=LOGITS_TYPES[step.logits.dtype],
        num_rows=num_rows,
        num_tokens=len(step.input_ids),
        num_sequences=len(step.context_lengths),
        row_size=row_size,
        vocab_size=policy.vocab_size or row_size,
        top_k=policy.entropy_top_k,
        entropy_threshold=policy.entropy_threshold,
        use_full_entropy=policy.use_full_entropy,
        window=policy.window,
        lookahead=policy.lookahead,
        num_stop_tokens=len(policy.stop_token_ids),
    )
    args.stop_token_ids[: len(policy.stop_token_ids)] = policy.stop_token_ids
    return args


def find_nvcc() -> str | None:
    """nvcc of the PATH, of CUDA_HOME, or of CUDA's usual place."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(os.path.join(folder, "bin") for folder in folders if folder)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def load_cpu_kernels(folder: Path) -> Kernels:
    """Builds the kernels for the CPU in `folder`."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NoCompilerError("no g++ was found: install it or name a C++17 compiler in CXX")
    include = ["-I", str(PLUGINS / "check/cpu"), "-I", str(PLUGINS)]
    sources = ["-x", "c++", *(str(PLUGINS / source) for source in SOURCES)]
    library = folder / "kernels_cpu.so"
    _compile([compiler, *CPU_FLAGS.split(), *include, *sources, "-o", str(library)])
    return Kernels(library, CpuMemory())


def load_gpu_kernels(folder: Path) -> Kernels:
    """Builds the kernels for this machine's GPU in `folder`."""
    memory = GpuMemory()
    nvcc = find_nvcc()
    if nvcc is None:
        raise NoCompilerError(
            "nvcc was not found: put it on the PATH or set CUDA_HOME; --cpu checks the kernels without it"
        )
    major, minor = memory.torch.cuda.get_device_capability()
    library = folder / "kernels_gpu.so"
    sources = [str(PLUGINS / source) for source in SOURCES]
    flags = [*GPU_FLAGS.split(), f"-arch=sm_{major}{minor}", "-I", str(PLUGINS)]
    _compile([nvcc, *flags, *sources, "-o", str(library)])
    return Kernels(library, memory)


def _compile(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{finished.stdout}{finished.stderr}")


def _check(error: int, name: str) -> None:
    if error != 0:
        raise RuntimeError(f"the launch of {name} returned CUDA error {error}")
