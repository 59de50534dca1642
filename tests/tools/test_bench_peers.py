"""The comparison with other programs: workers, turns and what is prepared, on a peer of a few lines of Python."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peers import environments
from peers.catalogue import PEERS, Peer
from peers.contest import Conditions, Contestant, Run
from peers.environments import Preparation, PreparationError
from peers.protocol import Settings
from peers.worker import Worker, WorkerError

ECHO_WORKER = """
import os, sys, time
from peers.protocol import Completion, Reading, UnavailableError, serve

class Echo:
    libraries = ("pytest",)

    def __init__(self, settings):
        if settings.mode == "unavailable":
            raise UnavailableError("this machine has no " + settings.precision)
        if settings.mode == "broken":
            raise ValueError("cannot load " + settings.target + "\\nand more")
        self.mode = settings.mode

    def generate(self, prompt, max_tokens):
        print("a library says hello")
        os.write(1, b"and another one, in C++\\n")
        if self.mode == "dies":
            os._exit(3)
        if self.mode == "hangs" and prompt != "first":
            time.sleep(60)
        return Completion(prompt.upper(), [1, 2], list(range(max_tokens)), 0.01)

    def read(self, prompts, num_tokens):
        return Reading.of(1.0, [1.0 + len(prompts), *(3.0 + len(prompts) + i / 4 for i in range(num_tokens - 1))])

serve(Echo)
"""
PROMPTS = ["first", "second"]


@pytest.fixture(autouse=True)
def echo_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module peers.echo_worker for the processes that a test starts, and no wait for those that hang."""
    module = tmp_path / "modules" / "peers" / "echo_worker.py"
    module.parent.mkdir(parents=True)
    module.write_text(ECHO_WORKER, encoding="utf-8")
    paths = f"{tmp_path / 'modules'}:{environments.ENVIRONMENT['PYTHONPATH']}"
    monkeypatch.setitem(environments.ENVIRONMENT, "PYTHONPATH", paths)
    monkeypatch.setattr("peers.worker.STOP_SECONDS", 0.2)
    monkeypatch.setattr("peers.contest.PAUSE_SECONDS", 0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def _settings(mode: str) -> Settings:
    return Settings(mode, "float32", "a target", "a draft", 1, 4)


def _worker(mode: str, tmp_path: Path, seconds: float = 30) -> Worker:
    return Worker(Path(sys.executable), "echo_worker", _settings(mode), tmp_path / "logs" / mode, seconds)


def _run(
    tmp_path: Path,
    checkpoint: Path,
    modes: list[str],
    how: str,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Contestant]:
    peer = Peer("echo", "echo_worker", tuple(modes), {"float32": ""})
    conditions = Conditions(checkpoint, checkpoint, checkpoint, 5, 2, 1, 4, 30)
    contestants = [Contestant(peer, mode, "float32") for mode in modes]
    getattr(Run(conditions, PROMPTS, tmp_path / "peers", say), how)(contestants)
    return {contestant.mode: contestant for contestant in contestants}


def test_what_libraries_print_does_not_disturb_the_answers(tmp_path: Path) -> None:
    with _worker("plain", tmp_path) as worker:
        answers = [worker.ask(prompt, 3, 30) for prompt in PROMPTS]
        assert worker.versions == {"pytest": pytest.__version__}
    assert [answer["text"] for answer in answers] == ["FIRST", "SECOND"]
    assert answers[0]["token_ids"] == [0, 1, 2]
    assert answers[0]["seconds"] > 0
    assert "in C++" in (tmp_path / "logs" / "plain").read_text()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("unavailable", "not available: this machine has no float32"),
        ("broken", "ValueError: cannot load a target: see .*broken"),
    ],
)
def test_a_worker_that_cannot_load_says_why_in_a_line(tmp_path: Path, mode: str, reason: str) -> None:
    with pytest.raises(WorkerError, match=reason):
        _worker(mode, tmp_path)


