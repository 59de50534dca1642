"""Ctrl-C while a command's libraries load: one line and exit code 130, whichever of them is being loaded."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# As an installed script does it; the signal comes exactly when the library is looked for.
PROGRAM = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == library:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

library, ignores = sys.argv[1], sys.argv[2] == "ignored"
sys.argv[1:] = sys.argv[3:]
signal.signal(signal.SIGINT, signal.SIG_IGN if ignores else signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
from {module} import {function}
{function}()
"""
TARGET = str(ROOT / "tests" / "assets" / "pair" / "target")
ARGUMENTS = {
    "fly-bench": ["nowhere"],
    "fly-build": ["--target", TARGET, "-o", "nowhere"],
    "fly-generate": ["nowhere", "x"],
    "fly-inspect": ["nowhere"],
    "fly-serve": ["nowhere", "--port", "0"],
    "fly-triton": ["nowhere", "-o", "nowhere"],
    "fly-tune": ["nowhere", "--prompts", "nowhere"],
}
FIRST = ("click", "numpy", "fly_trt.params")
LATER = {
    "fly-bench": ["fly_trt.benchmark.plot", "tokenizers"],
    "fly-build": ["rich", "fly_build.recipe", "torch"],
    "fly-generate": ["tokenizers", "jinja2", "fly_trt.llm"],
    "fly-inspect": ["fly_trt.inspection.sources", "click"],
    "fly-serve": ["uvicorn", "fastapi", "fly_trt.serving.openai.app"],
    "fly-triton": ["rich", "fly_trt.serving.triton.repository"],
    "fly-tune": ["rich", "scipy", "fly_trt.tuning.tune"],
}


def start(command: str, library: str, tmp_path: Path, *arguments: str, signal: str = "taken") -> subprocess.Popen:
    module, _, function = SCRIPTS[command].partition(":")
    program = PROGRAM.replace("{module}", module).replace("{function}", function)
    return subprocess.Popen(
        [sys.executable, "-c", program, library, signal, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "build")))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_command_is_here() -> None:
    assert SCRIPTS.keys() == ARGUMENTS.keys() == LATER.keys()


@pytest.mark.parametrize("command", SCRIPTS)
def test_an_interrupt_while_libraries_load_is_one_line(command: str, tmp_path: Path) -> None:
    libraries = [*FIRST, *LATER[command]]
    started = [start(command, library, tmp_path, *ARGUMENTS[command]) for library in libraries]
    for library, process in zip(libraries, started, strict=True):
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (130, ""), f"{library}: {errors}"
        (line,) = errors.strip().splitlines()
        assert line.startswith(f"{command}: interrupted"), library
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_command_that_is_told_to_ignore_interrupts_goes_on(command: str, tmp_path: Path) -> None:
    """nohup, and the background jobs of a shell."""
    process = start(command, "click", tmp_path, "--help", signal="ignored")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert "Usage:" in output


def test_the_package_offers_its_names_before_it_loads_anything() -> None:
    code = (
        "import sys, fly_trt; loaded = {'numpy', 'tokenizers', 'pydantic'} & sys.modules.keys();"
        "print(sorted(loaded), sorted(fly_trt.__all__) == sorted(n for n in dir(fly_trt) if n in fly_trt.__all__),"
        " all(getattr(fly_trt, name) for name in fly_trt.__all__), hasattr(fly_trt, 'no_such_name'))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[] True True False\n"
