"""Engine threads that share engines: whose turn it is, and what those that wait for theirs can do meanwhile."""

import threading

import pytest

from fly_trt.engines.turn import Turn
from fly_trt.errors import EngineError
from fly_trt.runtime import thread as thread_module
from fly_trt.runtime.loop import GenerationLoop
from fly_trt.runtime.thread import EngineThread
from loop_stack import random_prompt
from stepped_engine import LANGUAGE, SECONDS, Inbox, SteppedEngine, make_group, make_loop
from table_engine import greedy


class WatchedTurn(Turn):
    """Counts who comes to stand in line."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Semaphore(0)

    def join(self, wake: threading.Event) -> bool:
        is_new = wake not in self._line
        has_turn = super().join(wake)
        if is_new:
            self.arrived.release()
        return has_turn


class Sharing:
    """Threads on one engine that take turns; their loops keep nothing, as LoadedEngines demands."""

    def __init__(self, engine: SteppedEngine, count: int) -> None:
        self.engine = engine
        self.turn = WatchedTurn()
        self.loops: list[GenerationLoop] = [make_loop(engine, prefix_caching=False) for _ in range(count)]
        self.threads = [EngineThread(loop, lambda: None, self.turn) for loop in self.loops]

    def end(self) -> None:
        self.engine.let_go()
        for thread in self.threads:
            thread.shutdown()
        assert not any(thread._thread.is_alive() for thread in self.threads)


def test_a_thread_that_waits_for_its_turn_takes_aborts_and_shutdown() -> None:
    engine = SteppedEngine(num_slots=1, is_free=False)
    sharing = Sharing(engine, 3)
    busy, waiting, idle = sharing.threads
    running, first, second = Inbox(), Inbox(), Inbox()
    busy.submit([make_group([3, 4, 5], running, max_tokens=50)])
    assert engine.arrived.acquire(timeout=SECONDS)
    waiting.submit([make_group([6, 7], first, "first"), make_group([8], second, "second")])
    waiting.abort("first")
    assert first.all()[-1].outputs[0].finish_reason == "abort"
    waiting.shutdown()
    assert not waiting._thread.is_alive()
    assert second.all()[-1].outputs[0].finish_reason == "abort"
    idle.shutdown()
    assert not idle._thread.is_alive()
    assert engine.num_runs == 0, "all of it while the first step was held"
    engine.let_go()
    assert running.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [3, 4, 5], 50)
    sharing.end()


def test_who_has_the_turn_hands_it_over_when_what_runs_is_done() -> None:
    """The second one asks while the first has three batches of work; it is served after the first of them."""
    sharing = Sharing(SteppedEngine(num_slots=2), 2)
    order: list[str] = []
    inboxes: dict[str, Inbox] = {}

    def submit(index: int, name: str) -> None:
        inboxes[name] = Inbox()
        group = make_group(random_prompt(len(name), 5), inboxes[name], name, max_tokens=8)
        put = group.sink

        def sink(output: object) -> None:
            if getattr(output, "finished", True):
                order.append(name)
            put(output)

        group.sink = sink
        sharing.threads[index].submit([group])

    own = threading.Event()
    assert sharing.turn.join(own)
    for number in range(6):
        submit(0, f"a{number}")
    for _ in range(2):
        assert sharing.turn.arrived.acquire(timeout=SECONDS)
    submit(1, "b")
    assert sharing.turn.arrived.acquire(timeout=SECONDS)
    sharing.turn.leave(own)
    for inbox in inboxes.values():
        assert inbox.all()[-1].outputs[0].finish_reason == "length"
    assert order == ["a0", "a1", "b", "a2", "a3", "a4", "a5"]
    sharing.end()


def test_turns_come_in_the_order_in_which_they_were_asked_for() -> None:
    turn = Turn()
    first, second, third = (threading.Event() for _ in range(3))
    assert turn.join(first)
    assert turn.join(first)
    assert not turn.is_wanted
    assert not turn.join(second)
    assert not turn.join(third)
    assert turn.is_wanted
    turn.leave(second)
    turn.leave(second)
    turn.leave(first)
    assert third.is_set()
    assert not second.is_set()
    assert not turn.join(first), "who had it stands at the end of the line"
    assert turn.join(third)
    turn.leave(third)
    turn.leave(first)
    with turn.held():
        assert not turn.join(second)
    assert second.is_set()
    assert turn.join(second)


def test_an_aborted_request_that_waits_leaves_the_engine_alone() -> None:
    engine = SteppedEngine(num_slots=1)
    loop = make_loop(engine)
    group = make_group([3, 4, 5], Inbox())
    loop.add(group.requests)
    loop.abort(group.requests[0])
    assert engine.trims == []
    assert not loop.has_work


def test_shutdown_says_when_a_step_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_module, "JOIN_SECONDS", 0.01)
    engine = SteppedEngine(is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    inbox = Inbox()
    thread.submit([make_group([3, 4, 5], inbox)])
    assert engine.arrived.acquire(timeout=SECONDS)
    with pytest.raises(EngineError, match=r"in a step that has not ended for 0.01 s: it is released when that step"):
        thread.shutdown()
    assert not engine.closed
    engine.let_go()
    assert inbox.all()[-1].outputs[0].finish_reason == "abort"
    monkeypatch.setattr(thread_module, "JOIN_SECONDS", SECONDS)
    thread.shutdown()
    assert engine.closed


def test_no_engine_runs_under_the_lock_that_callers_take() -> None:
    """Event loops submit: they stand still as long as that lasts."""
    engine = SteppedEngine(is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    first, second, later = Inbox(), Inbox(), Inbox()
    thread.submit([make_group([3, 4, 5], first, "first", max_tokens=100), make_group([6], second, "second")])
    assert engine.arrived.acquire(timeout=SECONDS)
    is_shrinking, may_go_on = threading.Event(), threading.Event()

    def shrink() -> None:
        is_shrinking.set()
        assert may_go_on.wait(SECONDS)

    engine.on_trim = shrink
    thread.abort("first")
    engine.let_go()
    assert is_shrinking.wait(SECONDS)
    submitting = threading.Thread(target=thread.submit, args=([make_group([7], later, "later")],), daemon=True)
    submitting.start()
    submitting.join(SECONDS)
    assert not submitting.is_alive()
    engine.on_trim = lambda: None
    may_go_on.set()
    assert first.all()[-1].outputs[0].finish_reason == "abort"
    assert later.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [7], 40)
    thread.shutdown()
    assert engine.closed
