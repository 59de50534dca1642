"""Threads and devices do not survive a fork: what has them knows the process that it was made in."""

import ctypes
import functools
import os

from fly_trt.errors import ConfigError


class HomeProcess:
    """The process that made something, which `name` says in errors."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises ConfigError in a process that was forked from it. Takes no lock: another thread may have had it when
        the process was forked, and nobody is left to release it."""
        if not self.is_here:
            raise ConfigError(
                f"{self._name} of process {self._pid}, used in process {os.getpid()} that was forked from it: engines "
                "do not survive a fork: load them in each process, after the fork"
            )


@functools.cache
def let_children_exit() -> None:
    """Has the processes that are forked from this one end without the destructors of C++ libraries.

    ONNX Runtime's wait for the threads of its pool, which a fork leaves behind, so that such a process would never end.
    Python's own clean-up is done by then. Needs glibc; elsewhere nothing is changed.
    """
    if not hasattr(os, "register_at_fork"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "on_exit"):
        os.register_at_fork(after_in_child=lambda: library.on_exit(library._exit, None))
