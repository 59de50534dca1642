"""Inboxes and handles, on an engine that a test can hold."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from fly_trt.errors import EngineError, QueueFullError, RequestError
from fly_trt.outputs import RequestOutput
from fly_trt.runtime.group import RequestGroup
from fly_trt.runtime.thread import EngineThread
from fly_trt.service.inbox import AsyncInbox, Inbox, RequestHandle
from stepped_engine import LANGUAGE, SECONDS, SteppedEngine, make_group, make_loop
from stepped_engine import Inbox as Caller
from table_engine import greedy

MAX_QUEUE_SIZE = 3
LONG = {"max_tokens": 200}


class Admission:
    """Takes a prompt of token ids, with a dict of SamplingParams' fields."""

    def __init__(self) -> None:
        self._count = 0

    def new_request_id(self) -> str:
        self._count += 1
        return f"made {self._count}"

    def make_group(self, prompt: Any, params: Any, request_id: str, sink: Any, **asked: Any) -> RequestGroup:
        if not prompt:
            raise RequestError("nothing to say")
        group = make_group(prompt, Caller(), request_id, queue_timeout=asked["queue_timeout"], **(params or {}))
        group.sink = sink
        group.output_kind = asked["output_kind"] or group.output_kind
        return group


@pytest.fixture
def engine() -> SteppedEngine:
    return SteppedEngine(num_slots=1)


@pytest.fixture
def thread(engine: SteppedEngine) -> Iterator[EngineThread]:
    running = EngineThread(make_loop(engine, max_queue_size=MAX_QUEUE_SIZE), engine.close)
    yield running
    engine.let_go()
    running.shutdown()
    assert engine.closed


@pytest.fixture
def inbox(thread: EngineThread) -> Inbox:
    return Inbox(Admission(), thread)


def tokens_of(inbox: Inbox) -> dict[str, list[int]]:
    """By request, as far as they were told when nothing is open any more."""
    told: dict[str, list[int]] = {}
    while inbox.num_open:
        arrival = inbox.get(timeout=SECONDS)
        told[arrival.handle.request_id] = arrival.output.outputs[0].token_ids
    return told


def wait_until_done(*handles: RequestHandle) -> None:
    deadline = time.monotonic() + SECONDS
    while not all(handle.is_done for handle in handles):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_outputs_of_all_requests_arrive_in_one_inbox(inbox: Inbox) -> None:
    prompts = {"a": [3, 4, 5], "b": [6, 7], "c": [8]}
    with inbox:
        for name, prompt in prompts.items():
            inbox.submit(inbox.prepare(prompt, request_id=name))
        assert inbox.num_open == 3
        assert tokens_of(inbox) == {name: greedy(LANGUAGE, prompt, 40) for name, prompt in prompts.items()}
    assert inbox.num_open == 0


def test_an_observer_is_told_of_every_output_in_the_engine_thread_and_only_the_last_one_arrives(inbox: Inbox) -> None:
    seen: list[tuple[list[int], str]] = []

    def observe(output: RequestOutput) -> None:
        seen.append((output.outputs[0].token_ids, threading.current_thread().name))

    with inbox:
        inbox.submit(inbox.prepare([3, 4, 5], {"max_tokens": 5}, observe=observe))
        arrival = inbox.get()
        assert arrival.output.finished
        assert inbox.num_open == 0
    want = greedy(LANGUAGE, [3, 4, 5], 5)
    assert [tokens for tokens, _ in seen] == [want[:count] for count in range(1, 6)]
    assert arrival.output.outputs[0].token_ids == want
    assert {thread for _, thread in seen} == {"fly-trt engine"}


def test_a_handle_ends_its_own_request_only_also_where_ids_come_again(inbox: Inbox, engine: SteppedEngine) -> None:
    with inbox:
        first = inbox.prepare([3, 4, 5], {"max_tokens": 3}, request_id="mine")
        assert first.request_id == "mine"
        inbox.submit(first)
        assert tokens_of(inbox) == {"mine": greedy(LANGUAGE, [3, 4, 5], 3)}
        assert first.is_done
        engine.is_free = False
        second, other = inbox.prepare([6, 7], request_id="mine"), inbox.prepare([8], LONG, request_id="other")
        inbox.submit(second)
        inbox.submit(other)
        first.abort()
        other.abort()
        assert not second.is_done
        engine.let_go()
        told = tokens_of(inbox)
    assert told["mine"] == greedy(LANGUAGE, [6, 7], 40)
    assert len(told["other"]) < 200


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_leaving_aborts_what_is_open_and_nothing_else(
    inbox: Inbox, thread: EngineThread, engine: SteppedEngine, error: type[BaseException] | None
) -> None:
    engine.is_free = False
    others = Inbox(Admission(), thread)
    other = others.prepare([8], {"max_tokens": 30}, request_id="other")
    others.submit(other)
    handles = [inbox.prepare([3, 4, number], LONG) for number in range(3, 5)]
    with pytest.raises(error) if error else contextlib.nullcontext(), inbox:
        for handle in handles:
            inbox.submit(handle)
        if error is not None:
            raise error
    engine.let_go()
    wait_until_done(*handles)
    assert tokens_of(others) == {"other": greedy(LANGUAGE, [8], 30)}


