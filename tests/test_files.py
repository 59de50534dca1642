"""A directory appears whole or not at all, and what lay in its place survives every other end."""

import fcntl
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fly_trt.files import new_directory, new_file


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def old(output: Path) -> Path:
    """Something lies where the directory is to come."""
    (output / "deep").mkdir(parents=True)
    (output / "deep" / "old.bin").write_bytes(b"old")
    (output / "both").write_bytes(b"old")
    return output


def _write(workspace: Path) -> None:
    (workspace / "sub").mkdir()
    (workspace / "sub" / "new.bin").write_bytes(b"new")
    (workspace / "both").write_bytes(b"new")


def _write_until(output: Path, error: BaseException) -> None:
    with new_directory(output) as workspace:
        _write(workspace)
        raise error


def _write_file_until(output: Path, error: BaseException) -> None:
    with new_file(output) as path:
        path.write_bytes(b"half")
        raise error


def test_nothing_is_seen_before_the_block_ends_and_everything_after_it(output: Path) -> None:
    with new_directory(output) as workspace:
        assert list(workspace.iterdir()) == []
        _write(workspace)
        assert not output.exists()
    assert _contents(output) == {"sub/new.bin": b"new", "both": b"new"}
    assert list(output.parent.iterdir()) == [output]


def test_the_new_directory_is_readable_by_others(output: Path) -> None:
    with new_directory(output):
        pass
    assert stat.S_IMODE(output.stat().st_mode) == 0o755


