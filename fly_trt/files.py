"""Files and directories that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_directory(output: Path, beside: Path | None = None) -> Iterator[Path]:
    """An empty directory beside `output`, or beside `beside` of the same file system, that takes the place of `output`,
    and replaces what is there, when the block ends well.

    An error or Ctrl-C in the block leaves `output` as it was.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = (beside or output).parent
    workspace = Path(tempfile.mkdtemp(prefix=f".{output.name}.building-", dir=folder))
    try:
        yield workspace
        _move_into_place(workspace, output, folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


@contextlib.contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """A path beside `output`, with its suffix, whose file takes the place of `output` when the block ends well.

    An error or Ctrl-C in the block leaves `output` as it was.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.writing-", dir=output.parent) as folder:
        path = Path(folder) / output.name
        yield path
        os.replace(path, output)


def _move_into_place(workspace: Path, output: Path, folder: Path) -> None:
    workspace.chmod(0o755)
    if not output.exists():
        os.rename(workspace, output)
        return
    replaced = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=folder))
    try:
        os.rename(output, replaced / output.name)
        os.rename(workspace, output)
    finally:
        if not output.exists():
            os.rename(replaced / output.name, output)
        shutil.rmtree(replaced)
