"""TensorRT or TensorRT-RTX as one library: the two have the same API, from building a network to running an engine.

This module imports whichever is there, sends its log to Python's logging, and loads the plugin library. It knows
nothing of models; fly_build compiles with it and the runtime runs with it.
"""

import contextlib
import ctypes
import importlib
import logging
import os
import stat
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args

from fly_trt.errors import EngineError
from fly_trt.files import new_file
from fly_trt.manifest import TensorRTLibrary, TensorRTPlan

logger = logging.getLogger(__name__)

# Both libraries look for a GPU at every turn and log this as an error where there is none.
NO_DRIVER = "CUDA driver version is insufficient"
PLUGIN, PLUGIN_VERSION, PLUGIN_NAMESPACE = "EntropyGate", "2", "fly"
# From these on an attention behind a sum no longer makes the builder forget that there are other ranks
# (pytorch/TensorRT #4381, #4388).
LEAST_FOR_RANKS: dict[str, str] = {"tensorrt": "11.3", "tensorrt_rtx": "1.7.1"}
EXTRAS: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


@dataclass
class Library:
    """`trt` is the module; `errors` collects what it logged as an error since the last `take_errors`."""

    name: TensorRTLibrary
    trt: Any
    errors: list[str] = field(default_factory=list)
    log: Any = None

    def __post_init__(self) -> None:
        self.log = _make_log(self.trt, self.errors)

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    def take_errors(self) -> str:
        """The last error in one line, if possible one that is not about a GPU that may not be needed."""
        relevant = [error for error in self.errors if NO_DRIVER not in error] or self.errors or ["no reason given"]
        reason = " ".join(relevant[-1].split())
        self.errors.clear()
        return reason

    def load_plugins(self, path: Path) -> None:
        """Registers the creators of `libfly_plugins.so`, once a process. Raises EngineError when it does not load or
        holds another version of the plugins."""
        registry = self.trt.get_plugin_registry()
        wanted = PLUGIN, PLUGIN_VERSION, PLUGIN_NAMESPACE
        if registry.get_creator(*wanted) is not None:
            return
        fix = "build it with plugins/CMakeLists.txt"
        if not path.is_file():
            raise EngineError(f"{path}: no such plugin library: {fix}")
        try:
            has_entry = hasattr(ctypes.CDLL(str(path.resolve())), "getCreators")
        except OSError as error:
            raise EngineError(f"{path}: not a library of this system ({error}): {fix}") from None
        if not has_entry:
            raise EngineError(f"{path}: a library without TensorRT plugins, it exports no getCreators: {fix}")
        # With FLY_TRT_REGISTER_PLUGINS=1 it may have registered itself, and TensorRT loads no library twice.
        registered = registry.get_creator(*wanted) is not None
        if not registered and registry.load_library(str(path.resolve())) is None:
            raise EngineError(
                f"{path}: {self.name} {self.version} cannot load it ({self.take_errors()}): {fix} against the headers "
                "of this version"
            )
        if registry.get_creator(*wanted) is None:
            raise EngineError(
                f"{path}: has no version {PLUGIN_VERSION} of {PLUGIN}, an older or newer fly-trt's: {fix} of this one, "
                "and the engine with it"
            )


def import_library(name: TensorRTLibrary | None = None) -> Library:
    """The library of this name, or the first that is installed. Raises EngineError with the extra to install."""
    names: tuple[TensorRTLibrary, ...] = (name,) if name else get_args(TensorRTLibrary)
    for candidate in names:
        try:
            return Library(candidate, importlib.import_module(candidate))
        except ImportError as error:
            logger.debug("%s: %s", candidate, error)
    wanted = " or ".join(f"pip install 'fly-trt[{EXTRAS[candidate]}]'" for candidate in names)
    raise EngineError(f"{' and '.join(names)}: not installed: {wanted}")


