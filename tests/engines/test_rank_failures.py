"""How engines of several ranks end: whoever dies, at whatever moment, there is one line for the callers, and no hang,
no process and no zombie is left. GPUs and their library are simulated; processes, signals and sockets are real.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import simulated_nccl
from fly_trt import LLM, EngineDeadError, EngineError, LoadedEngines, SamplingParams
from fly_trt.engines import rank_group
from fly_trt.engines.tensorrt import TensorRTEngine
from simulated_cuda import Error, SimulatedCuda
from simulated_ranks import BROKEN, rank_processes

PROGRAM = Path(__file__).parents[1] / "ranked_program.py"
SIZES: dict[str, Any] = {"max_batch_size": 2, "max_seq_len": 300}
LONG = SamplingParams(max_tokens=160, ignore_eos=True)
PROMPT = "### Instruction:\nSpell out: 21.\n### Response:\n"
SECONDS = 60.0  # nothing here takes nearly as long
KILLED = r"rank [1-3] \(process \d+, device [1-3]\) was killed by SIGKILL: all ranks were ended, load the engines again"
STOPPED = rf"(prompts\[\d\]: )?the engine stopped after an error \({KILLED}\): make a new one"


def wait_until(is_met: Any, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_met():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def serve(engine_dir: Path, told: list[str], is_loaded: threading.Event) -> None:
    """Loads and serves until that fails; `told` takes what each caller is told."""
    try:
        with LLM(engine_dir, **SIZES) as llm:
            is_loaded.set()
            with pytest.raises(EngineError) as caught:
                serve_on(llm)
            told.append(str(caught.value))
            with pytest.raises(EngineDeadError) as caught:
                llm.generate(PROMPT, LONG)
            told.append(str(caught.value))
    except EngineError as error:
        told.append(str(error))


def serve_on(llm: LLM) -> None:
    while True:
        llm.generate([PROMPT, PROMPT], LONG)


def kill_one(engine_dir: Path, rng: random.Random, node: SimulatedCuda, *, while_loading: bool) -> None:
    """Kills a rank while the engines are loaded, if that takes as long as on most machines, or while they serve."""
    told: list[str] = []
    is_loaded = threading.Event()
    serving = threading.Thread(target=serve, args=(engine_dir, told, is_loaded), daemon=True)
    serving.start()
    wait_until(lambda: rank_processes() or not serving.is_alive(), "no process was started")
    assert while_loading or is_loaded.wait(SECONDS)
    time.sleep(rng.uniform(0, 2.5))
    victim = rng.choice(rank_processes())
    os.kill(victim, signal.SIGKILL)
    serving.join(SECONDS)
    assert not serving.is_alive(), "a caller was never told"
    assert told
    for line in told:
        assert re.fullmatch(f"{KILLED}|{STOPPED}", line), line
        assert f"(process {victim}, " in line
    assert rank_processes() == []
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("fly-trt ranks", "fly-trt engine")]
    node.faults.clear()  # of a sum that was aborted


def test_whichever_rank_is_killed_at_whatever_moment_its_callers_are_told(
    node: SimulatedCuda, two_ranks: Path, four_ranks: Path, is_long: bool
) -> None:
    rng = random.Random(16)
    for at in range(100 if is_long else 8):
        kill_one(four_ranks if at % 4 == 3 else two_ranks, rng, node, while_loading=at % 2 == 0)


def test_a_rank_that_dies_while_nothing_is_served_is_noticed(node: SimulatedCuda, two_ranks: Path) -> None:
    with LLM(two_ranks, **SIZES) as llm:
        llm._service.check_running()
        os.kill(rank_processes()[0], signal.SIGKILL)
        wait_until(lambda: not rank_processes(), "a process is left")
        for check in (llm._service.check_running, lambda: llm.generate(PROMPT, LONG)):
            with pytest.raises(EngineDeadError) as caught:
                check()
            assert re.fullmatch(STOPPED, str(caught.value))


def test_callers_are_told_although_the_sum_is_not_let_go(
    node: SimulatedCuda, two_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's abort is known to hang at times."""
    is_let_go, abort = threading.Event(), simulated_nccl.Communicator.abort

    def hang(communicator: simulated_nccl.Communicator) -> None:
        is_let_go.wait(SECONDS)
        abort(communicator)

    monkeypatch.setattr(simulated_nccl.Communicator, "abort", hang)
    monkeypatch.setattr("fly_trt.runtime.thread.STUCK_SECONDS", 0.5)
    with LLM(two_ranks, **SIZES) as llm:
        kill = threading.Timer(0.5, os.kill, (rank_processes()[0], signal.SIGKILL))
        kill.start()
        with pytest.raises(EngineDeadError) as caught:
            serve_on(llm)
        assert re.fullmatch(STOPPED, str(caught.value))
        assert rank_processes() == []
        is_let_go.set()
    node.faults.clear()