@pytest.mark.parametrize("how", ["side_by_side", "one_at_a_time"])
def test_every_mode_answers_every_prompt_in_every_round(tmp_path: Path, checkpoint: Path, how: str) -> None:
    lines: list[str] = []
    contestants = _run(tmp_path, checkpoint, ["plain", "speculative"], how, say=lines.append)
    for contestant in contestants.values():
        texts = [[answer["text"] for answer in answers] for answers in contestant.answers]
        assert texts == [["FIRST", "SECOND"]] * 2
        assert len(contestant.rates()) == 2
    for number, line in enumerate(lines[-2:]):
        rates = ", ".join(f"{contestant.name} {contestant.rates()[number]:.1f}" for contestant in contestants.values())
        assert line == f"round {number + 1} of 2: tokens/s of {rates}"


@pytest.mark.parametrize("how", ["side_by_side", "one_at_a_time"])
def test_who_dies_or_hangs_leaves_the_run_with_a_reason(
    tmp_path: Path, checkpoint: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Worker.ask

    def ask_briefly(worker: Worker, prompt: str, max_tokens: int, seconds: float) -> dict:
        """Only what hangs is not waited for: nobody else has to be quick."""
        hangs = "hangs" in worker._log.name and prompt != "first"
        return ask(worker, prompt, max_tokens, 0.2 if hangs else seconds)

    monkeypatch.setattr(Worker, "ask", ask_briefly)
    lines: list[str] = []
    contestants = _run(tmp_path, checkpoint, ["dies", "hangs", "plain"], how, say=lines.append)
    assert "ended with status 3" in contestants["dies"].reason
    assert "an answer took more than 0 s" in contestants["hangs"].reason
    assert contestants["plain"].reason is None
    assert len(contestants["plain"].answers[1]) == 2
    assert lines[-1].startswith("round 2 of 2: tokens/s of echo plain float32 ")
    assert lines[-1].endswith("; left the run: echo dies float32, echo hangs float32")


@pytest.mark.parametrize("how", ["side_by_side", "one_at_a_time"])
def test_prompts_are_read_alone_and_together(tmp_path: Path, checkpoint: Path, how: str) -> None:
    peer = Peer("echo", "echo_worker", ("plain",), {"float32": ""})
    contestant = Contestant(peer, "plain", "float32")
    conditions = Conditions(checkpoint, checkpoint, checkpoint, 5, 2, 1, 4, 30, 2)
    run = Run(conditions, [[[1] * 8], [[1] * 8, [2] * 8]], tmp_path / "peers", lambda line: None)
    getattr(run, how)([contestant])
    one, two = contestant.readings()
    assert (one["num_requests"], two["num_requests"]) == (1, 2)
    assert (one["seconds"], two["seconds"]) == (1, 2)
    assert (one["tokens_per_second"], two["tokens_per_second"]) == (8, 8)
    assert one["token_seconds"] == 0.25  # the median, whatever the first one waited for
    assert len(one["seconds_by_round"]) == 2
    assert contestant.record()["peak_memory_mib"] > 0


def _answer(text: str, num_tokens: int, seconds: float, prompt_token_ids: tuple[int, ...] = (1,)) -> dict:
    return {
        "text": text,
        "prompt_token_ids": list(prompt_token_ids),
        "token_ids": [0] * num_tokens,
        "first_token_seconds": None,
        "seconds": seconds,
        "peak_memory_mib": 10,
    }


def test_a_summary_is_the_median_of_the_rounds_beside_fly() -> None:
    checks = [{"kind": "number", "value": 5}, None]
    fly = Contestant(PEERS["fly-trt"], "fly", "int8", [[_answer("#### 5", 10, 0.1), _answer("", 10, 0.1)]] * 3)
    rounds = [[_answer("#### 4", 6, seconds), _answer("", 4, seconds, (1, 2))] for seconds in (0.1, 0.2, 0.5)]
    summary = Contestant(PEERS["transformers"], "plain", "float32", rounds).summary(checks, fly)
    assert summary["tokens_per_second"] == pytest.approx(25)
    assert summary["tokens_per_second_range"] == pytest.approx([10, 50])
    assert summary["ratio_to_fly"] == pytest.approx(0.25)
    assert (summary["num_right"], summary["num_checked"]) == (0, 1)
    assert summary["num_prompts_read_differently"] == 1
    assert fly.summary(checks, fly)["num_right"] == 1


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run, instead of running it."""
    commands: list[list[str]] = []
    monkeypatch.setattr(
        environments, "run_quietly", lambda command, what: commands.append([str(part) for part in command])
    )
    return commands


def test_an_environment_is_made_once_and_torch_comes_first(tmp_path: Path, commands: list[list[str]]) -> None:
    preparation = Preparation(tmp_path / "peers", lambda line: None)
    python = preparation.python(PEERS["openvino-genai"])
    assert preparation.python(PEERS["openvino-genai"]) == python
    assert [command[-1] for command in commands[1:2]] == ["torch==2.13.0"]
    assert len(commands) == 4  # the environment, torch, the peer, and what is removed


def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list, what: str) -> None:
        raise PreparationError(f"{what} failed: no network")

    monkeypatch.setattr(environments, "run_quietly", fail)
    with pytest.raises(PreparationError, match="no network"):
        Preparation(tmp_path / "peers", lambda line: None).python(PEERS["transformers"])
    assert list((tmp_path / "peers").iterdir()) == []


def test_a_program_that_fails_is_told_by_its_error(checkpoint: Path) -> None:
    program = "import sys; print('ERROR: no such package', file=sys.stderr); print('bye', file=sys.stderr); sys.exit(1)"
    with pytest.raises(PreparationError, match="installing x failed: ERROR: no such package"):
        environments.run_quietly([sys.executable, "-c", program], "installing x")


def test_a_checkpoint_is_converted_once_until_it_changes(
    tmp_path: Path, checkpoint: Path, commands: list[list[str]]
) -> None:
    peer, preparation = PEERS["onnxruntime-genai"], Preparation(tmp_path / "peers", lambda line: None)
    preparation.python(peer)
    commands.clear()
    first = preparation.model(peer, checkpoint, "int4")
    assert preparation.model(peer, checkpoint, "int4") == first
    assert len(commands) == 1
    assert preparation.model(peer, checkpoint, "float32") != first
    (checkpoint / "config.json").write_text('{"changed": true}', encoding="utf-8")
    assert preparation.model(peer, checkpoint, "int4") != first
    assert len(commands) == 3


def test_the_command_line_compares_the_modes_of_an_engine(
    demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_peers

    pair = Path(__file__).parents[1] / "assets" / "pair"
    arguments = ["--target", pair / "target", "--draft", pair / "draft", "--engine", demo_engine]
    arguments += ["--environments", tmp_path / "peers", "--peers", "fly-trt"]
    arguments += ["--num-prompts", 1, "--rounds", 1, "--json"]
    monkeypatch.setattr("sys.argv", ["bench_peers", *map(str, arguments)])
    bench_peers.main()
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    fly, exact, plain, lookup = record["results"]
    assert record["machine"]["threads"] >= 1
    assert record["machine"].keys() >= {"cpu", "instructions"}
    assert "round 1 of 1: tokens/s of fly-trt fly float32 " in printed.err
    assert (fly["mode"], fly["precision"], fly["ratio_to_fly"], fly["num_right"]) == ("fly", "float32", 1, 1)
    assert exact["texts"] == plain["texts"] == lookup["texts"]
    assert plain["num_prompts_read_differently"] == 0


def test_the_command_line_reads_prompts_of_any_length(
    demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_peers

    pair = Path(__file__).parents[1] / "assets" / "pair"
    arguments = ["--target", pair / "target", "--draft", pair / "draft", "--engine", demo_engine]
    arguments += ["--environments", tmp_path / "peers", "--peers", "fly-trt", "--one-at-a-time"]
    arguments += ["--prompt-tokens", "20,600", "--in-flight", "1,3", "--rounds", 1]
    monkeypatch.setattr("sys.argv", ["bench_peers", *map(str, arguments), "--json"])
    bench_peers.main()
    (row,) = json.loads(capsys.readouterr().out)["results"]
    shapes = [(each["num_requests"], each["num_prompt_tokens"]) for each in row["readings"]]
    assert shapes == [(1, 20), (1, 600), (3, 20), (3, 600)]
    for each in row["readings"]:
        assert each["seconds"] > 0
        assert each["token_seconds"] > 0
