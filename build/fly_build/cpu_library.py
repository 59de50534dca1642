"""The library of operators for ONNX Runtime on the CPU (plugins/cpu): compiled once for each compiler and source, kept
in the user's cache, and copied into the engine directories that need it.

It runs on any x86-64 machine with AVX2: which vector units it uses is decided where it is loaded. Without a compiler,
or on another machine, engines are built for ONNX Runtime's own operators.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fly_trt.engines.tensorrt_library import cache_folder
from fly_trt.errors import ConfigError
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


def sources() -> Path:
    """The folder of the sources: of a clone, or of the installed package."""
    here = Path(__file__).parent
    return next((path for path in (here / "cpu_sources", here.parents[1] / "plugins/cpu") if path.is_dir()), here)


def find_library(choice: str) -> Path | None:
    """The compiled library; None where there is to be none. `choice` is a recipe's `cpu_kernels`. Raises ConfigError
    for a file that is not there."""
    if choice == "off":
        return None
    if choice != "auto":
        if not (library := Path(choice)).is_file():
            raise ConfigError(f"cpu_kernels {choice!r}: no such file: expected auto, off, or a compiled {LIBRARY_NAME}")
        return library
    compiler = _compiler()
    if platform.machine() not in ("x86_64", "AMD64") or compiler is None:
        return None
    try:
        return _compiled(compiler)
    except (subprocess.CalledProcessError, OSError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        logger.warning("built without own CPU kernels: %s failed: %s", compiler, reason.strip().splitlines()[0])
        return None


def _compiler() -> str | None:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def _compiled(compiler: str) -> Path:
    folder = sources()
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h"))
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((compiler, version, FLAGS, INSTRUCTIONS)).encode())
    for path in files:
        digest.update(path.read_bytes())
    library = cache_folder() / f"cpu-kernels-{digest.hexdigest()[:16]}" / LIBRARY_NAME
    if library.is_file():
        return library
    with new_file(library) as output:
        compiled = [path for path in files if path.suffix == ".cpp"]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(lambda path: _compile(compiler, path, output.parent), compiled))
        link = [compiler, "-shared", "-s", "-o", str(output), *map(str, objects)]
        subprocess.run(link, check=True, capture_output=True, text=True)
    return library


def _compile(compiler: str, source: Path, folder: Path) -> Path:
    ends = [end for end in INSTRUCTIONS if source.stem.endswith(end)]
    flags = INSTRUCTIONS[max(ends, key=len)] if ends else ()
    result = folder / f"{source.parent.name}.{source.stem}.o"
    command = [compiler, *FLAGS, *flags, "-c", str(source), "-o", str(result)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return result
