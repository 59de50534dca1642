"""The communicator through which the ranks of one engine sum, from NCCL by way of nccl4py.

It knows a number of ranks and one id that they share. It knows no engine and no process. libnccl is loaded by nccl4py
before the engine library asks for it, so that the process has it once.
"""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

from fly_trt.errors import EngineError, one_line

LAUNCH_SECONDS = 2.0


def load() -> Any:
    """`nccl.core`, with libnccl loaded. Raises EngineError where one of them is missing."""
    fix = "pip install 'fly-trt[multi-gpu]'"
    try:
        from nccl import core
    except ImportError as error:
        raise EngineError(f"{error.name or error}: not installed, engines of several ranks need it: {fix}") from None
    if core.get_version().libnccl is None:
        raise EngineError(f"libnccl.so.2: not found, engines of several ranks need it: {fix}")
    return core


def unique_id() -> bytes:
    """What the ranks of one communicator find each other by; made by one of them. Raises EngineError."""
    core = load()
    with _told():
        return bytes(core.get_unique_id())


class Communicator:
    """One rank's end. Made on all ranks at the same time: it waits for the others. The current device is its own.

    `abort` may come from another thread at any time, and ends what the ranks are summing; what was summed is then
    nothing, and no call says so. It must not come while work is put on a stream, which is what `in_use` is for.
    """

    def __init__(self, num_ranks: int, rank: int, shared_id: bytes) -> None:
        """shared_id: from `unique_id`. Raises EngineError."""
        core = load()
        self._lock = threading.Lock()
        self._is_aborted = False
        with _told():
            self._communicator = core.Communicator.init(num_ranks, rank, core.UniqueId.from_bytes(shared_id))

    @property
    def capsule(self) -> Any:
        """A PyCapsule of the ncclComm_t, as TensorRT takes it."""
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(self._communicator.ptr, None, None)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """For the block in which work that sums is put on a stream. Raises EngineError after an abort."""
        with self._lock:
            if self._is_aborted:
                raise EngineError("NCCL: the communicator was aborted: load the engine again")
            yield

    def abort_within(self, seconds: float) -> None:
        """`abort` in a thread of its own, which is left behind after `seconds`."""
        thread = threading.Thread(target=self.abort, name="fly-trt abort", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread starts any more when the interpreter ends
            thread.start()
            thread.join(seconds)

    def abort(self) -> None:
        """Ends what is being summed and frees the communicator. Safe to call twice, from any thread. It may take until
        the CUDA graphs that sum through it are gone, and nobody says how long on a GPU that failed."""
        # A rank that waits for another one inside the block never leaves it by itself: then it is aborted all the same.
        has_lock = self._lock.acquire(timeout=LAUNCH_SECONDS)
        try:
            is_first, self._is_aborted = not self._is_aborted, True
        finally:
            if has_lock:
                self._lock.release()
        if is_first:
            with contextlib.suppress(Exception):  # of a GPU that failed, nothing can be freed
                self._communicator.abort()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """nccl4py's errors as one EngineError."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"NCCL: {one_line(error)}: set NCCL_DEBUG=INFO to see why") from None
