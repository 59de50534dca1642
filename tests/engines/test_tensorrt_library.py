"""The real TensorRT-RTX behind the wrapper that fly_build and the runtime share: its log and its plugin libraries."""

import _ctypes  # an extension module: a library that has nothing to do with TensorRT
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from fly_trt.engines.tensorrt_library import NO_DRIVER, Library, _folder_of_process, cache_folder, import_library
from fly_trt.errors import EngineError

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def library() -> Library:
    return import_library("tensorrt_rtx")


def test_the_first_installed_library_serves_when_none_is_named(library: Library) -> None:
    assert import_library().name in ("tensorrt", "tensorrt_rtx")
    assert library.version == library.trt.__version__


def test_errors_become_the_reason_of_an_exception_and_warnings_stay_in_the_log(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    severity = library.trt.ILogger
    with caplog.at_level(logging.INFO, "fly_trt.engines.tensorrt_library"):
        library.log.log(severity.WARNING, "input_ids has an Int64 binding")
        library.log.log(severity.ERROR, "first\n  reason")
        library.log.log(severity.INTERNAL_ERROR, f"cudaError 35: {NO_DRIVER}")
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.INFO, "input_ids has an Int64 binding")
    ]
    assert library.take_errors() == "first reason"
    assert library.take_errors() == "no reason given"
    library.log.log(severity.ERROR, NO_DRIVER)
    assert library.take_errors() == NO_DRIVER


def test_the_library_itself_logs_there(library: Library) -> None:
    builder = library.trt.Builder(library.log)
    network = builder.create_network(0)  # a parser does not keep it alive
    parser = library.trt.OnnxParser(network, library.log)
    assert not parser.parse(b"no model")
    assert "parse" in library.take_errors().lower()


def test_what_is_no_plugin_library_is_refused_with_the_reason(library: Library, tmp_path: Path) -> None:
    text = tmp_path / "libfly_plugins.so"
    with pytest.raises(EngineError, match=r"no such plugin library: build it with plugins/CMakeLists\.txt"):
        library.load_plugins(text)
    text.write_text("no library")
    with pytest.raises(EngineError, match="not a library of this system"):
        library.load_plugins(text)
    with pytest.raises(EngineError, match="without TensorRT plugins, it exports no getCreators"):
        library.load_plugins(Path(_ctypes.__file__))


def test_a_library_of_another_version_of_the_plugins_is_refused(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = SimpleNamespace(get_creator=lambda *_: None, load_library=lambda path: object())
    monkeypatch.setattr(library.trt, "get_plugin_registry", lambda: older)
    monkeypatch.setattr("ctypes.CDLL", lambda path: SimpleNamespace(getCreators=None))
    path = tmp_path / "libfly_plugins.so"
    path.touch()
    with pytest.raises(EngineError, match=r"has no version 2 of EntropyGate, .*: build it with"):
        library.load_plugins(path)


def test_a_library_that_registers_itself_is_not_loaded_again(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FLY_TRT_REGISTER_PLUGINS=1, where all can see TensorRT's symbols. TensorRT refuses what it has already."""
    creators: list[object] = []
    registry = SimpleNamespace(
        get_creator=lambda *_: creators[0] if creators else None,
        load_library=lambda path: None if creators else object(),
    )
    monkeypatch.setattr(library.trt, "get_plugin_registry", lambda: registry)

    def load(path: str) -> SimpleNamespace:
        creators.append(object())
        return SimpleNamespace(getCreators=None)

    monkeypatch.setattr("ctypes.CDLL", load)
    path = tmp_path / "libfly_plugins.so"
    path.touch()
    library.load_plugins(path)
    assert creators


def test_files_are_kept_in_the_users_cache_or_where_there_is_no_home_in_the_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fly-trt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fly-trt"
    live_without_home(monkeypatch, tmp_path)
    folder = cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder


def live_without_home(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))


@pytest.mark.parametrize("made", ["by another", "for others to write to", "as a link", "as a file"])
def test_a_temporary_folder_that_another_user_could_have_filled_is_not_used(
    made: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    _folder_of_process.cache_clear()
    request.addfinalizer(_folder_of_process.cache_clear)
    live_without_home(monkeypatch, tmp_path)
    guessed = cache_folder()
    if made == "by another":
        monkeypatch.setattr("os.geteuid", lambda: 2**31 - 7)
        (tmp_path / guessed.name).rename(guessed := tmp_path / f"fly-trt-{2**31 - 7}")
    elif made == "for others to write to":
        guessed.chmod(0o770)
    else:
        guessed.rmdir()
        guessed.touch() if made == "as a file" else guessed.symlink_to(tmp_path)
    folder = cache_folder()
    assert folder != guessed
    assert folder.is_dir()
    assert not folder.is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder  # of this process
