"""The end of the engine thread, and callers that fail."""

import threading

import pytest

from fly_trt.errors import FlyError
from fly_trt.outputs import RequestOutput
from fly_trt.params import RequestOutputKind
from fly_trt.runtime.thread import EngineThread
from stepped_engine import LANGUAGE, SECONDS, Inbox, SteppedEngine, is_over, make_group, make_loop
from table_engine import greedy


def test_shutdown_ends_what_is_served_with_abort_and_closes_the_engines() -> None:
    engine = SteppedEngine(num_slots=1, is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    inboxes = [Inbox() for _ in range(3)]
    for number, inbox in enumerate(inboxes):
        thread.submit([make_group([3, 4, 5], inbox, str(number), kind=list(RequestOutputKind)[number], max_tokens=200)])
    assert engine.arrived.acquire(timeout=SECONDS)
    stopping = threading.Thread(target=thread.shutdown)
    stopping.start()
    engine.allow(1000)
    for inbox in inboxes:
        assert inbox.all()[-1].outputs[0].finish_reason == "abort"
    stopping.join(SECONDS)
    assert engine.closed
    assert engine.num_runs < 100
    with pytest.raises(FlyError, match="was shut down: make a new one"):
        thread.submit([make_group([3, 4, 5], Inbox(), "later")])
    thread.shutdown()
    assert all(inbox.is_empty() for inbox in inboxes)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_a_sink_that_raises_ends_its_own_request_only(
    thread: EngineThread, engine: SteppedEngine, kind: RequestOutputKind
) -> None:
    calls = []

    def refuse(output: RequestOutput | FlyError) -> None:
        calls.append(output)
        raise ValueError("gone")

    refused = make_group([3, 4, 5], Inbox(), "refused", kind, n=2, temperature=1.0)
    refused.sink = refuse
    other = Inbox()
    thread.submit([refused, make_group([3, 4], other, "other", max_tokens=60)])
    assert other.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [3, 4], 60)
    assert is_over(thread, engine)
    assert len(calls) == 1
    assert all(request.is_finished for request in refused.requests)


def test_a_sink_may_shut_the_engine_down(engine: SteppedEngine) -> None:
    thread = EngineThread(make_loop(engine), engine.close)
    inbox = Inbox()
    group = make_group([3, 4, 5], inbox, max_tokens=200)
    put = group.sink

    def stop(output: RequestOutput | FlyError) -> None:
        put(output)
        thread.shutdown()

    group.sink = stop
    thread.submit([group])
    assert inbox.all()[-1].outputs[0].finish_reason == "abort"
    assert is_over(thread, engine)


def test_an_idle_engine_runs_no_steps(thread: EngineThread, engine: SteppedEngine) -> None:
    num_runs = []
    for number in range(3):
        inbox = Inbox()
        thread.submit([make_group([3, 4, 5], inbox, str(number))])
        inbox.all()
        num_runs.append(engine.num_runs)
    assert is_over(thread, engine)
    assert num_runs == [num_runs[0], 2 * num_runs[0], 3 * num_runs[0]]
    assert engine.num_runs == num_runs[-1]
