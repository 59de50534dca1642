"""Directories that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """An empty directory beside `output` that takes its place, and replaces what is there, when the block ends well.

    An error or Ctrl-C in the block leaves `output` as it was.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{output.name}.building-", dir=output.parent))
    try:
        yield workspace
        _move_into_place(workspace, output)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _move_into_place(workspace: Path, output: Path) -> None:
    workspace.chmod(0o755)
    if not output.exists():
        os.rename(workspace, output)
        return
    replaced = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    try:
        os.rename(output, replaced / output.name)
        os.rename(workspace, output)
    finally:
        if not output.exists():
            os.rename(replaced / output.name, output)
        shutil.rmtree(replaced)
