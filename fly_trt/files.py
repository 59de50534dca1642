"""Files and directories that appear whole or not at all."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's tofile loses the system's reason


@contextlib.contextmanager
def new_directory(output: Path, beside: Path | None = None) -> Iterator[Path]:
    """An empty directory beside `output`, or beside `beside` of the same file system, that takes the place of `output`,
    and replaces what is there, when the block ends well.

    An error or Ctrl-C in the block leaves `output` as it was. What a killed process left is removed by the next one
    that writes the same. OSErrors of writing name `output`.
    """
    folder = (beside or output).parent
    _remove_left_behind(output, folder, "replaced")
    with _temporary_folder(output, folder, "building") as workspace:
        yield workspace
        _move_into_place(workspace, output, folder)


@contextlib.contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """A path beside `output`, with its suffix, whose file takes the place of `output` when the block ends well.

    An error or Ctrl-C in the block leaves `output` as it was. OSErrors of writing name `output`.
    """
    with _temporary_folder(output, output.parent, "writing") as folder:
        path = folder / output.name
        yield path
        os.replace(path, output)


@contextlib.contextmanager
def _temporary_folder(output: Path, folder: Path, purpose: str) -> Iterator[Path]:
    """A new folder in `folder` that is gone at the end, however the block ends."""
    prefix = f".{output.name}.{purpose}-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(output, folder, purpose)
        made = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=folder))
        lock = _lock(made)  # before it has the name by which others find it
        workspace = made.rename(made.with_name(prefix + made.name.rpartition(".")[2]))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: write elsewhere", str(output)) from None
    try:
        yield workspace
    except OSError as error:
        if SHORT_WRITE.fullmatch(str(error)):
            raise OSError(errno.ENOSPC, f"No space for all bytes ({error})", str(output)) from None
        is_own = str(error.filename).startswith(str(workspace))
        if is_own or (error.filename is None and error.errno in WRITE_ERRORS):
            error.filename, error.filename2 = str(output), None
        raise
    finally:
        _remove(workspace, output, purpose, lock)


def _remove_left_behind(output: Path, folder: Path, purpose: str) -> None:
    """Folders of this name whose process has ended: it holds a lock while it lives, on this machine or another."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(f".{output.name}.{purpose}-") and (lock := _lock(path)) is not None:
                _remove(path, output, purpose, lock)


def _remove(workspace: Path, output: Path, purpose: str, lock: int | None) -> None:
    """What was replaced stays while nothing is in its place: it is the only one there is."""
    try:
        if purpose != "replaced" or output.exists():
            shutil.rmtree(workspace, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """An open descriptor of the folder, locked until it is closed or the process ends. None where another process has
    it locked, or the file system has no locks."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def lock_file(descriptor: int) -> bool:
    """Locks an open file for as long as it is open. False where another process has it locked; where there are no
    locks, nobody has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _move_into_place(workspace: Path, output: Path, folder: Path) -> None:
    workspace.chmod(0o755)
    if not output.exists():
        os.rename(workspace, output)
        return
    with _temporary_folder(output, folder, "replaced") as replaced:
        try:
            os.rename(output, replaced / output.name)
            os.rename(workspace, output)
        finally:
            if not output.exists():
                os.rename(replaced / output.name, output)
