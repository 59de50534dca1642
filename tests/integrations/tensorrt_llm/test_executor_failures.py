"""What goes wrong behind the engine thread: requests that end early, that fail alone, and executors that die."""

import asyncio
import random
import re
import threading
from pathlib import Path
from typing import Any

import pytest

import simulated_executor
from executor_directory import executor_of, wait_until_ended, write_directory
from fly_trt import LLM, AsyncLLM, EngineDeadError, EngineError, QueueFullError, RequestError, SamplingParams
from fly_trt.integrations.tensorrt_llm import executor_loop
from fly_trt.integrations.tensorrt_llm.executor_loop import ExecutorLoop
from fly_trt.runtime.request import Request

PROMPTS = [{"prompt_token_ids": [0, 266, 306, 27, 200, first, 294, 222, 20]} for first in range(720, 732)]
PARAMS = SamplingParams(max_tokens=60)
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)


_EXPECTED: list[list[int]] = []  # computed once: each test has executors of its own


@pytest.fixture
def expected(directory: Path) -> list[list[int]]:
    """What each prompt is answered when nothing goes wrong."""
    if not _EXPECTED:
        with LLM(directory) as llm:
            _EXPECTED.extend(output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS))
    return _EXPECTED


def test_aborts_at_any_moment_leave_nothing_and_harm_nobody(
    directory: Path, expected: list[list[int]], is_long: bool
) -> None:
    moments = random.Random(3)

    async def leave(llm: AsyncLLM, number: int) -> None:
        """Of a request that somebody leaves: after some tokens, or before it has any."""
        seconds = moments.random() * 0.3
        task = asyncio.create_task(drain(llm, number))
        await asyncio.sleep(seconds)
        task.cancel()

    async def drain(llm: AsyncLLM, number: int) -> None:
        async for _ in llm.generate(PROMPTS[number % len(PROMPTS)], LONG):
            pass

    async def stay(llm: AsyncLLM, number: int) -> list[int]:
        await asyncio.sleep(moments.random() * 0.2)
        return [o async for o in llm.generate(PROMPTS[number], PARAMS)][-1].outputs[0].token_ids

    async def both(llm: AsyncLLM) -> list[list[int]]:
        leaving = [leave(llm, number) for number in range(40 if is_long else 12)]
        staying = [stay(llm, number) for number in range(len(PROMPTS))]
        return (await asyncio.gather(*staying, *leaving))[: len(PROMPTS)]

    llm = AsyncLLM(directory, max_batch_size=6)
    try:
        assert asyncio.run(both(llm)) == expected
        wait_until_ended(llm)
    finally:
        llm.shutdown()


def test_an_abort_by_id_keeps_what_was_emitted(directory: Path, expected: list[list[int]]) -> None:
    with LLM(directory) as llm:
        stream = llm.stream(PROMPTS[0], LONG)
        request_id = next(stream).request_id
        llm.abort(request_id)
        last = list(stream)[-1]
        assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
        shared = min(len(last.outputs[0].token_ids), len(expected[0]))
        assert last.outputs[0].token_ids[: shared - 1] == expected[0][: shared - 1]
        wait_until_ended(llm)


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("num_tokens", [0, 12], ids=["at once", "later"])
def test_an_error_of_one_request_ends_that_one(
    role: str, num_tokens: int, directory: Path, expected: list[list[int]]
) -> None:
    """Whatever the executor says that it is, in one line."""

    async def serve(llm: AsyncLLM) -> list[Any]:
        async def one(prompt: Any) -> list[int]:
            return [output async for output in llm.generate(prompt, PARAMS)][-1].outputs[0].token_ids

        return await asyncio.gather(*(one(prompt) for prompt in PROMPTS), return_exceptions=True)

    llm = AsyncLLM(directory, max_batch_size=8)
    try:
        prompt = PROMPTS[2]["prompt_token_ids"]
        # The next requests of the sequence begin with these tokens, wherever its rounds are cut.
        executor_of(role).failing.add((*prompt, *expected[2][:num_tokens]))
        outputs = asyncio.run(serve(llm))
        wait_until_ended(llm)
    finally:
        llm.shutdown()
    assert isinstance(outputs[2], EngineError)
    assert not isinstance(outputs[2], EngineDeadError)
    assert re.fullmatch(
        rf"request \d+: TensorRT-LLM's executor of the {role} failed \(Encountered an error in forwardAsync function: "
        r"something is broken\): send it again",
        str(outputs[2]),
    )
    assert outputs[:2] + outputs[3:] == expected[:2] + expected[3:]


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("how", ["ends", "raises"])
def test_an_executor_that_dies_ends_the_service_with_one_line(role: str, how: str, directory: Path) -> None:
    with LLM(directory) as llm:
        stream = llm.stream(PROMPTS[0], LONG)
        next(stream)
        executor = executor_of(role)
        if how == "ends":
            executor.die()
            reason = "it has ended"
        else:
            executor.break_down("CUDA error: an illegal\nmemory access")
            reason = "CUDA error: an illegal memory access"
        line = f"TensorRT-LLM's executor of the {role} stopped ({reason}): load the engines again"
        with pytest.raises(EngineDeadError, match=re.escape(line)) as failed:
            list(stream)
        assert "\n" not in str(failed.value)
        with pytest.raises(EngineDeadError, match=re.escape(line)):
            llm.generate(PROMPTS[:1], PARAMS)


