"""Steps that raise: what was in them ends with an error, and everything else goes on as if nothing had happened."""

import logging
from collections.abc import Callable

import pytest

from fly_trt.drafting import Drafter
from fly_trt.errors import EngineDeadError, EngineError, RequestError
from fly_trt.runtime.invariants import check_invariants
from fly_trt.runtime.request import RequestState
from fly_trt.runtime.thread import EngineThread
from loop_stack import DRAFTERS, CheckedModelDrafter, Stack, make_drafter, make_request, make_stack, random_prompt
from stepped_engine import LANGUAGE, SECONDS, Inbox, SteppedEngine, is_over, make_group, make_loop
from table_engine import VOCAB_SIZE, TableEngine, greedy

FAILURE = RuntimeError("out of\n  memory")


def broken_after(engine: TableEngine, num_calls: int, name: str = "run") -> Callable[[], None]:
    """Has one call of the engine raise, after so many that work, and leaves nonsense in its caches; returns what mends
    it, which asserts that it was broken."""
    method, calls = getattr(engine, name), []

    def call(*arguments: object, **settings: object) -> object:
        calls.append(1)
        if len(calls) <= num_calls:
            return method(*arguments, **settings)
        engine.slots = [[0] * len(slot) for slot in engine.slots]
        raise FAILURE

    setattr(engine, name, call)

    def mend() -> None:
        assert len(calls) > num_calls
        setattr(engine, name, method)

    return mend


def fail_one_step(stack: Stack, engine: TableEngine, name: str = "run") -> None:
    mend = broken_after(engine, 0, name)
    with pytest.raises(RuntimeError, match="out of"):
        stack.run()
    mend()


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("num_steps", range(5))
def test_what_ran_fails_and_what_waits_is_served_as_ever(name: str, num_steps: int) -> None:
    drafter: Drafter | None = make_drafter(name, LANGUAGE)
    stack = make_stack(LANGUAGE, drafter, num_slots=2, max_num_tokens=32, draft_lengths=[3])
    shared = random_prompt(1, 40)  # a prefix that the caches hold, and then do not any more
    requests = [
        make_request([*shared, 5 + number], request_id=str(number), max_tokens=30 + number) for number in range(4)
    ]
    stack.run(make_request(shared))
    stack.loop.add(requests)
    stack.step(num_steps)
    ran = {request.request_id for request in requests if request.slot >= 0} or {"0", "1"}
    fail_one_step(stack, stack.target)
    changed = stack.loop.fail_running("out of memory")
    stack.check()
    assert {request.request_id for request in changed} == ran
    for request in requests:
        if request.request_id in ran:
            assert isinstance(request.error, EngineError)
            assert str(request.error) == (
                f"request {request.request_id}: the step that it was in failed (out of memory): send it again"
            )
            assert (request.finish_reason, request.slot) == ("abort", -1)
        else:
            assert request.state is RequestState.WAITING
    stack.loop.probe()
    stack.run(make_request([*shared, 9], request_id="later"))
    for request in requests:
        if request.request_id not in ran:
            assert request.error is None
            assert request.output_token_ids == greedy(LANGUAGE, request.prompt_token_ids, request.max_tokens)
    assert stack.counted("num_requests_running") == stack.counted("num_requests_waiting") == 0


@pytest.mark.parametrize("name", ["draft_model", "multi_level"])
def test_a_draft_model_that_fails_is_believed_nothing_either(name: str) -> None:
    drafter = make_drafter(name, LANGUAGE)
    assert isinstance(drafter, CheckedModelDrafter)  # asserts each draft
    stack = make_stack(LANGUAGE, drafter, num_slots=1, draft_lengths=[3])
    shared = random_prompt(1, 40)
    stack.loop.add([make_request(shared)])
    stack.step(2)
    fail_one_step(stack, drafter._engine)
    stack.loop.fail_running("out of memory")
    request = make_request([*shared, 5])
    stack.run(request)
    assert request.output_token_ids == greedy(LANGUAGE, request.prompt_token_ids, 40)


@pytest.mark.parametrize("name", ["copy_slot", "swap_slots", "trim"])
def test_a_request_is_never_lost_where_caches_are_moved(name: str) -> None:
    """It is served or ends with an error, whatever the engine was asked for when it failed."""
    stack = make_stack(LANGUAGE, num_slots=3, max_num_tokens=32)
    shared = random_prompt(1, 40)
    stack.run(make_request(shared), make_request(random_prompt(2, 40), max_tokens=3))
    prompts = [6, 7], [*shared, 5], [8], [*shared, 9], [10, 11]  # the first one takes the place of what is kept longest
    requests = [make_request(list(prompt), max_tokens=4 + 9 * number) for number, prompt in enumerate(prompts)]
    stack.loop.add(requests)
    fail_one_step(stack, stack.target, name)
    stack.loop.fail_running("no memory")
    check_invariants(stack.loop.scheduler)
    stack.run()
    for request in requests:
        assert request.is_finished
        if request.error is None:
            assert request.output_token_ids == greedy(LANGUAGE, request.prompt_token_ids, request.max_tokens)


def test_the_probe_finds_an_engine_that_cannot_run_any_more() -> None:
    drafter = make_drafter("draft_model", LANGUAGE)
    assert isinstance(drafter, CheckedModelDrafter)
    for engine_of in (lambda stack: stack.target, lambda stack: drafter._engine):
        stack = make_stack(LANGUAGE, drafter)
        stack.loop.probe()
        mend = broken_after(engine_of(stack), 0)
        with pytest.raises(RuntimeError, match="out of"):
            stack.loop.probe()
        mend()


