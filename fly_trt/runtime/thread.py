"""The engine thread: it alone runs the loop; everyone else hands it requests and gets outputs back.

Commands are taken between steps, so an abort takes effect within one step. An error that the loop does not expect ends
the thread, and every caller is told.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from fly_trt.errors import ConfigError, EngineError, FlyError, QueueFullError, RequestError
from fly_trt.runtime.group import RequestGroup
from fly_trt.runtime.loop import GenerationLoop
from fly_trt.runtime.request import Request

logger = logging.getLogger(__name__)

JOIN_SECONDS = 60.0
ROOM_POLL_SECONDS = 0.02


class EngineThread:
    """Runs `loop` until `shutdown`, then calls `close` in the thread that owned the engines.

    `turn` is held as long as there are requests: loops that share engines share it, and serve one after the other.
    """

    def __init__(self, loop: GenerationLoop, close: Callable[[], None], turn: "threading.Lock | None" = None) -> None:
        self._loop = loop
        self._close = close
        self._turn = turn or threading.Lock()
        self._groups: dict[str, RequestGroup] = {}
        self._group_of: dict[Request, RequestGroup] = {}
        self._aborts: deque[str] = deque()
        self._is_stopping = False
        self._failure: str | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fly-trt engine", daemon=True)
        self._thread.start()

    def submit(self, groups: list[RequestGroup]) -> None:
        """Queues the groups, all or none. Raises QueueFullError when they do not fit, RequestError for a request id in
        use or after shutdown, and EngineError after a failure."""
        with self._changed:
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
                self._loop.add(list(by_request))
            except QueueFullError:
                for request_id in by_id:
                    del self._groups[request_id]
                for request in by_request:
                    del self._group_of[request]
                raise
            self._changed.notify()

    def wait_for_room(self, num_requests: int) -> None:
        """Blocks until the queue has that many places, which others may take before the caller does."""
        while self._loop.scheduler.num_free_places < num_requests:
            self.check_running()
            time.sleep(ROOM_POLL_SECONDS)

    def abort(self, request_id: str) -> None:
        """Ends a request if it is still served; its last output has finish_reason "abort"."""
        with self._changed:
            self._aborts.append(request_id)
            self._changed.notify()

    def is_waiting(self, request_id: str) -> bool:
        """Whether the request is served and none of its sequences has a slot yet."""
        group = self._groups.get(request_id)
        return group is not None and all(request.is_waiting for request in group.requests)

    def shutdown(self) -> None:
        """Aborts what is served, stops the thread and releases the engines. Safe to call twice."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def check_running(self) -> None:
        """Raises what `submit` would raise after a failure or shutdown."""
        if self._failure is not None:
            raise EngineError(f"the engine stopped after an error ({self._failure}): make a new one")
        if self._is_stopping:
            raise ConfigError("this LLM was shut down: make a new one")

    def _run(self) -> None:
        try:
            while self._wait():
                with self._turn:
                    while self._take_aborts():
                        self._deliver(self._loop.step())
            with self._turn:
                self._abort(list(self._groups))
        except Exception as error:
            logger.exception("the engine thread stopped")
            self._fail(error)
        finally:
            self._close()

    def _wait(self) -> bool:
        """Sleeps until there is something to do; False when it is time to stop."""
        with self._changed:
            while not (self._is_stopping or self._aborts or self._loop.has_requests()):
                self._changed.wait()
            return not self._is_stopping

    def _take_aborts(self) -> bool:
        """Applies the aborts; False when nothing is left to serve, or when it is time to stop."""
        with self._changed:
            self._abort([self._aborts.popleft() for _ in range(len(self._aborts))])
            return not self._is_stopping and self._loop.has_requests()

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            group = self._groups.get(request_id)
            if group is None:
                continue
            requests = [request for request in group.requests if not request.is_finished]
            for request in requests:
                self._loop.abort(request)
            self._deliver(requests)

    def _deliver(self, changed: list[Request]) -> None:
        by_group: dict[RequestGroup, list[Request]] = {}
        for request in changed:
            by_group.setdefault(self._group_of[request], []).append(request)
        for group, requests in by_group.items():
            is_over = group.is_over
            if is_over:
                self._forget(group)  # first: a caller who sees the last output finds the request id free
            group.update(requests)
            if not group.is_done:
                continue
            if not is_over:  # its sink failed
                self._forget(group)
            with self._changed:  # a failed group's other sequences end with it
                for request in group.requests:
                    self._loop.abort(request)

    def _forget(self, group: RequestGroup) -> None:
        with self._changed:
            del self._groups[group.request_id]
            for request in group.requests:
                del self._group_of[request]

    def _fail(self, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        with self._changed:
            self._failure = reason
            groups = list(self._groups.values())
            self._groups.clear()
            self._group_of.clear()
        for group in groups:
            group.fail(error if isinstance(error, FlyError) else EngineError(f"the engine failed: {reason}"))
