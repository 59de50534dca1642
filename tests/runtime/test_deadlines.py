"""Requests that wait for a slot no longer than their queue_timeout."""

import asyncio
import threading
from pathlib import Path

import pytest

from fly_trt import AsyncLLM, FlyError, QueueTimeoutError, RequestError, RequestOutput, SamplingParams
from fly_trt.engines.turn import Turn
from fly_trt.runtime.deadlines import Deadlines
from fly_trt.runtime.thread import EngineThread
from stepped_engine import LANGUAGE, SECONDS, Inbox, SteppedEngine, is_over, make_group, make_loop
from table_engine import greedy

AT_ONCE = 1e-9  # seconds: over before the next step begins
MESSAGE = "timed out in the queue: all slots were busy: try again"


def assert_late(inbox: Inbox) -> None:
    error = inbox.error()
    assert type(error) is QueueTimeoutError
    assert str(error) == MESSAGE
    assert inbox.is_empty()


def test_a_request_that_waited_too_long_ends_between_two_steps_and_frees_its_place_and_its_id() -> None:
    engine = SteppedEngine(num_slots=1, is_free=False)
    thread = EngineThread(make_loop(engine, max_queue_size=2), engine.close)
    running, late, patient, again = (Inbox() for _ in range(4))
    thread.submit([make_group([3, 4, 5], running, "running", max_tokens=30)])
    assert engine.arrived.acquire(timeout=SECONDS)
    thread.submit([make_group([6, 7], late, "late", queue_timeout=AT_ONCE)])
    thread.submit([make_group([8], patient, "patient", max_tokens=5, queue_timeout=1e300)])
    engine.allow(2)
    assert_late(late)
    assert not engine.is_free, "the first one still has the slot"
    thread.submit([make_group([6, 7], again, "late", max_tokens=5)])
    engine.let_go()
    assert running.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [3, 4, 5], 30)
    assert patient.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [8], 5)
    assert again.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [6, 7], 5)
    assert is_over(thread, engine)


def test_a_request_that_finds_a_free_slot_is_served_however_little_it_would_wait(thread: EngineThread) -> None:
    for number in range(20):
        inbox = Inbox()
        thread.submit([make_group([3, 4, 5], inbox, str(number), max_tokens=3, queue_timeout=AT_ONCE)])
        assert inbox.all()[-1].outputs[0].finish_reason == "length"


def test_a_request_whose_first_sequence_runs_is_not_timed_out() -> None:
    engine = SteppedEngine(num_slots=1)
    thread = EngineThread(make_loop(engine), engine.close)
    inbox = Inbox()
    thread.submit([make_group([3, 4, 5], inbox, n=3, temperature=1.0, max_tokens=9, queue_timeout=AT_ONCE)])
    assert [completion.finish_reason for completion in inbox.all()[-1].outputs] == ["length"] * 3
    assert is_over(thread, engine)


def test_all_sequences_of_a_prompt_leave_the_queue_together() -> None:
    engine = SteppedEngine(num_slots=1, is_free=False)
    thread = EngineThread(make_loop(engine, max_queue_size=3), engine.close)
    running, late = Inbox(), Inbox()
    thread.submit([make_group([3, 4, 5], running, "running", max_tokens=30)])
    assert engine.arrived.acquire(timeout=SECONDS)
    group = make_group([6, 7], late, "late", n=3, temperature=1.0, queue_timeout=AT_ONCE)
    thread.submit([group])
    engine.allow(2)
    assert_late(late)
    assert all(request.is_finished for request in group.requests)
    thread.wait_for_room(3)
    engine.let_go()
    running.all()
    assert is_over(thread, engine)


