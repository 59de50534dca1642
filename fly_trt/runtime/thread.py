"""The engine thread: it alone runs the executor; everyone else hands it requests and gets outputs back.

Commands are taken between steps, so an abort takes effect within one step. A request whose queue_timeout is over is
ended when a step that began later did not admit it, or while others have the engines. A step that raises ends the
requests that were in it, each with an error, and then one token is run: engines that fail at that too cannot run any
more. This ends the thread, as does an engine that says that it is dead and everything else that is no failure of a
step, and every caller is told. What audits there are run when there is nothing to serve, and for a share of the time
between two steps.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from fly_trt.engines.fork import HomeProcess
from fly_trt.engines.turn import Turn
from fly_trt.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    one_line,
)
from fly_trt.runtime.auditor import Auditor
from fly_trt.runtime.deadlines import Deadlines
from fly_trt.runtime.executor import Executor
from fly_trt.runtime.group import RequestGroup
from fly_trt.runtime.request import Request

logger = logging.getLogger(__name__)

JOIN_SECONDS = 60.0
STUCK_SECONDS = 5.0
ROOM_POLL_SECONDS = 0.02
AUDIT_POLL_SECONDS = 0.1  # where others have the turn, which an audit does not stand in line for


class EngineThread:
    """Runs `executor` until `shutdown`, then calls `close` in the thread that owned the engines.

    Executors that share engines share the `turn`, which this one has while it has requests, or when others want it too,
    until those that run then have ended. Without the turn it takes aborts and runs no engine. `auditor`: what audits
    the executor's requests. `place`: what the thread is in for as long as it lives, such as the cores of the engines.
    """

    def __init__(
        self,
        executor: Executor,
        close: Callable[[], None],
        turn: Turn | None = None,
        auditor: Auditor | None = None,
        place: contextlib.AbstractContextManager[None] | None = None,
    ) -> None:
        self._place = place or contextlib.nullcontext()
        self._executor = executor
        self._auditor = auditor
        self._close = close
        self._turn = turn or Turn()
        self._home = HomeProcess("LLM")
        # Guards the requests' books and the queue. No engine runs under it: event loops take it.
        self._lock = threading.Lock()
        self._groups: dict[str, RequestGroup] = {}
        self._group_of: dict[Request, RequestGroup] = {}
        self._deadlines = Deadlines()
        self._aborts: deque[RequestGroup] = deque()
        self._is_stopping = False
        self._failure: str | None = None
        self._has_told = threading.Event()  # set when nobody waits for anything any more
        self._wake = threading.Event()  # set after each change that the thread has to see
        self._thread = threading.Thread(target=self._live, name="fly-trt engine", daemon=True)
        self._thread.start()

    def submit(self, groups: list[RequestGroup]) -> None:
        """Queues the groups, all or none. Raises QueueFullError when they do not fit, RequestError for a request id in
        use, and what `check_running` raises."""
        self.check_running()  # before the lock, which nobody releases in a forked process
        with self._lock:
            self.check_running()
            by_id: dict[str, RequestGroup] = {}
            for group in groups:
                if group.request_id in self._groups or group.request_id in by_id:
                    raise RequestError(f"request_id {group.request_id!r}: already in use: give each request its own")
                by_id[group.request_id] = group
            by_request = {request: group for group in groups for request in group.requests}
            # Known before they are queued: a step that runs now may serve them at once.
            self._groups |= by_id
            self._group_of |= by_request
            try:
                self._executor.add(list(by_request))
            except QueueFullError:
                for request_id in by_id:
                    del self._groups[request_id]
                for request in by_request:
                    del self._group_of[request]
                raise
            for group in groups:
                self._deadlines.add(group)
        self._wake.set()

    def wait_for_room(self, num_requests: int) -> None:
        """Blocks until the queue has that many places, which others may take before the caller does."""
        while self._executor.num_free_places < num_requests:
            self.check_running()
            time.sleep(ROOM_POLL_SECONDS)

    def abort(self, request_id: str) -> None:
        """Ends the request that has this id now, if there is one; its last output has finish_reason "abort". Raises
        ConfigError in a forked process."""
        self._home.check()
        if (group := self._groups.get(request_id)) is not None:
            self.abort_group(group)

    def abort_group(self, group: RequestGroup) -> None:
        """Ends this request and no other one, if it is still served."""
        self._aborts.append(group)
        self._wake.set()

    def shutdown(self) -> None:
        """Aborts what is served, stops the thread and releases the engines. Safe to call twice, and in a forked
        process, which has nothing to stop. Raises EngineError when a step does not end."""
        if not self._home.is_here:
            return
        with self._lock:
            self._is_stopping = True
        self._wake.set()
        if self._thread is threading.current_thread():
            return
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive():
            raise EngineError(
                f"the engine is in a step that has not ended for {JOIN_SECONDS:g} s: it is released when that step "
                "ends: end the process if it does not"
            )

    def fail(self, reason: str) -> None:
        """The engines cannot run any more: the thread ends, and every caller is told, also where the step that it is in
        does not come back. Any thread may say so."""
        self._failure = self._failure or reason
        self._wake.set()
        if self._thread is threading.current_thread():
            return  # it is told by the engines themselves
        if not self._has_told.wait(STUCK_SECONDS):
            self._fail(EngineDeadError(reason))

    def check_running(self) -> None:
        """Raises EngineDeadError after a failure, ConfigError after shutdown and in a forked process."""
        self._home.check()
        if self._failure is not None:
            raise _dead(self._failure)
        if self._is_stopping:
            raise ConfigError("this LLM was shut down: make a new one")

    def _live(self) -> None:
        with self._place:
            self._run()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                if self._failure is not None:
                    raise EngineDeadError(self._failure)
                self._end_aborted()
                if self._take_turn():
                    self._serve()
                    self._audit_while_idle()
                    self._leave_turn()
                    continue
                self._end_late(time.monotonic())
                self._wake.wait(self._seconds_to_deadline())
                self._wake.clear()
            for group in list(self._groups.values()):
                self._end(group)
        except EngineDeadError as error:  # whoever found it has said it
            logger.debug("the engine thread stopped: %s", error)
            self._fail(error)
        except BaseException as error:  # also what is meant to end a thread or the process: callers wait
            logger.exception("the engine thread stopped")
            self._fail(error)
        finally:
            self._has_told.set()
            self._turn.leave(self._wake)
            self._close()

    def _take_turn(self) -> bool:
        """Whether it has the turn, and something to do with it. An audit takes it only where nobody else wants it."""
        if self._executor.has_work:
            return self._turn.join(self._wake)
        self._turn.leave(self._wake)
        return self._has_audits and self._turn.take_free(self._wake)

    def _leave_turn(self) -> None:
        if self._auditor is not None:
            self._auditor.leave_turn()
        self._turn.leave(self._wake)

    def _serve(self) -> None:
        """Runs steps until nothing is left to do. While others want the turn, what waits is not admitted."""
        self._executor.is_admitting = True
        while self._executor.has_work and not self._is_stopping and self._failure is None:
            began = time.monotonic()
            self._deliver(self._run_engines(self._executor.step))
            if self._auditor is not None:
                self._audit_beside(self._auditor, time.monotonic() - began)
            self._end_aborted()
            self._end_late(began)
            self._executor.is_admitting = not self._turn.is_wanted
            if not (self._executor.is_admitting or self._executor.num_running):
                return

    def _run_engines(self, run: Callable[[], list[Request] | None]) -> list[Request]:
        """The changed requests that `run` returns; where it raises, those that were in the step end."""
        try:
            return run() or []
        except EngineDeadError:
            raise
        except Exception as error:
            logger.exception("a step failed, and its requests end with an error")
            self._deliver(self._executor.fail_running(one_line(error)))
            self._executor.probe()
            return []

    @property
    def _has_audits(self) -> bool:
        return self._auditor is not None and self._auditor.has_work

    def _audit_beside(self, auditor: Auditor, seconds: float) -> None:
        """A step of an audit beside the requests, which had one of so many seconds, where audits have a share left."""
        auditor.earn(seconds)
        if auditor.has_share and auditor.has_work and self._executor.has_work and not self._turn.is_wanted:
            self._run_engines(lambda: auditor.step(is_beside=True))

    def _audit_while_idle(self) -> None:
        """Steps of audits until there is something to serve, or somebody else wants the turn."""
        auditor = self._auditor
        if auditor is None or not auditor.has_work:
            return
        while auditor.has_work and not (self._is_stopping or self._turn.is_wanted):
            if self._executor.has_work or self._aborts or self._failure is not None:
                break
            self._run_engines(auditor.step)
        if not self._is_stopping and self._failure is None:
            self._run_engines(auditor.make_way)

    def _end_aborted(self) -> None:
        while self._aborts:
            self._end(self._aborts.popleft())

    def _end_late(self, moment: float) -> None:
        """Ends what should have had a slot by then and has none."""
        with self._lock:
            late = [group for group in self._deadlines.take_due(moment) if group.is_waiting]
            for group in late:
                for request in group.requests:
                    self._executor.abort(request)
        for group in late:
            self._forget(group)
            group.fail(QueueTimeoutError("timed out in the queue: all slots were busy: try again"))

    def _seconds_to_deadline(self) -> float | None:
        with self._lock:
            moment = self._deadlines.next_moment()
        longest = AUDIT_POLL_SECONDS if self._has_audits else None
        if moment is None:
            return longest
        return min(max(0.0, moment - time.monotonic()), longest or threading.TIMEOUT_MAX)

    def _end(self, group: RequestGroup) -> None:
        """Aborts what is left of the group, unless it has ended by itself."""
        with self._lock:
            if self._groups.get(group.request_id) is not group:
                return
            requests = [request for request in group.requests if not request.is_finished]
            for request in requests:
                self._executor.abort(request)
        self._deliver(requests)

    def _deliver(self, changed: list[Request]) -> None:
        by_group: dict[RequestGroup, list[Request]] = {}
        for request in changed:
            by_group.setdefault(self._group_of[request], []).append(request)
        for group, requests in by_group.items():
            is_over = group.is_over
            if is_over:
                self._forget(group)  # first: a caller who sees the last output finds the request id free
            try:
                group.update(requests)
            except BaseException as error:
                group.fail(_dead(one_line(error)))  # it may be forgotten: nobody else would tell its caller
                raise
            if not group.is_done:
                continue
            if not is_over:  # its sink failed
                self._forget(group)
            with self._lock:  # a failed group's other sequences end with it
                for request in group.requests:
                    self._executor.abort(request)

    def _forget(self, group: RequestGroup) -> None:
        with self._lock:
            self._deadlines.discard(group)
            del self._groups[group.request_id]
            for request in group.requests:
                del self._group_of[request]

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = one_line(error)
            groups = list(self._groups.values())
            self._groups.clear()
            self._group_of.clear()
        for group in groups:
            group.fail(_dead(self._failure))


def _dead(reason: str) -> EngineDeadError:
    return EngineDeadError(f"the engine stopped after an error ({reason}): make a new one")
