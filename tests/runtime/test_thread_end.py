"""The end of the engine thread: failures, shutdown, and callers that fail."""

import threading

import pytest

from fly_trt.errors import EngineError, FlyError, RequestError
from fly_trt.outputs import RequestOutput
from fly_trt.params import RequestOutputKind
from fly_trt.runtime.thread import EngineThread
from loop_stack import make_request
from stepped_engine import LANGUAGE, SECONDS, Inbox, SteppedEngine, is_over, make_group, make_loop
from table_engine import VOCAB_SIZE, greedy


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (RuntimeError("out of\n  memory"), "the engine failed: out of memory"),
        (ValueError(), "the engine failed: ValueError"),
        (EngineError("the device is gone"), "the device is gone"),
    ],
)
def test_when_the_engine_fails_every_caller_is_told(failure: Exception, message: str) -> None:
    engine = SteppedEngine(num_slots=1, is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    inboxes = [Inbox() for _ in range(3)]
    for number, inbox in enumerate(inboxes):
        thread.submit([make_group([3, 4, 5], inbox, str(number), n=2, temperature=1.0)])
    engine.allow(2)
    for _ in range(3):
        assert engine.arrived.acquire(timeout=SECONDS)
    engine.failure = failure
    engine.let_go()
    for inbox in inboxes:
        error = inbox.error()
        assert isinstance(error, EngineError)
        assert str(error) == message
    assert is_over(thread, engine)
    with pytest.raises(EngineError, match=r"the engine stopped after an error \(.*\): make a new one") as raised:
        thread.submit([make_group([3, 4, 5], Inbox(), "later")])
    assert message.removeprefix("the engine failed: ") in str(raised.value)
    assert all(inbox.is_empty() for inbox in inboxes)
    thread.abort("0")
    thread.shutdown()


def test_a_caller_that_has_its_last_output_is_not_told_of_a_later_failure() -> None:
    """The engine fails while the other sequences of a failed request are taken out."""
    engine = SteppedEngine(is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    failing, other = Inbox(), Inbox()
    impossible = [[token] for token in range(VOCAB_SIZE)]
    group = make_group([3, 4, 5], failing, "failing", n=2, temperature=1.0, bad_word_ids=impossible)
    group.requests[1] = make_request([3, 4, 5], request_id="failing", index=1, max_tokens=200)
    thread.submit([group, make_group([3, 4], other, "other", max_tokens=200)])
    assert engine.arrived.acquire(timeout=SECONDS)
    engine.num_trims = 1
    engine.let_go()
    assert isinstance(failing.error(), RequestError)
    assert str(other.error()) == "the engine failed: no memory"
    assert is_over(thread, engine)
    assert failing.is_empty()
    assert other.is_empty()


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