def check_compatibility(path: Path, plan: TensorRTPlan, library: Library, compute_capability: str) -> None:
    """Raises EngineError unless this library version and GPU can run the plan. A plan of full TensorRT belongs to one
    kind of GPU, one of TensorRT-RTX to all RTX GPUs from a certain compute capability on."""
    if library.version != plan.version:
        raise EngineError(
            f"{path}: built with {plan.library} {plan.version}, found {library.version}: install {plan.library}=="
            f"{plan.version} or rebuild with fly-build"
        )
    is_portable = plan.library == "tensorrt_rtx"
    if is_portable and not runs_rtx(compute_capability):
        raise EngineError(
            f"{path}: built with TensorRT-RTX, which is for RTX GPUs, and this one has compute capability "
            f"{compute_capability}: rebuild on this machine with fly-build --tensorrt-library tensorrt (pip install "
            "'fly-trt[tensorrt]')"
        )
    fits = (
        _numbers(compute_capability) >= _numbers(plan.compute_capability)
        if is_portable
        else compute_capability == plan.compute_capability
    )
    if not fits:
        wanted = f"{plan.compute_capability} or later" if is_portable else plan.compute_capability
        raise EngineError(
            f"{path}: built for compute capability {wanted}, this GPU has {compute_capability}: rebuild with fly-build "
            "on this machine"
        )


def runs_rtx(compute_capability: str) -> bool:
    """Whether TensorRT-RTX has kernels for this GPU: its support matrix (1.0 to 1.5) leaves out those of data centres
    from Hopper (9.0) on, up to the GPUs of RTX cards (12.0)."""
    major, _ = _numbers(compute_capability)
    return not 9 <= major < 12


def check_ranks(path: Path, plan: TensorRTPlan | None) -> TensorRTPlan:
    """The plan. Raises EngineError unless its library is one whose engines may have several ranks."""
    least = LEAST_FOR_RANKS.get(plan.library) if plan else None
    if plan is None or least is None:
        raise EngineError(f"{path}: only TensorRT's engines have several ranks: rebuild with --backend tensorrt")
    if not has_ranks(plan.library, plan.version):
        raise EngineError(
            f"{path}: built with {plan.library} {plan.version}, which may leave out the sums between ranks without a "
            f"word: rebuild with {plan.library} {least} or later"
        )
    return plan


def has_ranks(library: TensorRTLibrary, version: str) -> bool:
    """Whether sums over several GPUs are really taken."""
    return _numbers(version) >= _numbers(LEAST_FOR_RANKS[library])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def cache_folder() -> Path:
    """Where both libraries' timings and kernels are kept between processes."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "fly-trt"
    try:
        return Path.home() / ".cache" / "fly-trt"
    except RuntimeError:  # a user without a home, as in some containers
        return _folder_without_home()


def _folder_without_home() -> Path:
    """In the folder for temporary files, where any user may make a folder first: code is loaded from here, so that one
    of another's, or that others may write to, is not used. This process has one of its own then, until it ends."""
    folder = Path(tempfile.gettempdir()) / f"fly-trt-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return folder if is_own else Path(_folder_of_process().name)


@cache
def _folder_of_process() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fly-trt-", ignore_cleanup_errors=True)


def keep(path: Path, content: Any, what: str) -> None:
    """Writes a buffer to `path`, whole or not at all. Where that cannot be done `what` is only not kept."""
    try:
        with new_file(path) as file:
            file.write_bytes(content)
    except OSError as error:
        logger.info("%s: %s are not kept: %s", path, what, error)


def _make_log(trt: Any, errors: list[str]) -> Any:
    """An ILogger; the library's warnings are mostly about bindings that are right, so they are INFO here."""
    levels = {trt.ILogger.WARNING: logging.INFO, trt.ILogger.INFO: logging.DEBUG, trt.ILogger.VERBOSE: logging.DEBUG}

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity)
            if level is None:
                errors.append(message)
                level = logging.DEBUG  # it becomes an exception, which says it once
            logger.log(level, "%s", message)

    return Log()
