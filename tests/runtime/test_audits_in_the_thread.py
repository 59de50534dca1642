"""Audits in the engine thread: when they run, who goes first, and what their failures end."""

import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from fly_trt.engines.turn import Turn
from fly_trt.errors import EngineDeadError
from fly_trt.runtime.audit import AuditConfig, AuditResult
from fly_trt.runtime.auditor import Auditor
from fly_trt.runtime.thread import EngineThread
from loop_stack import SHORT_WINDOW, random_prompt
from stepped_engine import LANGUAGE, SECONDS, Inbox, SteppedEngine, make_group, make_loop
from table_engine import greedy

NUM_SLOTS = 2  # of requests; the engine has one more
PROMPT = random_prompt(0, 100)
TOKENS_OF_A_STEP = 8
ALL = AuditConfig(fraction=1.0)


class Served:
    """A thread with audits, on an engine that runs as many steps as it is allowed."""

    def __init__(self, engine: SteppedEngine, turn: Turn | None = None, *, config: AuditConfig = ALL) -> None:
        self.engine = engine
        self.results: SimpleQueue[AuditResult] = SimpleQueue()
        loop = make_loop(
            engine,
            num_slots=NUM_SLOTS,
            spare_slot=None if turn else NUM_SLOTS,
            prefix_caching=turn is None,
            max_num_tokens=TOKENS_OF_A_STEP,
        )
        self.auditor: Auditor = loop.audit(config, self.results.put, is_shared=turn is not None)
        self.thread = EngineThread(loop, engine.close, turn, self.auditor)

    def submit(self, prompt: list[int], request_id: str = "0", **params: Any) -> Inbox:
        inbox = Inbox()
        self.thread.submit([make_group(prompt, inbox, request_id, **({"max_tokens": 4} | params))])
        return inbox

    def start_audit(self) -> None:
        """A request was served, and the first step of its audit is about to run."""
        inbox = self.submit(PROMPT, "audited", policy=SHORT_WINDOW, max_tokens=60)
        is_over = False
        while not is_over:
            assert self.engine.arrived.acquire(timeout=SECONDS)  # what the step before said was handed over
            while not (is_over or inbox.is_empty()):
                is_over = inbox.next().finished
            if not is_over:
                self.engine.allow(1)

    def result(self) -> AuditResult:
        return self.results.get(timeout=SECONDS)


@pytest.fixture
def engine() -> Iterator[SteppedEngine]:
    engine = SteppedEngine(num_slots=NUM_SLOTS + 1)
    yield engine
    engine.let_go()


@pytest.fixture
def served(engine: SteppedEngine) -> Iterator[Served]:
    served = Served(engine)
    yield served
    engine.let_go()
    served.thread.shutdown()


def test_what_has_ended_is_audited_when_nothing_is_left_to_do(served: Served) -> None:
    inboxes = [served.submit([*PROMPT, number], str(number), policy=SHORT_WINDOW) for number in range(3, 9)]
    for inbox in inboxes:
        inbox.all()
    results = [served.result() for _ in inboxes]
    assert sorted(result.request_id for result in results) == ["3", "4", "5", "6", "7", "8"]
    assert served.auditor.counts.num_audited == 6
    assert not served.auditor.has_work


def test_a_request_waits_for_one_step_of_an_audit_at_most(served: Served, engine: SteppedEngine) -> None:
    engine.is_free = False
    served.start_audit()
    num_runs = engine.num_runs
    inbox = served.submit([3, 4, 5], max_tokens=20)
    engine.allow(1)
    assert engine.arrived.acquire(timeout=SECONDS)
    assert engine.num_runs == num_runs + 1
    engine.allow(1)
    assert engine.arrived.acquire(timeout=SECONDS)
    assert engine.shapes[num_runs][0] == NUM_SLOTS, "the audit's"
    assert engine.shapes[num_runs + 1][0] == 0, "the request's"
    engine.let_go()
    assert inbox.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [3, 4, 5], 20)
    assert served.result().request_id == "audited"


@pytest.mark.parametrize(("share", "takes_part"), [(0.5, True), (0.0, False)])
def test_beside_requests_audits_run_where_they_have_a_share(
    engine: SteppedEngine, share: float, takes_part: bool
) -> None:
    engine.is_free = False
    served = Served(engine, config=AuditConfig(fraction=1.0, share=share))
    short = served.submit(PROMPT, "short", policy=SHORT_WINDOW)
    long = served.submit([3], "long", max_tokens=200)
    engine.let_go()
    short.all()
    assert long.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [3], 200)
    assert served.result().request_id == "short"
    assert (served.auditor.counts.seconds_beside > 0) == takes_part
    served.thread.shutdown()