def test_an_aborted_request_is_not_timed_out_as_well() -> None:
    engine = SteppedEngine(num_slots=1, is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    running, aborted = Inbox(), Inbox()
    thread.submit([make_group([3, 4, 5], running, "running", max_tokens=30)])
    assert engine.arrived.acquire(timeout=SECONDS)
    thread.submit([make_group([6, 7], aborted, "aborted", queue_timeout=AT_ONCE)])
    thread.abort("aborted")
    engine.let_go()
    assert aborted.all()[-1].outputs[0].finish_reason == "abort"
    running.all()
    assert is_over(thread, engine)
    assert aborted.is_empty()


def test_who_waits_for_its_turn_looks_at_deadlines_and_sleeps_between_them() -> None:
    asked: list[bool] = []

    class CountedTurn(Turn):
        def join(self, wake: threading.Event) -> bool:
            asked.append(super().join(wake))
            return asked[-1]

    engine, turn = SteppedEngine(num_slots=1), CountedTurn()
    own = threading.Event()
    assert turn.join(own)
    thread = EngineThread(make_loop(engine, prefix_caching=False), engine.close, turn)
    inboxes = [Inbox() for _ in range(3)]
    for number, inbox in enumerate(inboxes):
        thread.submit([make_group([6, 7], inbox, str(number), queue_timeout=0.01 + 0.05 * number)])
    patient = Inbox()
    thread.submit([make_group([6, 7], patient, "patient", max_tokens=5)])
    for inbox in inboxes:
        assert_late(inbox)
    assert engine.num_runs == 0
    assert asked.count(False) < 20, "about once for each request that came or went"
    turn.leave(own)
    assert patient.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [6, 7], 5)
    assert is_over(thread, engine)


def test_a_sink_that_raises_at_its_deadline_harms_nobody() -> None:
    engine = SteppedEngine(num_slots=1, is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    running = Inbox()
    told = threading.Event()
    thread.submit([make_group([3, 4, 5], running, "running", max_tokens=30)])
    assert engine.arrived.acquire(timeout=SECONDS)

    def refuse(output: RequestOutput | FlyError) -> None:
        told.set()
        raise ValueError("gone")

    late = make_group([6, 7], Inbox(), "late", queue_timeout=AT_ONCE)
    late.sink = refuse
    thread.submit([late])
    engine.let_go()
    assert told.wait(SECONDS)
    assert running.all()[-1].outputs[0].finish_reason == "length"
    assert is_over(thread, engine)


def test_deadlines_come_up_in_their_order_and_what_was_discarded_never() -> None:
    deadlines = Deadlines()
    seconds = {"long": 500.0, "short": 100.0, "discarded": 50.0, "middle": 300.0, "endless": None}
    groups = {name: make_group([3], Inbox(), name, queue_timeout=limit) for name, limit in seconds.items()}
    assert deadlines.next_moment() is None
    for group in groups.values():
        deadlines.add(group)
    deadlines.discard(groups["discarded"])
    deadlines.discard(groups["endless"])
    first = deadlines.next_moment()
    assert first is not None
    assert deadlines.take_due(first - 1) == []
    assert deadlines.take_due(first + 250) == [groups["short"], groups["middle"]]
    assert deadlines.take_due(float("inf")) == [groups["long"]]
    assert deadlines.next_moment() is None


@pytest.mark.usefixtures("slow_steps")
def test_async_llm_says_when_a_request_waited_too_long(demo_engine: Path) -> None:
    params = SamplingParams(max_tokens=1500, ignore_eos=True)

    async def serve() -> None:
        async with AsyncLLM(demo_engine, max_batch_size=1) as llm:
            running = llm.generate("a", params)
            await anext(running)
            with pytest.raises(QueueTimeoutError, match=MESSAGE):
                await anext(llm.generate("b", queue_timeout=0.001))
            assert not (await anext(running)).finished, "nobody else is disturbed"
            await running.aclose()
            outputs = [output async for output in llm.generate("b", SamplingParams(max_tokens=2), queue_timeout=60)]
            assert outputs[-1].outputs[0].finish_reason == "length"

    asyncio.run(serve())


def test_a_queue_timeout_that_is_no_time_is_refused(demo_engine: Path) -> None:
    async def serve() -> None:
        async with AsyncLLM(demo_engine) as llm:
            for wrong in (0, -1.0, float("nan"), "1", True):
                with pytest.raises(RequestError, match=rf"queue_timeout {wrong!r}: expected seconds, above 0, or None"):
                    await anext(llm.generate("a", queue_timeout=wrong))

    asyncio.run(serve())
