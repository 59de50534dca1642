"""The library of operators for ONNX Runtime on the CPU (plugins/cpu): compiled once for each compiler and source, kept
in the user's cache, and copied into the engine directories that need it.

It runs on any x86-64 machine with Linux and AVX2: which vector units it uses is decided where it is loaded. Without a
compiler, or on another machine, engines are built for ONNX Runtime's own operators.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fly_build.progress import Report, quietly
from fly_trt.engines.cores import available_cores
from fly_trt.engines.tensorrt_library import cache_folder
from fly_trt.errors import ConfigError, one_line
from fly_trt.files import new_file

logger = logging.getLogger(__name__)

LIBRARY_NAME = "libfly_cpu.so"
COMPILERS = ("c++", "g++", "clang++")
# Floats are added and multiplied as they are written: with contraction the bits would depend on the compiler.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# By the end of a source's name: the instructions that it may use.
INSTRUCTIONS = {
    "_avx2": AVX2_FLAGS,
    "_avx_vnni": (*AVX2_FLAGS, "-mavxvnni"),
    "_avx512": AVX512_FLAGS,
    "_avx512_vnni": (*AVX512_FLAGS, "-mavx512vnni"),
    "_amx": (*AVX512_FLAGS, "-mamx-tile", "-mamx-int8"),
    "_amx_emulated": AVX2_FLAGS,
}
ISA_VARIABLE = "FLY_TRT_CPU_ISA"  # asks for one kind of kernels
STEP = "CPU kernels"
WITHOUT = "built for ONNX Runtime's own operators, which are slower"


class _CompilerError(Exception):
    """What a compiler said, in one line."""


def sources() -> Path:
    """The folder of the sources: of the installed package, or of a clone."""
    installed = Path(__file__).parent / "cpu_sources"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "plugins/cpu"


def find_library(choice: str, report: Report = quietly) -> Path | None:
    """The compiled library; None where there is to be none, or "auto" finds none that runs here. `choice` is a recipe's
    `cpu_kernels`; `report` is told how far compiling is. Raises ConfigError for a file that is not there, and for a CXX
    that is no command."""
    if choice == "off":
        return None
    if choice != "auto":
        if not (library := Path(choice)).is_file():
            raise ConfigError(f"cpu_kernels {choice!r}: no such file: expected auto, off, or a compiled {LIBRARY_NAME}")
        return library
    if not _is_for_this_machine():
        logger.info("%s on %s: no kernels for this machine, so %s", platform.system(), platform.machine(), WITHOUT)
        return None
    compiler = _compiler()
    if compiler is None:
        asked = os.environ.get("CXX", "").strip() or "no C++ compiler"
        logger.warning("%s: not found, so %s: apt install g++, or --cpu-kernels off if that is meant", asked, WITHOUT)
        return None
    try:
        library = _compiled(compiler, report)
    except (_CompilerError, OSError) as error:
        logger.warning("%s: %s, so %s: it takes g++ 11 or clang++ 12", shlex.join(compiler), error, WITHOUT)
        return None
    if (reason := _why_not_here(library)) is not None:
        logger.warning("%s, so %s: --cpu-kernels off if that is meant", reason, WITHOUT)
        return None
    return library


def is_expected(choice: str) -> bool:
    """Whether find_library would have a library for this choice, as far as can be said without compiling and loading
    it: what a plan counts on. Raises ConfigError for a CXX that is no command."""
    if choice != "auto":
        return choice != "off"
    return _is_for_this_machine() and _compiler() is not None


def _is_for_this_machine() -> bool:
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def _why_not_here(library: Path) -> str | None:
    """Why the library does not run in this process, or None: asked once it is there, not when engines are finished."""
    try:
        name = ctypes.CDLL(str(library)).fly_cpu_kernels_name
    except (OSError, AttributeError) as error:  # both name the file
        return one_line(error)
    name.restype = ctypes.c_char_p
    if name() is not None:
        return None
    if asked := os.environ.get(ISA_VARIABLE):
        return f"{ISA_VARIABLE} {asked!r}: no kernels of this machine"
    return f"{library}: no kernels for this CPU, which need AVX2, FMA and F16C"


def _compiler() -> list[str] | None:
    """The command, of several words where CXX has them ("ccache g++"). Raises ConfigError where they are none."""
    asked = os.environ.get("CXX", "")
    try:
        command = shlex.split(asked)
    except ValueError as error:
        raise ConfigError(f"CXX {asked!r}: {error}: expected a command: correct it or unset it") from None
    for names in [command] if command else [[name] for name in COMPILERS]:
        if path := shutil.which(names[0]):
            return [path, *names[1:]]
    return None


def _compiled(compiler: list[str], report: Report) -> Path:
    folder = sources()
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((compiler, version, FLAGS, INSTRUCTIONS)).encode())
    for path in files:
        digest.update(repr(path.relative_to(folder)).encode() + path.read_bytes())
    library = cache_folder() / f"cpu-kernels-{digest.hexdigest()[:16]}" / LIBRARY_NAME
    if library.is_file():
        return library
    with new_file(library) as output:
        objects = {path: output.parent / f"{path.parent.name}.{path.stem}.o" for path in files if path.suffix == ".cpp"}
        commands = [
            [*compiler, *FLAGS, *_instructions(path), "-c", str(path), "-o", str(result)]
            for path, result in objects.items()
        ]
        _run_all(commands, report)
        link = [*compiler, "-shared", "-s", "-o", str(output), *map(str, objects.values())]
        _run_all([link], quietly)
    return library


def _instructions(source: Path) -> tuple[str, ...]:
    ends = [end for end in INSTRUCTIONS if source.stem.endswith(end)]
    return INSTRUCTIONS[max(ends, key=len)] if ends else ()


def _run_all(commands: Sequence[list[str]], report: Report) -> None:
    """Runs them, one on each core at a time. None is left running, however this ends. Raises _CompilerError."""
    running: set[subprocess.Popen[str]] = set()
    is_over = threading.Event()

    def run(command: list[str]) -> None:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.add(process)
        if is_over.is_set():  # too late to be seen by who ends the others
            process.kill()
        said = process.communicate()[0]
        if process.returncode:
            lines = [line.strip() for line in said.splitlines()] or [f"exit code {process.returncode}"]
            raise _CompilerError(next((line for line in lines if "error" in line), lines[0]))

    report(STEP, 0.0)
    with ThreadPoolExecutor(available_cores()) as pool:
        try:
            for done, _ in enumerate(pool.map(run, commands), 1):
                report(STEP, done / len(commands))
        except BaseException:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.kill()
            raise