@pytest.mark.parametrize(("call", "after"), [("cudaGraphLaunch", 3), ("cudaStreamSynchronize", 40), ("cudaMalloc", 4)])
def test_what_goes_wrong_on_another_gpu_is_told_with_its_rank(
    call: str, after: int, node: SimulatedCuda, two_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BROKEN, json.dumps({"device": 1, "call": call, "after": after}))
    told: list[str] = []
    serve(two_ranks, told, threading.Event())
    assert told
    for line in told:
        assert re.search(r"rank 1 \(process \d+, device 1\): CUDA: cudaErrorIllegalAddress: ", line), line
        assert "\n" not in line
    assert rank_processes() == []
    node.faults.clear()


def test_what_goes_wrong_on_the_first_gpu_ends_the_other_ranks(node: SimulatedCuda, two_ranks: Path) -> None:
    with LLM(two_ranks, **SIZES) as llm:
        node.refused["cudaGraphLaunch"] = Error.cudaErrorLaunchFailure
        with pytest.raises(EngineError, match=r"rank 0 \(this process, device 0\): CUDA: cudaErrorLaunchFailure"):
            llm.generate(PROMPT, LONG)
        wait_until(lambda: not rank_processes(), "a process is left")


def test_a_rank_that_does_not_answer_is_ended_by_force(
    node: SimulatedCuda, two_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_group, "END_SECONDS", 0.5)
    llm = LLM(two_ranks, **SIZES)
    os.kill(rank_processes()[0], signal.SIGSTOP)
    llm.shutdown()
    assert rank_processes() == []
    llm.shutdown()


