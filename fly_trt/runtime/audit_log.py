"""A log with one line of JSON for each audit, in files that are rotated by size.

A thread of its own writes: whoever hands a line over waits for no disk. Lines are whole or not there, also where
several processes, or several engines of one, write to the same file. Where a line cannot be written it is counted and
left out, and a warning says so once, until lines can be written again. It knows lines and files; nothing of audits.
"""

import contextlib
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fly_trt.checks import check_at_least
from fly_trt.errors import ConfigError, one_line

try:
    import fcntl
except ImportError:  # not a POSIX system: one process may write to a file
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

MAX_WAITING = 1000  # lines; more means that the disk is slower than the audits
CLOSE_SECONDS = 5.0  # that the last lines have when the engines are shut down
MAX_ATTEMPTS = 10  # to open a file that others rotate

MakeRecord = Callable[[], Mapping[str, Any]]
"""Makes what a line says, in the thread that writes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditLogConfig:
    """path: of the file. max_bytes: from which on it becomes path.1, what was that path.2, and so on up to `backups`
    files; what comes behind is deleted. has_text: lines have prompt, output and exact text too."""

    path: str
    max_bytes: int = 10_000_000
    backups: int = 5
    has_text: bool = False

    def __post_init__(self) -> None:
        if not self.path or Path(self.path).is_dir():
            raise ConfigError(f"audit_log {self.path!r}: expected the path of a file")
        check_at_least("audit_log_max_bytes", self.max_bytes, 1)
        check_at_least("audit_log_backups", self.backups, 0)


class AuditLog:
    """`num_written` and `num_lost` lines so far. The thread that writes starts with the first line."""

    def __init__(self, config: AuditLogConfig) -> None:
        self.num_written = 0
        self.num_lost = 0
        self._config = config
        self._path = Path(config.path).expanduser()
        self._waiting: queue.Queue[MakeRecord | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._has_warned = False

    def write(self, make_record: MakeRecord) -> None:
        """Has one line written, soon. Neither waits nor raises. One thread calls it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fly-trt audit log", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(make_record)
        except queue.Full:
            self._lose(f"{MAX_WAITING} lines wait to be written")

    def close(self) -> None:
        """Waits a moment for what is still to be written. The thread of `write` calls it, or one after that."""
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        self._thread = None

    def _run(self) -> None:
        while (make_record := self._waiting.get()) is not None:
            try:
                line = json.dumps(make_record(), separators=(",", ":"), allow_nan=False)
                self._append(line.encode() + b"\n")
            except Exception as error:  # a line is no reason to harm anything
                self._lose(one_line(error))
            else:
                self.num_written += 1
                self._has_warned = False

    def _lose(self, reason: str) -> None:
        self.num_lost += 1
        if not self._has_warned:
            self._has_warned = True
            logger.warning("audit_log %s: not written (%s): lines are left out until it can be", self._path, reason)

    def _append(self, line: bytes) -> None:
        with _locked(self._path) as descriptor:
            if (size := os.fstat(descriptor).st_size) and size + len(line) > self._config.max_bytes:
                self._rotate()
            else:
                _write_whole(descriptor, line, size)
                return
        with _locked(self._path) as descriptor:
            _write_whole(descriptor, line, os.fstat(descriptor).st_size)

    def _rotate(self) -> None:
        """Whoever has the lock of the file that is too long does this."""
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n + 1}") for n in range(self._config.backups))]
        if len(names) == 1:
            self._path.unlink()
        for older, newer in zip(reversed(names), list(reversed(names))[1:], strict=False):
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, older)


@contextlib.contextmanager
def _locked(path: Path) -> Any:
    """A descriptor of the file that has this name now, which no other one of ours writes to or renames meanwhile. It is
    opened anew for each line: audits are rare, and whoever else rotates files may do so."""
    for _ in range(MAX_ATTEMPTS):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)
    raise OSError(f"{path} is renamed all the time")


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _write_whole(descriptor: int, line: bytes, size: int) -> None:
    """The line behind `size` bytes, or an OSError and no part of it."""
    try:
        if (written := os.write(descriptor, line)) < len(line):
            raise OSError(f"{written} of {len(line)} bytes fitted")
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