# --- the engine thread ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (RuntimeError("out of\n  memory"), "out of memory"),
        (ValueError(), "ValueError"),
        (MemoryError(), "MemoryError"),
        (EngineError("the device is gone"), "the device is gone"),
    ],
)
def test_a_step_that_fails_ends_its_requests_and_no_others(failure: Exception, reason: str) -> None:
    engine = SteppedEngine(num_slots=2, is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    inboxes = [Inbox() for _ in range(4)]
    for number, inbox in enumerate(inboxes):
        thread.submit([make_group([3, 4, 5 + number], inbox, str(number))])
    engine.allow(4)
    for _ in range(5):
        assert engine.arrived.acquire(timeout=SECONDS)
    engine.failure, engine.num_failures = failure, 1
    engine.let_go()
    for number, inbox in enumerate(inboxes[:2]):
        error = inbox.error()
        assert type(error) is EngineError
        assert str(error) == f"request {number}: the step that it was in failed ({reason}): send it again"
    for number, inbox in enumerate(inboxes[2:], start=2):
        assert inbox.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [3, 4, 5 + number], 40)
    thread.check_running()
    again = Inbox()
    thread.submit([make_group([3, 4, 5], again, "0")])
    assert again.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [3, 4, 5], 40)
    assert is_over(thread, engine)
    assert all(inbox.is_empty() for inbox in [*inboxes, again])


def test_a_request_that_fails_each_time_does_not_end_the_service(thread: EngineThread, engine: SteppedEngine) -> None:
    """However often it is sent."""
    for number in range(10):
        failing, other = Inbox(), Inbox()
        engine.failure, engine.num_failures = FAILURE, 1
        thread.submit([make_group([3, 4, 5], failing, f"failing {number}")])
        assert isinstance(failing.error(), EngineError)
        thread.submit([make_group([6, 7], other, f"other {number}")])
        assert other.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [6, 7], 40)
    assert is_over(thread, engine)


@pytest.mark.parametrize("failure", [RuntimeError("the device is lost"), SystemExit(3), KeyboardInterrupt()])
def test_when_the_engine_cannot_run_any_more_every_caller_is_told(failure: BaseException) -> None:
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
    reason = str(failure) or type(failure).__name__
    errors = [inbox.error() for inbox in inboxes]
    assert all(reason in str(error) for error in errors)
    for error in errors[1:]:
        assert isinstance(error, EngineDeadError)
        assert str(error) == f"the engine stopped after an error ({reason}): make a new one"
    assert is_over(thread, engine)
    with pytest.raises(EngineDeadError, match=r"the engine stopped after an error \(.*\): make a new one"):
        thread.submit([make_group([3, 4, 5], Inbox(), "later")])
    assert all(inbox.is_empty() for inbox in inboxes)
    thread.abort("0")
    thread.shutdown()


def test_caches_that_cannot_be_made_smaller_end_what_runs_and_nothing_else() -> None:
    engine = SteppedEngine(is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    failing, other, later = Inbox(), Inbox(), Inbox()

    def fail() -> None:
        engine.on_trim = lambda: None
        raise RuntimeError("no memory")

    impossible = make_group([3, 4, 5], failing, "failing", n=2, bad_word_ids=[[token] for token in range(VOCAB_SIZE)])
    thread.submit([impossible, make_group([3, 4], other, "other", max_tokens=200)])
    assert engine.arrived.acquire(timeout=SECONDS)
    engine.on_trim = fail
    engine.let_go()
    assert isinstance(failing.error(), RequestError)
    assert str(other.error()) == "request other: the step that it was in failed (no memory): send it again"
    thread.submit([make_group([3, 4], later, "later")])
    assert later.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [3, 4], 40)
    assert is_over(thread, engine)
    assert failing.is_empty()
    assert other.is_empty()


def test_an_engine_that_says_that_it_is_dead_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    engine = SteppedEngine(num_slots=2)
    thread = EngineThread(make_loop(engine), engine.close)
    engine.failure = EngineDeadError("rank 1 was killed")
    inboxes = [Inbox() for _ in range(3)]
    thread.submit([make_group([3, 4, 5], inbox, str(number)) for number, inbox in enumerate(inboxes)])
    for inbox in inboxes:
        error = inbox.error()
        assert isinstance(error, EngineDeadError)
        assert str(error) == "the engine stopped after an error (rank 1 was killed): make a new one"
    assert is_over(thread, engine)
    assert engine.arrived.acquire(blocking=False)
    assert not engine.arrived.acquire(blocking=False)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_engines_that_fail_while_nothing_is_served_end_the_thread() -> None:
    engine = SteppedEngine()
    thread = EngineThread(make_loop(engine), engine.close)
    thread.check_running()
    thread.fail("rank 1 was killed")
    for refused in (thread.check_running, lambda: thread.submit([make_group([3, 4, 5], Inbox())])):
        with pytest.raises(EngineDeadError, match=r"^the engine stopped after an error \(rank 1 was killed\): make a "):
            refused()
    assert is_over(thread, engine)


def test_callers_are_told_although_the_step_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fly_trt.runtime.thread.STUCK_SECONDS", 0.1)
    engine = SteppedEngine(num_slots=1, is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    inboxes = [Inbox() for _ in range(3)]
    thread.submit([make_group([3, 4, 5], inbox, str(number)) for number, inbox in enumerate(inboxes)])
    assert engine.arrived.acquire(timeout=SECONDS)
    thread.fail("rank 1 was killed")
    for inbox in inboxes:
        assert str(inbox.error()) == "the engine stopped after an error (rank 1 was killed): make a new one"
    engine.failure = EngineDeadError("rank 1 was killed")
    assert is_over(thread, engine)
    assert all(inbox.is_empty() for inbox in inboxes)
