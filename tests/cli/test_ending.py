"""Every command ends with one line and an exit code: at an error of the system as at one of its own, and at SIGTERM as
at Ctrl-C.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import fly_build.cli
import fly_trt.cli.bench
import fly_trt.cli.generate
import fly_trt.cli.triton
import fly_trt.cli.tune
from fly_trt.cli.ending import Terminated, ending_in_one_line
from fly_trt.errors import ConfigError

COMMANDS = {
    "fly-build": fly_build.cli,
    "fly-generate": fly_trt.cli.generate,
    "fly-bench": fly_trt.cli.bench,
    "fly-triton": fly_trt.cli.triton,
    "fly-tune": fly_trt.cli.tune,
}
ARGUMENTS = {
    "fly-build": ["demo"],
    "fly-generate": ["engines/demo", "prompt"],
    "fly-bench": ["engines/demo"],
    "fly-triton": ["engines/demo", "-o", "out"],
    "fly-tune": ["engines/demo", "--prompts", "prompts.jsonl"],
}
# A command that says when it has begun, and then waits for a signal.
WAITING = """
import signal, sys
from pathlib import Path
from fly_trt.cli.ending import ending_in_one_line
from fly_trt.files import new_directory
with ending_in_one_line("fly-command", when_interrupted="interrupted, nothing was written"):
    with new_directory(Path(sys.argv[1])) as workspace:
        (workspace / "half").touch()
        print("begun", flush=True)
        while True:
            signal.pause()
"""


def _ended(error: BaseException, **options: bool) -> Result:
    @click.command()
    def command() -> None:
        with ending_in_one_line("fly-command", **options):
            raise error

    return CliRunner().invoke(command)


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (ConfigError("x: 1: use 2"), 2, "fly-command: x: 1: use 2\n"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "fly-command: a/b: No such file or directory\n"),
        (OSError(28, "No space left on device"), 2, "fly-command: No space left on device: free some space, or write "),
        (OSError(27, "File too large", "x"), 2, "fly-command: x: File too large: raise the limit on file sizes"),
        (OSError("several\nlines"), 2, "fly-command: several lines\n"),
        (KeyboardInterrupt(), 130, "fly-command: interrupted\n"),
        (Terminated(), 143, "fly-command: terminated\n"),
    ],
)
def test_error_is_one_line_and_an_exit_code(error: BaseException, exit_code: int, line: str) -> None:
    result = _ended(error)
    assert result.exit_code == exit_code
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_interrupt_in_the_middle_of_a_line_begins_a_new_one() -> None:
    assert _ended(KeyboardInterrupt(), streams=True).stderr == "\nfly-command: interrupted\n"


def test_error_of_the_program_itself_keeps_its_traceback() -> None:
    assert isinstance(_ended(ValueError("a mistake")).exception, ValueError)


@pytest.mark.parametrize("name", COMMANDS)
def test_system_error_in_any_command_is_one_line_with_exit_code_2(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(COMMANDS[name], "_run", fail)
    result = CliRunner().invoke(COMMANDS[name].main, ARGUMENTS[name])
    assert (result.exit_code, result.stderr) == (2, f"{name}: somewhere: Permission denied\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_sigterm_unwinds_any_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unwound = []

    def end_itself(*arguments: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # an impatient second one
            unwound.append(name)

    monkeypatch.setattr(COMMANDS[name], "_run", end_itself)
    result = CliRunner().invoke(COMMANDS[name].main, ARGUMENTS[name])
    assert unwound == [name]
    assert result.exit_code == 143
    assert result.stderr.strip().startswith(f"{name}: terminated")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handler_of_the_program_around_it_stays_in_charge() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with ending_in_one_line("fly-command"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_output_that_is_full_is_one_line() -> None:
    code = "import click; from fly_trt.cli.ending import *\nwith ending_in_one_line('fly-command'): click.echo('text')"
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("fly-command: No space left on device: free some space")


def _started(output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WAITING, str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    process = _started(tmp_path / "out")
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert stderr == "fly-command: terminated, nothing was written\n"
    assert list(tmp_path.iterdir()) == []
