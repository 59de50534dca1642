"""plugins/check/node.sh on a machine without a GPU: what can run runs, the rest says what it needs, and a run that was
interrupted goes on. What its checks find needs GPUs."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import node

CHECKS = Path(node.__file__).parent
needs_no_gpu = pytest.mark.skipif(bool(node._lines(["nvidia-smi", "-L"])), reason="of a machine without a GPU")


def run_node(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"{CHECKS}/node.py", "--out", f"{out}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@needs_no_gpu
def test_without_a_gpu_the_rest_is_skipped_with_what_it_needs(tmp_path: Path) -> None:
    finished = run_node("--only", "ranks-2", "kernels", out=tmp_path)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "node.json").read_text())
    found = {check["name"]: check for check in report["checks"]}
    assert found["checkpoint-small"]["status"] == "passed"  # ranks-2 comes after it
    assert (tmp_path / "checkpoints" / "small" / "config.json").is_file()
    assert found["ranks-2"]["reason"] == "needs 2 GPUs, found 0"
    assert found["kernels"]["reason"] == "needs 1 GPU, found 0"
    assert found["engines"]["reason"] == "not asked for"
    assert report["node"]["gpus"] == []
    again = run_node("--only", "ranks-2", out=tmp_path)
    assert "checkpoint-small ..." not in again.stderr
    assert json.loads((tmp_path / "checkpoint-small.json").read_text()) == found["checkpoint-small"]


def test_all_commands_of_all_checks_are_there(tmp_path: Path) -> None:
    """Scripts exist, and the flags of those that can be asked are known to them."""
    listed = run_node("--list", out=tmp_path).stdout.split("\n")
    assert len([line for line in listed if line]) > 15
    assert not any(tmp_path.iterdir())
    arguments = node.parser().parse_args(["--out", str(tmp_path)])
    helps: dict[str, str] = {}
    for check in node.checks(arguments):
        for command in check.commands:
            program = command[: 3 if "-m" in command else 2 if command[0] == sys.executable else 1]
            assert "-m" in program or Path(program[-1]).is_file()
            if program[0] != sys.executable:
                continue
            name = program[-1]
            if name not in helps:
                asked = [*program, "--help"]
                helps[name] = subprocess.run(
                    asked, capture_output=True, text=True, check=True, env=node.environment()
                ).stdout
            for flag in command[len(program) :]:
                assert not flag.startswith("--") or flag in helps[name], f"{name} has no {flag}"


@pytest.mark.parametrize(
    ("code", "status", "reason", "result"),
    [
        ("print('words'); print('[1, 2]')", "passed", "", [1, 2]),
        ("print('{'); print('\"a\": 1}')", "passed", "", {"a": 1}),
        ("print('words')", "passed", "", None),
        ("import sys; print('{}'); sys.exit(3)", "failed", "exit status 3, see", {}),
    ],
)
def test_a_finding_has_what_its_command_printed(
    code: str, status: str, reason: str, result: object, tmp_path: Path
) -> None:
    finding = node.run(node.Check("one", [python("print(1)"), python(code)]), tmp_path, timeout=60)
    assert (finding.status, finding.result) == (status, result)
    assert finding.reason.startswith(reason)
    assert "print(1)" in (tmp_path / "one.log").read_text()


def test_nothing_runs_after_a_command_that_failed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    commands = [python("raise SystemExit(1)"), python(f"open({str(marker)!r}, 'w')")]
    assert node.run(node.Check("one", commands), tmp_path, timeout=60).status == "failed"
    assert not marker.exists()


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    finding = node.run(node.Check("one", [python(hang)]), tmp_path, timeout=1)
    assert (finding.status, finding.reason) == ("failed", "took longer than 1 s")


def test_what_runs_ends_with_it(tmp_path: Path) -> None:
    """As a scheduler ends it."""
    command = [sys.executable, f"{CHECKS}/node.py", "--out", f"{tmp_path}", "--only", "checkpoint-small"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: running(tmp_path) - {process.pid})
        process.terminate()
        assert "the same command goes on" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    wait_until(lambda: not running(tmp_path))


def running(path: Path) -> set[int]:
    """The processes that have it among their arguments."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(path).encode() in process.joinpath("cmdline").read_bytes():
                found.add(int(process.name))
    return found


def wait_until(is_met: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not is_met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_packages_that_share_a_module_are_told_apart() -> None:
    check = node.Check("one", [], 0, modules=("json",), packages=("fly-trt-of-another-kind",))
    assert check.missing(0) == "the Python package fly-trt-of-another-kind"


def test_a_check_that_failed_runs_again_and_one_that_passed_does_not(tmp_path: Path) -> None:
    arguments = node.parser().parse_args(["--out", str(tmp_path)])
    counts = tmp_path / "counts"
    passing, failing = (
        node.Check(name, [python(f"open({str(counts)!r}, 'a').write({name!r}); raise SystemExit({status})")], 0)
        for name, status in (("p", 0), ("f", 1))
    )
    for _ in range(3):
        findings = [node._find(check, arguments, 0, []) for check in (passing, failing)]
        assert [finding.status for finding in findings] == ["passed", "failed"]
    assert counts.read_text() == "pfff"


def test_what_comes_after_a_failed_check_is_skipped(tmp_path: Path) -> None:
    arguments = node.parser().parse_args(["--out", str(tmp_path)])
    later = node.Check("later", [python("")], 0, after=("first",))
    assert node._find(later, arguments, 0, [node.Finding("first", "failed")]).reason == "needs first to pass"
    assert node._find(later, arguments, 0, [node.Finding("first", "passed")]).status == "passed"