def test_a_step_that_is_interrupted_ends_the_ranks(
    node: SimulatedCuda, two_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may have made it, and would be a step ahead from then on."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with LoadedEngines(two_ranks, max_batch_size=1) as engines:
        engine = engines.draft
        step = engine.step(0, 1, 4)
        with monkeypatch.context() as patch:
            patch.setattr("fly_trt.engines.tensorrt.TensorRTEngine.run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.run(step)
        assert rank_processes() == []
        with pytest.raises(EngineDeadError, match=r"^KeyboardInterrupt in the middle of RUN: all ranks were ended, lo"):
            engine.run(step)


def test_an_engine_that_fails_to_close_leaves_no_process(
    node: SimulatedCuda, two_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(engine: TensorRTEngine) -> None:
        close(engine)
        raise RuntimeError("it does not close")

    close = TensorRTEngine.close
    monkeypatch.setattr(TensorRTEngine, "close", fail)
    with pytest.raises(RuntimeError, match="it does not close"), LoadedEngines(two_ranks) as engines:
        assert engines.draft.num_preparations
    assert rank_processes() == []


def test_engines_may_be_closed_by_the_thread_that_watches_the_ranks(node: SimulatedCuda, two_ranks: Path) -> None:
    """Whose garbage collector may come upon them."""

    class Owner:
        def __init__(self, engines: LoadedEngines) -> None:
            self.engines, self.is_told = engines, threading.Event()
            self.error: BaseException | None = None

        def close(self, line: str) -> None:
            try:
                self.engines.close()
            except BaseException as error:
                self.error = error
            self.is_told.set()

    owner = Owner(LoadedEngines(two_ranks, max_batch_size=1))
    owner.engines.when_failed(owner.close)
    assert owner.engines.draft.num_preparations
    os.kill(rank_processes()[0], signal.SIGKILL)
    assert owner.is_told.wait(SECONDS)
    assert owner.error is None
    assert rank_processes() == []


def test_a_communicator_that_is_made_after_a_failure_is_aborted() -> None:
    """Its thread was left behind: nobody else knows of it."""

    class Made:
        is_aborted = False

        def abort(self) -> None:
            self.is_aborted = True

    group, made = rank_group.RankGroup([0]), Made()
    group.fail("it failed")
    with pytest.raises(EngineDeadError, match=r"^it failed$"):
        group.add(made)
    assert made.is_aborted


def test_signals_that_all_processes_get_are_the_first_ones_to_answer(node: SimulatedCuda, two_ranks: Path) -> None:
    with LLM(two_ranks, **SIZES) as llm:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(rank_processes()[0], number)
        assert llm.generate(PROMPT, SamplingParams(max_tokens=8))[0].outputs[0].text


def test_a_start_that_is_refused_leaves_no_process(node: SimulatedCuda, draft_alone: Path) -> None:
    node.free_bytes = 4 << 20  # on the first GPU
    with pytest.raises(EngineError, match="cudaErrorMemoryAllocation"):
        LLM(draft_alone)
    assert rank_processes() == []


LEFT_OPEN = {
    "engines": "engines = LoadedEngines(path, max_batch_size=1); draft = engines.draft; draft.run(draft.step(0, 1, 4))",
    "idle": "llm = LLM(path, max_batch_size=1); llm.generate('Spell', SamplingParams(max_tokens=4))",
    "busy": "llm = LLM(path, max_batch_size=1); all = llm.stream('Spell', SamplingParams(max_tokens=99)); next(all)",
}


@pytest.mark.parametrize("code", LEFT_OPEN.values(), ids=LEFT_OPEN)
def test_a_program_that_closes_nothing_ends(code: str, node: SimulatedCuda, two_ranks: Path) -> None:
    """Nothing is used on a GPU that was freed before, which the simulation would find."""
    imports = "import sys; from fly_trt import LLM, LoadedEngines, SamplingParams; path = sys.argv[1]"
    with started([sys.executable, "-c", f"{imports}; {code}", str(two_ranks)]) as process:
        _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (0, "")
    assert rank_processes(process.pid) == []


def program(engine_dir: Path, *arguments: str) -> contextlib.AbstractContextManager["subprocess.Popen[str]"]:
    return started([sys.executable, str(PROGRAM), str(engine_dir), *arguments])


@contextlib.contextmanager
def started(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """A process group of its own, of which nothing is left afterwards."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_other_ranks_end_with_the_first_one(number: signal.Signals, node: SimulatedCuda, two_ranks: Path) -> None:
    """Also in the middle of a sum. Ctrl-C reaches all of them."""
    with program(two_ranks) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (os.killpg if number is signal.SIGINT else os.kill)(process.pid, number)
        process.wait(SECONDS)
        wait_until(lambda: not rank_processes(process.pid), "a process is left")


def test_the_other_ranks_end_with_the_first_one_whenever_it_is_killed(
    node: SimulatedCuda, two_ranks: Path, is_long: bool
) -> None:
    rng = random.Random(17)
    for _ in range(20 if is_long else 2):
        with program(two_ranks) as process:
            wait_until(lambda pid=process.pid: rank_processes(pid), "no process was started")
            time.sleep(rng.uniform(0, 3))
            process.kill()
            process.wait(SECONDS)
            wait_until(lambda pid=process.pid: not rank_processes(pid), "a process is left")


def test_a_process_that_was_forked_from_the_first_one_keeps_no_rank_alive(node: SimulatedCuda, two_ranks: Path) -> None:
    with program(two_ranks, "fork") as process:
        assert process.stdout is not None
        said = {process.stdout.readline().strip() for _ in range(2)}
        (forked,) = said - {"ready"}
        process.kill()
        process.wait(SECONDS)
        wait_until(lambda: not rank_processes(process.pid), "a process is left")
        os.kill(int(forked), 0)  # it lives


def test_a_rank_dies_although_another_process_holds_its_socket(
    node: SimulatedCuda, two_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that was forked while the ranks were started."""
    held = []

    def make_pair() -> tuple[socket.socket, socket.socket]:
        here, there = pair()
        held.append(there.dup())
        return here, there

    pair = socket.socketpair
    monkeypatch.setattr("fly_trt.engines.rank_group.socket.socketpair", make_pair)
    with LLM(two_ranks, **SIZES) as llm:
        os.kill(rank_processes()[0], signal.SIGKILL)
        with pytest.raises(EngineDeadError) as caught:
            serve_on(llm)
        assert re.fullmatch(STOPPED, str(caught.value))
    assert len(held) == 1
    held[0].close()
    node.faults.clear()


@contextlib.contextmanager
def generate(engine_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    """fly-generate with a long answer, in a process group of its own."""
    flags = ["--max-tokens", "290", "--ignore-eos"]
    with started([sys.executable, "-m", "fly_trt.cli.generate", str(engine_dir), PROMPT, *flags]) as process:
        yield process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["answering", "loading"])
def test_the_command_line_ends_as_it_does_with_one_gpu(
    number: signal.Signals, moment: str, node: SimulatedCuda, two_ranks: Path
) -> None:
    """All its processes get the signal, and one line is said."""
    with generate(two_ranks) as process:
        assert process.stdout is not None
        if moment == "answering":
            process.stdout.read(1)
        else:
            wait_until(lambda: rank_processes(process.pid), "no process was started")
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode != 0
        said = "terminated" if number is signal.SIGTERM else "interrupted"
        assert errors.strip() == f"fly-generate: {said}"
        wait_until(lambda: not rank_processes(process.pid), "a process is left")


def test_the_command_line_says_in_one_line_that_a_rank_was_killed(node: SimulatedCuda, two_ranks: Path) -> None:
    with generate(two_ranks) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        os.kill(rank_processes(process.pid)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode != 0
        assert re.fullmatch(rf"fly-generate: {STOPPED}", errors.strip()), errors
