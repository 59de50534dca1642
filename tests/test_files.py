"""A directory appears whole or not at all, and what lay in its place survives every other end."""

import stat
from pathlib import Path

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
