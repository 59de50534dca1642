"""How the library of plugins/cpu comes about: compiled once, told about, and left out with a word where there is no
compiler. The compilers here are scripts that do as they are told."""

import json
import logging
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from hatchling.builders.wheel import WheelBuilder

from fly_build.cli import main
from fly_build.cpu_library import LIBRARY_NAME, STEP, find_library, sources
from fly_trt.errors import ConfigError
from tiny_models import TinyPair

ROOT = Path(__file__).parents[2]
# Note each call; what is written is a library that exists, or an empty file.
COMPILES = 'echo "$*" >> {calls}; while [ $# -gt 0 ]; do [ "$1" = -o ] && cp {library} "$2"; shift; done'
COMPILES_NOTHING = COMPILES.replace("cp {library}", ": >")
REFUSES = 'case "$1" in --version) ;; *) echo In main; echo "a.cpp:7: error: no such flag" >&2; exit 1;; esac'
WAITS = 'case "$1" in --version) ;; *) echo $$ >> {calls}; exec sleep 600;; esac'


class Compiler:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self._calls = folder / "compiler", folder / "calls"
        monkeypatch.setenv("CXX", str(self.path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))

    def does(self, script: str, library: Path | None = None) -> None:
        self.path.write_text(f"#!/bin/sh\n{script.format(calls=self._calls, library=library)}\n")
        self.path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [line for line in lines if line != "--version"]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(tmp_path, monkeypatch)


@pytest.fixture
def working_compiler(compiler: Compiler, cpu_library: Path) -> Compiler:
    compiler.does(COMPILES, cpu_library)
    return compiler


def test_each_source_is_compiled_once_with_the_instructions_of_its_kind(working_compiler: Compiler) -> None:
    library = find_library("auto")
    assert library is not None
    assert library.name == LIBRARY_NAME
    assert library.is_file()
    *compiled, linked = working_compiler.calls
    assert len(compiled) == len(list(sources().rglob("*.cpp")))
    [plain] = [call for call in compiled if "dispatch.cpp" in call]
    assert "-mavx" not in plain
    [vnni] = [call for call in compiled if "kernels_avx512_vnni.cpp" in call]
    assert "-mavx512vnni" in vnni
    assert "-shared" in linked
    assert find_library("auto") == library
    assert len(working_compiler.calls) == len(compiled) + 1
    assert [path.name for path in library.parent.iterdir()] == [LIBRARY_NAME]


def test_it_is_told_how_far_compiling_is(working_compiler: Compiler) -> None:
    heard: list[tuple[str, float]] = []
    find_library("auto", lambda step, fraction: heard.append((step, fraction)))
    assert {step for step, _ in heard} == {STEP}
    fractions = [fraction for _, fraction in heard]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)


