"""The engine thread on an executor that is no generation loop: all that it asks for is the protocol."""

from collections import deque

import pytest

from fly_trt.errors import EngineDeadError, EngineError, QueueFullError
from fly_trt.runtime.executor import Executor
from fly_trt.runtime.request import Request, RequestState
from fly_trt.runtime.thread import EngineThread
from stepped_engine import DELTA, SECONDS, Inbox, make_group

PLACES = 3


class Counting:
    """Serves one request at a time, and answers each with 2, 3, 4 ... 9, 2, 3 ..."""

    def __init__(self) -> None:
        self.is_admitting = True
        self.failure: Exception | None = None
        self.is_broken = False
        self.is_closed = False
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def num_running(self) -> int:
        return int(self._running is not None)

    @property
    def num_free_places(self) -> int:
        return PLACES - len(self._waiting)

    def add(self, requests: list[Request]) -> None:
        if len(requests) > self.num_free_places:
            raise QueueFullError("full")
        self._waiting.extend(requests)

    def step(self) -> list[Request]:
        if self._running is None and self.is_admitting and self._waiting:
            self._running = self._waiting.popleft()
            self._running.enter(RequestState.PREFILL)
        request = self._running
        if request is None:
            return []
        if self.failure is not None:
            raise self.failure
        request.commit([2 + len(request.output_token_ids) % 8])
        if request.is_finished:
            self._running = None
        return [request]

    def abort(self, request: Request) -> None:
        if request.is_finished:
            return
        request.finish("abort")
        if request is self._running:
            self._running = None
        else:
            self._waiting.remove(request)

    def fail_running(self, reason: str) -> list[Request]:
        request, self._running, self.failure = self._running, None, None
        assert request is not None
        request.fail(EngineError(reason))
        return [request]

    def probe(self) -> None:
        if self.is_broken:
            raise RuntimeError("the device is lost")

    def close(self) -> None:
        self.is_closed = True


def start(executor: Counting) -> EngineThread:
    taken: Executor = executor
    return EngineThread(taken, executor.close)


def test_requests_are_served_one_after_the_other_and_aborted() -> None:
    executor = Counting()
    thread = start(executor)
    inboxes = {name: Inbox() for name in ("first", "endless", "last")}
    groups = [
        make_group([3], inboxes["first"], "first", max_tokens=4, n=2),
        make_group([3], inboxes["endless"], "endless", DELTA, max_tokens=10**9),
    ]
    thread.submit(groups)
    outputs = inboxes["first"].all()
    assert [completion.token_ids for completion in outputs[-1].outputs] == [[2, 3, 4, 5]] * 2
    assert inboxes["endless"].next().outputs[0].token_ids == [2]
    thread.submit([make_group([3], inboxes["last"], "last", max_tokens=2)])
    thread.abort("endless")
    assert inboxes["endless"].all()[-1].outputs[0].finish_reason == "abort"
    assert inboxes["last"].all()[-1].outputs[0].token_ids == [2, 3]
    thread.shutdown()
    assert executor.is_closed


def test_a_queue_is_full_when_the_executor_says_so() -> None:
    thread = start(Counting())
    with pytest.raises(QueueFullError, match="full"):
        thread.submit([make_group([3], Inbox(), n=PLACES + 1)])
    inbox = Inbox()
    thread.wait_for_room(PLACES)
    thread.submit([make_group([3], inbox, n=PLACES, max_tokens=1)])
    assert len(inbox.all()[-1].outputs) == PLACES
    thread.shutdown()


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_step_that_raises_ends_what_the_executor_says_and_the_probe_decides(is_broken: bool) -> None:
    executor = Counting()
    executor.failure, executor.is_broken = RuntimeError("out of\nmemory"), is_broken
    thread = start(executor)
    failing, waiting = Inbox(), Inbox()
    thread.submit([make_group([3], failing, "failing"), make_group([3], waiting, "waiting", max_tokens=3)])
    assert str(failing.error()) == "out of memory"
    if is_broken:
        assert isinstance(waiting.error(), EngineDeadError)
        thread._thread.join(SECONDS)
        assert executor.is_closed
    else:
        assert waiting.all()[-1].outputs[0].token_ids == [2, 3, 4]
    thread.shutdown()
