"""NCCL without a GPU, as far as fly_trt calls nccl4py: ranks are processes that sum through a file that all map.

As with the real library a rank waits for the others until it aborts its own communicator, whether they live or not, and
what an aborted sum leaves raises nothing. Names are those of `nccl.core`.
"""

import itertools
import mmap
import os
import secrets
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = "FLY_TRT_SIMULATED_NODE"  # the environment's variable: where the ranks of a test meet
# What the library leaves out without a word: all of the sums where this is "none", or all but those of so many numbers
# a token.
SUMS = "FLY_TRT_SIMULATED_SUMS"
ID_BYTES = 128
MAX_RANKS = 8
SLOT_BYTES = 1 << 22
JOIN_SECONDS = 60.0  # after which a rank gives up on the others, as the real one does when it cannot reach them
PAUSE_SECONDS = 50e-6
communicators: dict[int, "Communicator"] = {}
_addresses = itertools.count(0x7000, 16)


class UniqueId:
    def __init__(self, _internal: Any = None) -> None:
        self._content = bytes(_internal or secrets.token_bytes(ID_BYTES))

    def __bytes__(self) -> bytes:
        return self._content

    @staticmethod
    def from_bytes(b: Any) -> "UniqueId":
        assert len(b) == ID_BYTES
        return UniqueId(b)


def get_unique_id(empty: bool = False) -> UniqueId:
    return UniqueId()


def get_version() -> types.SimpleNamespace:
    return types.SimpleNamespace(libnccl="2.32.3")


class Communicator:
    """The file holds, for each rank, how many sums it has written, how many it has read, the bytes of the one it is at,
    its device and whether the sum is in a graph, and behind that what it adds."""

    def __init__(self, ptr: int | None = None) -> None:
        self._ptr = ptr or 0
        self._is_aborted = threading.Event()

    @classmethod
    def init(cls, nranks: int, rank: int, unique_id: UniqueId, config: Any = None) -> "Communicator":
        made = cls(next(_addresses))
        made._nranks, made._rank, made._count = nranks, rank, 0
        path = Path(os.environ.get(FOLDER, tempfile.gettempdir())) / bytes(unique_id)[:16].hex()
        with path.open("a+b") as file:
            file.truncate(MAX_RANKS * (64 + SLOT_BYTES))
            mapped = mmap.mmap(file.fileno(), 0)
        numbers = np.frombuffer(mapped, np.int64, MAX_RANKS * 8).reshape(MAX_RANKS, 8)[:nranks]
        columns = (numbers[:, index] for index in range(5))
        made._written, made._read, made._sizes, made._devices, made._captured = columns
        made._slots = np.frombuffer(mapped, np.uint8, offset=64 * MAX_RANKS).reshape(MAX_RANKS, SLOT_BYTES)
        made._devices[rank] = 1 + sys.modules["cuda.bindings"].runtime.thread.device
        deadline = time.monotonic() + JOIN_SECONDS
        while not made._devices.all():
            if time.monotonic() > deadline:
                raise RuntimeError("NCCL Error: ncclRemoteError")
            time.sleep(PAUSE_SECONDS)
        if len(set(made._devices.tolist())) < nranks:
            raise RuntimeError("NCCL Error: Duplicate GPU detected")
        communicators[made._ptr] = made
        return made

    @property
    def ptr(self) -> int:
        return self._ptr

    def abort(self) -> None:
        self._is_aborted.set()
        communicators.pop(self._ptr, None)
        self._ptr = 0

    def sum_up(self, array: np.ndarray, *, is_captured: bool = False) -> bool:
        """In place, in the order of ranks. False where it was aborted; an AssertionError where the ranks do not do the
        same, or some of them in a graph and others not."""
        self._count += 1
        content = array.reshape(-1).view(np.uint8)
        if not self._wait(lambda: (self._read >= self._count - 1).all()):
            return False
        self._slots[self._rank, : content.size] = content
        self._sizes[self._rank] = content.size
        self._captured[self._rank] = is_captured
        self._written[self._rank] = self._count
        if not self._wait(lambda: (self._written >= self._count).all()):
            return False
        assert (self._sizes == content.size).all(), f"ranks sum {self._sizes.tolist()} bytes"
        assert (self._captured == is_captured).all(), "some ranks sum in a graph and others do not"
        parts = self._slots[: self._nranks, : content.size].copy().view(array.dtype)
        self._read[self._rank] = self._count
        if os.environ.get(SUMS, str(array.shape[-1])) == str(array.shape[-1]):
            array.reshape(-1)[:] = np.add.reduce(parts, 0)
        return True

    def _wait(self, is_met: Any) -> bool:
        while not is_met():
            if self._is_aborted.is_set():
                return False
            time.sleep(PAUSE_SECONDS)
        return not self._is_aborted.is_set()


def install(patch: pytest.MonkeyPatch) -> None:
    """Makes this the process's nccl4py, until the patch is undone."""
    core = types.ModuleType("nccl.core")
    parts = [UniqueId, Communicator, get_unique_id, get_version]
    vars(core).update({part.__name__: part for part in parts})
    nccl: Any = types.ModuleType("nccl")
    nccl.core = core
    patch.setitem(sys.modules, "nccl", nccl)
    patch.setitem(sys.modules, "nccl.core", core)