def test_when_one_executor_dies_the_other_does_not_run_to_the_end(directory: Path) -> None:
    """As it would: an executor that is shut down goes on until its requests have ended."""
    with LLM(directory) as llm:
        stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=1500, ignore_eos=True, num_speculative_tokens=0))
        next(stream)
        target = executor_of("target")
        executor_of("draft").die()
        with pytest.raises(EngineDeadError):
            list(stream)
    assert target.num_steps < 1000


def test_an_executor_that_does_not_shut_down_is_said(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutdown = simulated_executor.Executor.shutdown

    def failing(executor: simulated_executor.Executor) -> None:
        shutdown(executor)
        if executor.role == "target":
            raise RuntimeError("MPI is\nover")

    monkeypatch.setattr(simulated_executor.Executor, "shutdown", failing)
    with LLM(directory):
        pass
    assert "TensorRT-LLM's executor of the target did not shut down: MPI is over" in caplog.text


def test_what_an_executor_gives_up_is_an_error_of_its_request(directory: Path, expected: list[list[int]]) -> None:
    with LLM(directory) as llm:
        target = executor_of("target")
        stream = llm.stream(PROMPTS[1], LONG)
        next(stream)
        target.cancel_request(target.num_requests + 1)  # by somebody else; ids are given in order
        with pytest.raises(EngineError, match=r"executor of the target gave it up \(CANCELLED\): send it again"):
            list(stream)
        assert llm.generate(PROMPTS[:1], PARAMS)[0].outputs[0].token_ids == expected[0]


@pytest.mark.parametrize("answer", [[], [5] * 30, [879, 879, 879]], ids=str)
def test_an_answer_that_is_none_to_the_draft_is_an_error(
    answer: list[int], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a target that was built for another way to draft."""
    with LLM(directory) as llm:
        target = executor_of("target")
        said = target._new_tokens
        monkeypatch.setattr(target, "_new_tokens", lambda active: answer if active.draft else said(active))
        with pytest.raises(EngineError, match=r"to 15 draft tokens the target answered .*DRAFT_TOKENS_EXTERNAL"):
            llm.generate(PROMPTS[:1], PARAMS)


def test_a_draft_model_that_says_nothing_more_ends_the_draft(
    directory: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target goes on with what there is; it needs no draft."""
    with LLM(directory) as llm:
        draft = executor_of("draft")
        said = draft._new_tokens
        monkeypatch.setattr(draft, "_new_tokens", lambda active: said(active) and [])
        tokens = llm.generate(PROMPTS[:1], SamplingParams(max_tokens=20))[0].outputs[0].token_ids
        plain = llm.generate(PROMPTS[:1], SamplingParams(max_tokens=20, num_speculative_tokens=0))
        assert tokens == plain[0].outputs[0].token_ids
        assert llm.metrics()["fly_trt:spec_decode_num_drafts_total"] == 0


def test_a_step_that_fails_ends_the_requests_in_it_and_the_next_one_is_served(
    directory: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(directory) as llm:
        stream = llm.stream(PROMPTS[0], LONG)
        next(stream)
        ask, is_broken = ExecutorLoop._ask, threading.Event()

        def broken(loop: ExecutorLoop) -> None:
            if not is_broken.is_set():
                is_broken.set()
                raise ValueError("a bug")
            ask(loop)

        monkeypatch.setattr(ExecutorLoop, "_ask", broken)
        with pytest.raises(EngineError, match=r"the step that it was in failed \(a bug\): send it again"):
            list(stream)
        assert llm.generate(PROMPTS[:2], PARAMS)[1].outputs[0].token_ids == expected[1]
        wait_until_ended(llm)


def test_an_executor_that_does_not_answer_a_probe_is_dead(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_loop, "PROBE_SECONDS", 0.2)
    with LLM(directory) as llm:
        stream = llm.stream(PROMPTS[0], LONG)
        next(stream)
        executor_of("draft").is_dumb = True

        def broken(loop: ExecutorLoop) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr(ExecutorLoop, "_ask", broken)
        with pytest.raises(EngineError, match="the step that it was in failed"):
            list(stream)
        with pytest.raises(EngineDeadError, match=r"executor of the draft did not answer for 0\.2 s"):
            llm.generate(PROMPTS[:1], PARAMS)


def test_what_the_library_refuses_of_a_request_is_that_requests_error(
    directory: Path, expected: list[list[int]], bindings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky(simulated_executor.SamplingConfig):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            if settings.get("temperature"):
                raise RuntimeError("Assertion failed: a temperature that\nnobody likes")

    monkeypatch.setattr(bindings, "SamplingConfig", Picky)
    with LLM(directory) as llm:
        with pytest.raises(EngineError, match="request 0: Assertion failed: a temperature that nobody likes"):
            llm.generate(PROMPTS[:1], SamplingParams(temperature=0.5))
        assert llm.generate(PROMPTS[:1], PARAMS)[0].outputs[0].token_ids == expected[0]


def test_a_full_queue_is_said_and_no_more_run_than_slots(directory: Path) -> None:
    async def serve(llm: AsyncLLM) -> list[Any]:
        async def one(prompt: Any) -> int:
            return len([output async for output in llm.generate(prompt, PARAMS)])

        return await asyncio.gather(*(one(prompt) for prompt in PROMPTS), return_exceptions=True)

    most: list[int] = []
    llm = AsyncLLM(directory, max_batch_size=2, max_queue_size=3)
    try:
        target = executor_of("target")
        end = target._end
        target._end = lambda active, *a, **k: (most.append(len(target._active)), end(active, *a, **k))[1]
        outputs = asyncio.run(serve(llm))
        wait_until_ended(llm)
    finally:
        llm.shutdown()
    full = [output for output in outputs if isinstance(output, QueueFullError)]
    assert full
    assert len(full) < len(PROMPTS)
    assert all(isinstance(output, (int, QueueFullError)) for output in outputs)
    assert max(most) <= 2


def test_a_request_that_was_refused_costs_the_executors_nothing(directory: Path) -> None:
    with LLM(directory) as llm, pytest.raises(RequestError):
        llm.generate(PROMPTS[:1], SamplingParams(logprobs=1))
    with LLM(directory) as llm:
        with pytest.raises(RequestError):
            llm.generate(PROMPTS[:1], SamplingParams(logprobs=1))
        assert executor_of("target").num_requests == 0


def test_random_work_ends_as_it_should(
    bindings: Any, demo_engine: Path, tmp_path: Path, is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of all kinds that come, end, fail and are aborted; after it nobody waits, and nothing runs."""
    choose = random.Random(11)
    ended: list[Request] = []
    remove = ExecutorLoop._remove

    def counting(loop: ExecutorLoop, request: Request) -> None:
        ended.append(request)
        remove(loop, request)

    monkeypatch.setattr(ExecutorLoop, "_remove", counting)

    async def one(llm: AsyncLLM, number: int) -> str:
        await asyncio.sleep(choose.random())
        n = choose.choice([1, 1, 2])
        params = SamplingParams(
            max_tokens=choose.choice([1, 5, 30, 80]),
            temperature=1.0 if n > 1 else choose.choice([0.0, 0.0, 1.0]),
            num_speculative_tokens=choose.choice([None, None, 0, 1, 7]),
            n=n,
            stop=choose.choice([None, "e"]),
            ignore_eos=choose.random() < 0.3,
        )
        try:
            async for output in llm.generate(PROMPTS[number % len(PROMPTS)], params, str(number)):
                if choose.random() < 0.05:
                    return "left"
                if choose.random() < 0.05:
                    await llm.abort(str(number))
                assert all(len(o.token_ids) <= params.max_tokens for o in output.outputs)
        except EngineError:
            return "failed"
        return output.outputs[0].finish_reason or "unfinished"

    async def all_of(llm: AsyncLLM) -> list[str]:
        return await asyncio.gather(*(one(llm, number) for number in range(150 if is_long else 30)))

    llm = AsyncLLM(write_directory(tmp_path / "engine", demo_engine), max_batch_size=5)
    try:
        executor_of("target").failing.add(tuple(PROMPTS[4]["prompt_token_ids"]))
        executor_of("draft").failing.add(tuple(PROMPTS[5]["prompt_token_ids"]))
        reasons = asyncio.run(all_of(llm))
        wait_until_ended(llm)
        loop = llm._service._thread._executor
        assert not loop._flights
        assert not loop._asked
        assert not loop._waiting
    finally:
        llm.shutdown()
    assert {"failed", "length", "stop"} <= set(reasons)
    assert "unfinished" not in reasons
    assert all(request.is_finished for request in ended)