def test_an_error_says_which_request_it_is_of(inbox: Inbox, engine: SteppedEngine) -> None:
    with inbox:
        with pytest.raises(RequestError, match=r"^prompts\[1\]: nothing to say$"):
            inbox.prepare([], name="prompts[1]")
        with pytest.raises(RequestError, match=r"^nothing to say$"):
            inbox.prepare([])
        engine.failure, engine.num_failures = RuntimeError("no memory"), 1
        inbox.submit(inbox.prepare([3, 4, 5], request_id="mine", name="prompts[2]"))
        with pytest.raises(EngineError, match=r"^prompts\[2\]: request mine: the step .* failed \(no memory\)"):
            inbox.get(timeout=SECONDS)
        assert inbox.num_open == 0


def test_what_is_refused_is_not_open_and_what_has_its_id_still_is(inbox: Inbox, engine: SteppedEngine) -> None:
    engine.is_free = False
    with inbox:
        inbox.submit(inbox.prepare([3, 4, 5], LONG, request_id="running"))
        assert engine.arrived.acquire(timeout=SECONDS)
        too_many = inbox.prepare([3, 4, 5], {"n": MAX_QUEUE_SIZE + 1, "temperature": 1.0})
        with pytest.raises(QueueFullError):
            inbox.submit(too_many)
        assert inbox.num_open == 1
        twin = inbox.prepare([6, 7], request_id="running")
        with pytest.raises(RequestError, match="already in use"):
            inbox.submit(twin)
        assert inbox.num_open == 1
        engine.let_go()
        assert len(tokens_of(inbox)["running"]) == 200


def test_more_requests_than_the_queue_holds_go_in_as_others_end(inbox: Inbox) -> None:
    prompts = {str(number): [3, 4, 5 + number] for number in range(10)}
    with inbox:
        waiting = deque(inbox.prepare(prompt, {"max_tokens": 4}, request_id=name) for name, prompt in prompts.items())
        told: dict[str, list[int]] = {}
        while waiting or inbox.num_open:
            inbox.submit_what_fits(waiting)
            arrival = inbox.get(timeout=SECONDS)
            told[arrival.handle.request_id] = arrival.output.outputs[0].token_ids
    assert told == {name: greedy(LANGUAGE, prompt, 4) for name, prompt in prompts.items()}


def test_nothing_that_comes_in_time_is_a_timeout(inbox: Inbox, engine: SteppedEngine) -> None:
    engine.is_free = False
    with inbox:
        inbox.submit(inbox.prepare([3, 4, 5]))
        with pytest.raises(TimeoutError):
            inbox.get(timeout=0.001)
        assert inbox.num_open == 1


def test_a_task_takes_what_arrives(thread: EngineThread) -> None:
    async def serve() -> list[list[int]]:
        with AsyncInbox(Admission(), thread) as inbox:
            inbox.submit(inbox.prepare([3, 4, 5], {"max_tokens": 7}))
            return [(await inbox.get()).output.outputs[0].token_ids for _ in iter(lambda: inbox.num_open, 0)]

    assert asyncio.run(serve())[-1] == greedy(LANGUAGE, [3, 4, 5], 7)


def test_requests_of_an_event_loop_that_was_closed_end(thread: EngineThread, engine: SteppedEngine) -> None:
    engine.is_free = False

    async def ask() -> RequestHandle:
        inbox = AsyncInbox(Admission(), thread)
        handle = inbox.prepare([3, 4, 5], LONG)
        inbox.submit(handle)
        return handle

    handle = asyncio.run(ask())
    engine.allow(3)
    wait_until_done(handle)
    assert engine.num_runs < 10
