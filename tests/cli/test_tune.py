"""fly-tune as a user runs it."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from eval_prompts import load_eval_prompts
from fly_trt.cli.tune import main
from fly_trt.manifest import read_manifest
from fly_trt.tuning.result import TuningResult

QUICK = ("--method", "ngram", "--acceptance", "exact", "--candidates", "3", "--max-tokens", "8", "--num-threads", "1")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    check = {"kind": "regex", "value": "."}
    path.write_text(
        "".join(json.dumps({"prompt": p["prompt"], "check": check}) + "\n" for p in load_eval_prompts()[:8])
    )
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shown(demo_engine: Path, prompts: Path) -> Result:
    """The first run, in the folder of the prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prompts.parent)
        return run(demo_engine, "--prompts", prompts, *QUICK)


@pytest.fixture(scope="module")
def state(demo_engine: Path, prompts: Path, shown: Result) -> Path:
    """What it kept."""
    return prompts.parent / f"fly-tune-{demo_engine.name}.jsonl"


def test_a_table_and_the_finding_are_printed(shown: Result) -> None:
    assert shown.exit_code == 0, shown.output
    assert "2 prompts chose and 6 judged, by checks, seed 0" in words(shown.stdout)
    for name in ("plain", "default (multi_level+fly)"):
        assert name in words(shown.stdout)
    assert shown.stderr == ""


def test_json_and_a_page_are_made_of_the_same_measurements(
    demo_engine: Path, prompts: Path, shown: Result, state: Path, tmp_path: Path
) -> None:
    measured = state.read_bytes()
    more = ("--json", "--html", tmp_path / "report.html", "-o", tmp_path / "report.json")
    again = run(demo_engine, "--prompts", prompts, *QUICK, "--state", state, *more)
    assert again.exit_code == 0, again.output
    assert state.read_bytes() == measured
    assert f"{state.name}: goes on with what was measured" in again.stderr
    result = TuningResult.from_json(again.stdout)
    assert result.verdict.sentences[0] in words(shown.stdout)
    assert TuningResult.from_json((tmp_path / "report.json").read_text()) == result
    assert result.chosen.candidate.name in (tmp_path / "report.html").read_text()


def test_what_is_written_is_what_was_chosen_or_nothing(
    demo_engine: Path, prompts: Path, state: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(demo_engine, engine)
    shown = run(engine, "--prompts", prompts, *QUICK, "--state", state, "--write", "--json")
    result, tuning = TuningResult.from_json(shown.stdout), read_manifest(engine).tuning
    if result.verdict.kind in ("found", "default_stays"):
        assert shown.exit_code == 0
        assert tuning is not None
        assert tuning.setting.items() >= dict(result.chosen.candidate.settings).items()
        assert tuning.speedup_over_plain > 1
    else:
        assert shown.exit_code == 1
        assert "nothing was written: no setting qualified" in shown.stderr
        assert tuning is None


def test_a_page_that_cannot_be_written_does_not_cost_the_table(
    demo_engine: Path, prompts: Path, state: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    again = run(demo_engine, "--prompts", prompts, *QUICK, "--state", state, "--html", tmp_path / "file" / "x.html")
    assert again.exit_code == 2
    assert "x.html" in again.stderr.splitlines()[-1]
    assert "2 prompts chose and 6 judged" in words(again.stdout)


def words(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompts", "{prompts}"], "nowhere: no such engine directory"),
        (["{engine}", "--prompts", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
        (["{engine}", "--prompts", "{engine}/fly.json"], "fly.json:1: not JSON"),
        (["{engine}", "--prompts", "{prompts}", "--method", "medusa"], "method 'medusa': expected one of"),
        (["{engine}", "--prompts", "{prompts}", "--acceptance", "fry"], "acceptance 'fry': expected one of"),
        (["{engine}", "--prompts", "{prompts}", "--judge", "taste"], "judge 'taste'"),
        (["{engine}", "--prompts", "{prompts}", "--min-retention", "99"], "min_retention 99: expected a share"),
        (["{engine}", "--prompts", "{prompts}", "--budget", "0"], "budget 0: expected minutes"),
        (["{engine}", "--prompts", "{prompts}", "--state", "{prompts}"], "prompts.jsonl: not a state of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    demo_engine: Path,
    prompts: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(argument.format(engine=demo_engine, prompts=prompts) for argument in arguments))
    assert result.exit_code == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("fly-tune: ")
    assert message in line


def start(engine: Path, prompts: Path, state: Path, *more: str, **streams: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "fly_trt.cli.tune", str(engine), "--prompts", str(prompts), "--state", str(state)]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        return subprocess.Popen([*command, *more], env={**os.environ, "COLUMNS": "200"}, **streams)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(demo_engine: Path, prompts: Path, tmp_path: Path) -> None:
    """On a terminal, which is where progress is shown."""
    terminal, stderr = pty.openpty()
    state = tmp_path / "state.jsonl"
    process = start(demo_engine, prompts, state, *QUICK, "--max-tokens", "99", stdout=subprocess.PIPE, stderr=stderr)
    os.close(stderr)
    seen = b""
    while not (state.exists() and b'"measured"' in state.read_bytes()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    while b"fly-tune: interrupted, what was measured is kept: the same command goes on" not in seen:
        seen += os.read(terminal, 4096)
    assert process.wait(60) == 130
    assert process.stdout.read() == b""
    process.stdout.close()
    os.close(terminal)
    assert b"search 0" in seen
    lines = [json.loads(line) for line in state.read_text().splitlines()]
    assert not any("finished" in line for line in lines)


@pytest.mark.long
def test_killed_again_and_again_it_comes_to_an_end(demo_engine: Path, prompts: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    random = np.random.default_rng(0)
    measured, num_kills, is_done = b"", 0, False
    while not is_done:
        flags = (*QUICK, "--budget", "1000", "--json")
        process = start(demo_engine, prompts, state, *flags, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        enough = len(measured) + int(random.integers(1, 4000))  # a block has about 900 bytes
        while process.poll() is None and not (state.exists() and state.stat().st_size >= enough):
            time.sleep(float(random.uniform(0, 0.02)))
        process.kill()
        stdout, _ = process.communicate()
        is_done = process.returncode == 0
        num_kills += not is_done
        whole = measured[: measured.rfind(b"\n") + 1]
        measured = state.read_bytes()
        assert measured.startswith(whole)
    assert num_kills > 1
    result = TuningResult.from_json(stdout.decode())
    assert len(result.search_prompts) + len(result.judge_prompts) == 8


def test_help_has_examples_and_the_form_of_a_prompt() -> None:
    text = run("--help").stdout
    for words in ("Examples:", '{"prompt": "The capital of France?"', "the same command", "multi_level", "margin"):
        assert words in text