def test_a_compiler_may_be_several_words(working_compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{working_compiler.path} --through")
    assert find_library("auto") is not None
    assert all(call.startswith("--through ") for call in working_compiler.calls)


def test_a_compiler_that_is_no_command_is_an_error_and_one_without_words_is_none(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", 'g++ "')
    with pytest.raises(ConfigError, match="No closing quotation: expected a command: correct it or unset it"):
        find_library("auto")
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_library("auto") is None
    assert caplog.messages[0].startswith("no C++ compiler: not found")


def test_without_a_compiler_there_is_none_and_a_line_says_how_to_get_one(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_library("auto") is None
    assert f"{compiler.path}: not found" in caplog.messages[0]
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_library("auto") is None
    assert "no C++ compiler" in caplog.messages[1]
    assert "apt install g++" in caplog.messages[1]


def test_what_a_compiler_refuses_is_said_in_one_line(compiler: Compiler, caplog: pytest.LogCaptureFixture) -> None:
    compiler.does(REFUSES)
    with caplog.at_level(logging.WARNING):
        assert find_library("auto") is None
    [message] = caplog.messages
    assert "a.cpp:7: error: no such flag" in message
    assert "\n" not in message


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "aarch64")])
def test_on_other_machines_there_is_none_and_a_line_says_so(
    working_compiler: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    system: str,
    machine: str,
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with caplog.at_level(logging.INFO):
        assert find_library("auto") is None
    [message] = caplog.messages
    assert message.startswith(f"{system} on {machine}: no kernels for this machine, so built for ONNX Runtime's own")
    assert working_compiler.calls == []


def test_it_compiles_where_the_system_does_not_say_which_cores_there_are(
    working_compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    assert find_library("auto") is not None


def test_what_is_compiled_and_does_not_load_is_left_out_with_a_word(
    compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.does(COMPILES_NOTHING)
    assert find_library("auto") is None
    [message] = caplog.messages
    assert f"{LIBRARY_NAME}: file too short, so built for ONNX Runtime's own operators" in message


def test_what_has_no_kernels_for_this_processor_is_left_out_unless_it_is_given(
    working_compiler: Compiler, cpu_library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLY_TRT_CPU_ISA", "of another machine")
    assert find_library("auto") is None
    assert caplog.messages[0].startswith("FLY_TRT_CPU_ISA 'of another machine': no kernels of this machine, so built")
    assert find_library(str(cpu_library)) == cpu_library


def test_none_is_made_where_none_is_wanted_and_a_missing_file_is_an_error(
    working_compiler: Compiler, tmp_path: Path
) -> None:
    assert find_library("off") is None
    with pytest.raises(ConfigError, match="no such file: expected auto, off, or a compiled"):
        find_library(str(tmp_path / "nowhere.so"))
    assert working_compiler.calls == []


def test_two_processes_make_one_library(compiler: Compiler, cpu_library: Path) -> None:
    compiler.does("sleep 0.01; " + COMPILES, cpu_library)
    command = [sys.executable, "-c", "from fly_build.cpu_library import find_library; print(find_library('auto'))"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT / "build") for _ in range(2)]
    first, second = [process.communicate()[0].strip() for process in processes]
    assert first == second
    assert [path.name for path in Path(first).parent.iterdir()] == [LIBRARY_NAME]


def is_running(pid: int) -> bool:
    """Not one that has ended and that nobody has asked for its end yet."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_leaves_no_compiler_and_no_file(compiler: Compiler, tmp_path: Path) -> None:
    compiler.does(WAITS)
    # Where tests run in the background of a shell, Ctrl-C is ignored, and what they start would inherit that.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += (
        "from fly_build.cpu_library import find_library; find_library('auto', lambda *_: print('on', flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT / "build"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    while not compiler.calls:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate()[1]
    while any(map(is_running, map(int, compiler.calls))):  # for good, if it is not ended
        time.sleep(0.01)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_dry_run_compiles_nothing(working_compiler: Compiler, tiny_pair: TinyPair, tmp_path: Path) -> None:
    arguments = ["--target", str(tiny_pair.target), "--quantization", "int8", "--dry-run", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert working_compiler.calls == []


def test_fly_build_says_that_this_machine_has_no_kernels(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    arguments = ["--target", str(tiny_pair.target), "--max-seq-len", "64", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: Linux on riscv64: no kernels for this machine")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ["float16", "float32"]),
        (("--cpu-kernels", "off"), ["float32", "float32"]),
        (("--quantization", "none"), ["float32", "float32"]),
    ],
)
def test_a_dry_run_counts_the_cache_that_will_be_built(
    compiler: Compiler, tiny_pair: TinyPair, tmp_path: Path, flags: tuple[str, ...], expected: list[str]
) -> None:
    """Heads of the tiny draft have 8 channels, which are no multiple of 16."""
    compiler.does(COMPILES_NOTHING)
    models = ["--target", str(tiny_pair.target), "--draft", str(tiny_pair.draft)]
    arguments = [*models, "--quantization", "int8", *flags, "-o", str(tmp_path / "out"), "--dry-run", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)["models"]
    assert [model["kv_cache_dtype"] for model in planned] == expected
    sizes = [
        {"float16": 2, "float32": 4}[dtype] * 2 * 2 * model["head_dim"] * 128
        for dtype, model in zip(expected, planned, strict=True)
    ]
    assert [model["kv_bytes_per_slot"] for model in planned] == sizes
    compiler.path.unlink()
    without = json.loads(CliRunner().invoke(main, arguments).stdout)["models"]
    assert {model["kv_cache_dtype"] for model in without} == {"float32"}


@pytest.mark.long
def test_an_engine_is_built_without_a_compiler_and_says_so(
    compiler: Compiler, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    result = CliRunner().invoke(
        main, ["--target", str(tiny_pair.target), "--quantization", "int8", "--max-seq-len", "64", "-o", str(output)]
    )
    assert result.exit_code == 0, result.output
    assert "warning: " in result.stderr
    assert "apt install g++" in result.stderr
    assert not list(output.rglob(LIBRARY_NAME))


def test_a_wheel_brings_the_sources(tmp_path: Path) -> None:
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    for path in sources().rglob("*"):
        if path.is_file():
            assert f"fly_build/cpu_sources/{path.relative_to(sources())}" in names