def test_missing_parents_are_made(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "c"
    with new_directory(output) as workspace:
        _write(workspace)
    assert _contents(tmp_path) == {"a/b/c/sub/new.bin": b"new", "a/b/c/both": b"new"}


def test_what_was_there_stays_until_the_block_ends_and_is_then_replaced_as_a_whole(old: Path) -> None:
    before = _contents(old)
    with new_directory(old) as workspace:
        _write(workspace)
        assert _contents(old) == before
    assert _contents(old) == {"sub/new.bin": b"new", "both": b"new"}
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_or_an_interrupt_leaves_what_was_there_and_nothing_beside_it(old: Path, error: BaseException) -> None:
    before = _contents(old)
    with pytest.raises(type(error)):
        _write_until(old, error)
    assert _contents(old) == before
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_or_an_interrupt_leaves_nothing_where_nothing_was(output: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        _write_until(output, error)
    assert list(output.parent.iterdir()) == []


def test_what_was_there_stays_when_there_is_nothing_to_move_into_its_place(old: Path) -> None:
    before = _contents(old)
    with pytest.raises(FileNotFoundError), new_directory(old) as workspace:
        workspace.rmdir()
    assert _contents(old) == before
    assert list(old.parent.iterdir()) == [old]


def test_a_link_is_replaced_and_what_it_points_to_stays(old: Path, tmp_path: Path) -> None:
    before = _contents(old)
    link = tmp_path / "link"
    link.symlink_to(old, target_is_directory=True)
    with new_directory(link) as workspace:
        _write(workspace)
    assert not link.is_symlink()
    assert _contents(link) == {"sub/new.bin": b"new", "both": b"new"}
    assert _contents(old) == before


def test_two_directories_of_one_name_can_be_written_at_the_same_time(output: Path) -> None:
    with new_directory(output) as first, new_directory(output) as second:
        (first / "first").touch()
        (second / "second").touch()
    assert _contents(output) == {"first": b""}
    assert list(output.parent.iterdir()) == [output]


def test_a_file_is_not_seen_before_the_block_ends_and_replaces_the_old_one_then(output: Path) -> None:
    for content in (b"old", b"new"):
        with new_file(output.with_suffix(".json")) as path:
            assert path.suffix == ".json"
            path.write_bytes(content)
            assert output.with_suffix(".json").exists() == (content == b"new")
    assert _contents(output.parent) == {"output.json": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(output: Path, error: type[BaseException]) -> None:
    output.write_bytes(b"old")
    with pytest.raises(error):
        _write_file_until(output, error())
    assert _contents(output.parent) == {"output": b"old"}


HOLDER = """
import sys, time
from pathlib import Path
from fly_trt.files import new_directory, new_file
with {kind}(Path(sys.argv[1])) as path:
    print(path, flush=True)
    sys.stdin.read()
"""


def _holder(kind: str, output: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that writes `output` until its input ends, and its temporary folder."""
    command = [sys.executable, "-c", HOLDER.format(kind=kind), str(output)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    return process, path if kind == "new_directory" else path.parent


@pytest.mark.parametrize("kind", ["new_directory", "new_file"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(kind: str, output: Path) -> None:
    killed, stale = _holder(kind, output)
    living, in_use = _holder(kind, output)
    killed.kill()
    killed.wait()
    assert stale.is_dir(), "nothing can clean up after SIGKILL"
    neighbours = [output.parent / name for name in (f".{output.name}-x.building-1", ".other.building-1", "plain")]
    for neighbour in neighbours:
        neighbour.mkdir()
    with (new_directory if kind == "new_directory" else new_file)(output) as path:
        assert not stale.exists()
        assert in_use.is_dir()
        if kind == "new_file":
            path.touch()
    living.communicate("")
    assert sorted(output.parent.iterdir()) == sorted([output, *neighbours])


def _interrupt_the_removal_of_what_is_replaced(output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What lay at `output`, left beside the new one."""
    remove = shutil.rmtree

    def interrupted(path: Path, **options: Any) -> None:
        if ".replaced-" in str(path):
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt), new_directory(output) as workspace:
            _write(workspace)
    (left,) = output.parent.glob(".*.replaced-*")
    return left


def test_replaced_directory_that_an_interrupt_left_is_removed_by_the_next_write(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _contents(old)
    left = _interrupt_the_removal_of_what_is_replaced(old, monkeypatch)
    assert _contents(left / old.name) == before
    assert _contents(old) == {"sub/new.bin": b"new", "both": b"new"}
    with new_directory(old):
        assert not left.exists(), "the new one needs the space"
    assert list(old.parent.iterdir()) == [old]


def test_replaced_directory_stays_while_nothing_is_in_its_place(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _contents(old)
    left = _interrupt_the_removal_of_what_is_replaced(old, monkeypatch)
    shutil.rmtree(old)  # as after SIGKILL between the moves
    with pytest.raises(ValueError, match="no luck"):
        _write_until(old, ValueError("no luck"))
    assert _contents(left / old.name) == before


def test_replaced_directory_of_a_living_process_stays(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = _interrupt_the_removal_of_what_is_replaced(old, monkeypatch)
    descriptor = os.open(left, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with new_directory(old):
        pass
    assert left.is_dir()
    os.close(descriptor)
    with new_directory(old):
        pass
    assert list(old.parent.iterdir()) == [old]


def test_error_of_a_full_disk_names_the_output_and_not_its_temporary_folder(output: Path) -> None:
    def write(workspace: Path) -> None:
        (workspace / "data").symlink_to("/dev/full")
        with (workspace / "data").open("wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(OSError, match="No space left on device") as full, new_directory(output) as workspace:
        write(workspace)
    assert full.value.filename == str(output)
    assert list(output.parent.iterdir()) == []


def test_error_that_names_another_file_keeps_its_name(output: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing, new_directory(output):
        Path("/no/such/file").read_bytes()
    assert missing.value.filename == "/no/such/file"


def test_place_where_nothing_can_be_written_is_named(output: Path) -> None:
    output.write_bytes(b"a file")
    for place in (output / "deeper" / "out", Path("/proc/out")):
        with pytest.raises(OSError, match="write elsewhere") as refused, new_directory(place):
            pass
        assert refused.value.filename == str(place)
    assert output.read_bytes() == b"a file"
