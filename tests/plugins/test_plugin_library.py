"""The plugin library builds without warnings, its harness passes, and a plugin registry can make both plugins.

Needs TensorRT's headers (TENSORRT_ROOT or the system's) and nvcc, no GPU; where there is one, the harness launches too.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from kernel_library import find_nvcc

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "plugins/check"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library, built for one architecture, and everything that building and the harness printed."""
    directory = tmp_path_factory.mktemp("plugins")
    command = [CHECK / "plugins.sh", directory, "-DCMAKE_CUDA_ARCHITECTURES=90"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout.removeprefix("skipped: ").strip())
    assert done.returncode == 0, done.stdout
    return directory / "libfly_plugins.so", done.stdout


def test_the_library_builds_without_warnings(build: tuple[Path, str]) -> None:
    library, output = build
    assert library.is_file()
    assert "warning" not in output.lower(), output


def test_the_harness_passes(build: tuple[Path, str]) -> None:
    summary = re.search(r"^(\d+) checks, (\d+) failed", build[1], re.MULTILINE)
    assert summary is not None, build[1]
    assert int(summary[1]) > 1000
    assert int(summary[2]) == 0


def test_the_library_exports_its_two_entry_points_only(build: tuple[Path, str]) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm: install binutils")
    output = subprocess.check_output(["nm", "-D", "--defined-only", build[0]], text=True)
    assert {line.split()[-1] for line in output.splitlines()} == {"getCreators", "setLoggerFinder"}


def test_the_library_needs_no_tensorrt_library(build: tuple[Path, str]) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf: install binutils")
    output = subprocess.check_output(["readelf", "--dynamic", build[0]], text=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", output)
    assert needed
    assert not [name for name in needed if name.startswith(("libnvinfer", "libcuda"))]


def test_a_plugin_registry_makes_the_plugins(build: tuple[Path, str]) -> None:
    headers = re.search(r"TensorRT (\d+)\.\d+ headers", build[1])
    assert headers is not None
    if find_spec("tensorrt") is not None:
        installed = int(version("tensorrt").split(".")[0])
    elif find_spec("tensorrt_rtx") is not None:
        installed = 11  # whose interfaces TensorRT for RTX 1.7 has
    else:
        pytest.skip("no TensorRT for Python: pip install tensorrt or tensorrt-rtx")
    if int(headers[1]) != installed:
        pytest.skip(f"the headers are TensorRT {headers[1]}'s, the installed one has the interfaces of {installed}")
    output = subprocess.check_output([sys.executable, CHECK / "registry.py", build[0]], text=True)
    found = json.loads(output[output.index("{") :])
    assert found["creators"] == ["EntropyGate", "LooseWindowAccept", "PackedLooseAccept"]
    assert found["fields"] == {
        "EntropyGate": ["top_k"],
        "LooseWindowAccept": [],
        "PackedLooseAccept": [
            "entropy_threshold",
            "use_full_entropy",
            "entropy_top_k",
            "window",
            "lookahead",
            "vocab_size",
            "stop_token_ids",
        ],
    }
    assert found["plugins"] == {
        "EntropyGate": "fly::EntropyGate 2",
        "EntropyGate, top_k int32": "fly::EntropyGate 2",
        "EntropyGate, top_k int64": "fly::EntropyGate 2",
        "EntropyGate, top_k 9": None,
        "LooseWindowAccept": "fly::LooseWindowAccept 2",
        "PackedLooseAccept": "fly::PackedLooseAccept 2",
        "PackedLooseAccept, as fly-build makes it": "fly::PackedLooseAccept 2",
        "PackedLooseAccept, entropy_threshold -1": None,
    }


LINKED_PROGRAM = """
#include <NvInferRuntime.h>
#include <cstdio>
#include <initializer_list>
extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept;
int main() {
    for (char const* const name : {"EntropyGate", "LooseWindowAccept", "PackedLooseAccept"}) {
        std::printf("%d", getPluginRegistry()->getCreator(name, "2", "fly") != nullptr);
    }
}
"""


def test_a_program_that_loads_no_plugins_gets_them_where_it_is_asked_for(
    build: tuple[Path, str], tmp_path: Path
) -> None:
    """As TensorRT-LLM's worker does: it is linked to TensorRT, for which TensorRT for RTX stands in."""
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no TensorRT for RTX: pip install tensorrt-rtx")
    headers = re.search(r"TensorRT (\d+)\.\d+ headers: (.*)", build[1])
    assert headers is not None
    if headers[1] != "11":
        pytest.skip(f"the headers are TensorRT {headers[1]}'s, TensorRT for RTX has the interfaces of 11")
    folder = spec.submodule_search_locations[0]
    (tmp_path / "program.cpp").write_text(LINKED_PROGRAM)
    nvcc = find_nvcc()
    assert nvcc is not None
    program = tmp_path / "program"
    linked = f"-Xlinker={folder}/libtensorrt_rtx.so.1,-rpath={folder},--allow-shlib-undefined"
    options = ["-std=c++17", f"-I{headers[2].strip()}", linked]
    subprocess.run([nvcc, tmp_path / "program.cpp", "-o", program, *options], check=True)
    for asked, found in (("1", "111"), ("0", "000"), (None, "000")):
        environment = {**os.environ, "LD_PRELOAD": str(build[0])}
        environment |= {} if asked is None else {"FLY_TRT_REGISTER_PLUGINS": asked}
        assert subprocess.check_output([program], env=environment, text=True) == found
    environment = {**os.environ, "LD_PRELOAD": str(build[0]), "FLY_TRT_REGISTER_PLUGINS": "1"}
    assert subprocess.check_output(["echo", "without TensorRT"], env=environment, text=True) == "without TensorRT\n"


def test_without_headers_the_check_is_skipped_and_says_what_to_set(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "CPATH": ""}
    environment.pop("TENSORRT_ROOT", None)
    done = subprocess.run([CHECK / "plugins.sh", tmp_path], capture_output=True, text=True, env=environment)
    if not done.stdout.startswith("skipped: "):
        pytest.skip("this system has TensorRT headers")
    assert done.returncode == 0
    assert done.stdout == "skipped: no TensorRT headers: set TENSORRT_ROOT\n"