def test_caches_that_a_long_audit_made_long_are_short_again_before_a_request_runs() -> None:
    engine = SteppedEngine(num_slots=NUM_SLOTS + 1, is_free=False, trim_block=16)
    served = Served(engine, config=AuditConfig(fraction=1.0, share=0.0))
    long = served.submit(random_prompt(0, 200), "long", policy=SHORT_WINDOW)
    later = served.submit([3], "later", max_tokens=30)  # whose end leaves the caches as short as it is
    assert engine.arrived.acquire(timeout=SECONDS)
    while len(engine.slots[NUM_SLOTS]) < 160:
        engine.allow(1)
        assert engine.arrived.acquire(timeout=SECONDS)
    num_runs = engine.num_runs
    inbox = served.submit([3, 4, 5], max_tokens=20)
    engine.allow(1)
    assert engine.arrived.acquire(timeout=SECONDS)
    assert (engine.num_runs, engine.shapes[num_runs][0]) == (num_runs + 1, NUM_SLOTS), "the audit's last step"
    assert max(len(slot) for slot in engine.slots) <= 48
    engine.let_go()
    assert inbox.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [3, 4, 5], 20)
    assert served.result().request_id == "long"
    assert (long.all()[-1].finished, later.all()[-1].finished) == (True, True)
    served.thread.shutdown()


def test_shutdown_ends_an_audit_with_its_step(served: Served, engine: SteppedEngine) -> None:
    engine.is_free = False
    served.start_audit()
    num_runs = engine.num_runs
    ending = threading.Thread(target=served.thread.shutdown)
    ending.start()
    while not served.thread._is_stopping:
        time.sleep(0.001)
    engine.allow(1)
    ending.join(SECONDS)
    assert engine.closed
    assert engine.num_runs == num_runs + 1
    assert served.results.empty()


def test_a_step_that_fails_in_an_audit_ends_nothing_else(served: Served, engine: SteppedEngine) -> None:
    engine.is_free = False
    served.start_audit()
    inbox = served.submit([*PROMPT, 3], max_tokens=20)
    engine.failure, engine.num_failures = RuntimeError("out of\n  memory"), 1
    engine.let_go()
    assert inbox.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [*PROMPT, 3], 20)
    served.thread.check_running()
    assert dict(served.auditor.counts.left_out) == {"faulty": 1, "exact": 1}
    assert served.results.empty()


class FailingAudits(SteppedEngine):
    """Its first step in the slot of audits fails, and so does the step after that."""

    def run(self, step: Any) -> None:
        if step.first_slot == NUM_SLOTS and self.failure is None:
            self.failure, self.num_failures = RuntimeError("no memory"), 2
        super().run(step)


def test_caches_that_cannot_be_read_again_after_it_end_those_who_had_them() -> None:
    engine = FailingAudits(num_slots=NUM_SLOTS + 1, is_free=False)
    served = Served(engine, config=AuditConfig(fraction=1.0, share=0.5))
    running = served.submit([3, 4], "running", max_tokens=200)
    short = served.submit(PROMPT[:20], "audited", policy=SHORT_WINDOW, max_tokens=1)
    waiting = [served.submit([5, number], str(number), max_tokens=100) for number in range(2, 4)]
    engine.let_go()
    assert str(running.error()) == "request running: the step that it was in failed (no memory): send it again"
    assert short.all()[-1].outputs[0].finish_reason == "length"
    assert waiting[1].all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [5, 3], 100)
    served.thread.check_running()
    served.thread.shutdown()


def test_an_engine_that_dies_in_an_audit_is_dead_for_everybody(served: Served, engine: SteppedEngine) -> None:
    engine.is_free = False
    served.start_audit()
    inbox = served.submit([3, 4, 5])
    engine.failure = EngineDeadError("rank 1 was killed")
    engine.let_go()
    assert isinstance(inbox.error(), EngineDeadError)
    with pytest.raises(EngineDeadError, match="rank 1 was killed"):
        served.thread.check_running()


def test_an_audit_hands_the_turn_over_after_its_step(engine: SteppedEngine) -> None:
    turn = Turn()
    served, other = Served(engine, turn), Served(engine, turn)
    engine.is_free = False
    served.start_audit()
    num_runs = engine.num_runs
    inbox = other.submit([3, 4, 5], max_tokens=6)
    while not turn.is_wanted:
        time.sleep(0.001)
    engine.allow(1)
    assert engine.arrived.acquire(timeout=SECONDS)
    assert engine.num_runs == num_runs + 1
    engine.let_go()
    assert inbox.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [3, 4, 5], 6)
    result = served.result()  # although its slot was another's in the meantime
    assert result.request_id == "audited"
    assert result.quality == pytest.approx(1.0)
    for one in (served, other):
        one.thread.shutdown()
