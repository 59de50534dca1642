"""What a caller has of its requests: a handle for each, and an inbox in which the outputs of all of them arrive.

An inbox knows how to submit, to wait and to abort what nobody waits for any more. It knows nothing of what a request
asks for, or of how it is served.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from fly_trt.errors import FlyError, QueueFullError, RequestError
from fly_trt.outputs import RequestOutput
from fly_trt.params import RequestOutputKind, SamplingParams
from fly_trt.runtime.group import RequestGroup, SinkClosedError
from fly_trt.runtime.thread import EngineThread
from fly_trt.service.admission import Admission
from fly_trt.text.prompts import Prompt


class RequestHandle:
    """One request for whoever made it. Any thread may use it. `name` says in errors which one of several it is."""

    def __init__(self, thread: EngineThread, group: RequestGroup, number: int, name: str) -> None:
        self._thread = thread
        self._group = group
        self._number = number  # in its inbox: a request_id may be refused because another one has it
        self.name = name

    @property
    def request_id(self) -> str:
        return self._group.request_id

    @property
    def is_done(self) -> bool:
        """Whether its last output, or an error instead, was handed over."""
        return self._group.is_done

    def abort(self) -> None:
        """Ends this request, and no later one of the same id, if it is still served; its last output has finish_reason
        "abort"."""
        self._thread.abort_group(self._group)


Observer = Callable[[RequestOutput], None]
"""Is told of outputs in the engine thread, so it must only take note of them."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """An output, and whose it is."""

    handle: RequestHandle
    output: RequestOutput


@dataclass(frozen=True, slots=True)
class _Delivery:
    """What comes from the engine thread. It has the request's number and not the handle, which would make a circle of
    handle, group and sink."""

    number: int
    output: RequestOutput | FlyError


class _Inbox:
    """`put` takes what comes, in the engine thread. What is not finished when the block is left is aborted: at an error
    as at Ctrl-C, where a generator is closed as where a task is cancelled."""

    def __init__(self, admission: Admission, thread: EngineThread, put: Callable[[_Delivery], None]) -> None:
        self._admission = admission
        self._thread = thread
        self._put = put
        self._numbers = itertools.count()
        self._open: dict[int, RequestHandle] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._open.values():
            handle.abort()

    @property
    def num_open(self) -> int:
        """Requests that were submitted and whose last output was not taken yet."""
        return len(self._open)

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        name: str = "",
        output_kind: RequestOutputKind | None = None,
        queue_timeout: float | None = None,
        observe: Observer | None = None,
    ) -> RequestHandle:
        """A request that was checked, for `submit`. Any thread may call it.

        request_id: None makes one. name: which one of several it is, for errors. output_kind: None is the one of
        `params`. queue_timeout: seconds that it may wait for a slot, None is for ever. observe: is told of every
        output, of which only the last one then comes into the inbox and wakes who waits there. Raises RequestError when
        it can never be served as asked, EngineDeadError after a failure and ConfigError after shutdown.
        """
        self._thread.check_running()
        request_id = request_id or self._admission.new_request_id()
        put, number = self._put, next(self._numbers)

        def sink(output: RequestOutput | FlyError) -> None:
            if observe is not None and not isinstance(output, FlyError):
                observe(output)
                if not output.finished:
                    return
            put(_Delivery(number, output))

        try:
            group = self._admission.make_group(
                prompt, params, request_id, sink, output_kind=output_kind, queue_timeout=queue_timeout
            )
        except RequestError as error:
            raise _named(name, error) from None
        return RequestHandle(self._thread, group, number, name)

    def submit(self, handle: RequestHandle) -> None:
        """Queues the request. Raises QueueFullError, RequestError for a request id in use, EngineDeadError after a
        failure and ConfigError after shutdown."""
        self._open[handle._number] = handle  # first: Ctrl-C may come while it is handed over
        try:
            self._thread.submit([handle._group])
        except FlyError:
            del self._open[handle._number]
            raise

    def submit_what_fits(self, waiting: deque[RequestHandle]) -> None:
        """Moves as many from the left as the queue takes. Where others hold all places it waits for room, unless a
        request of this inbox is open, whose end makes room."""
        while waiting:
            try:
                self.submit(waiting[0])
            except QueueFullError:
                if self._open:
                    return
                self._thread.wait_for_room(len(waiting[0]._group.requests))
            else:
                waiting.popleft()

    def _take(self, delivery: _Delivery) -> Arrival:
        handle, output = self._open[delivery.number], delivery.output
        if isinstance(output, FlyError):
            del self._open[delivery.number]
            raise _named(handle.name, output)
        if output.finished:
            del self._open[delivery.number]
        return Arrival(handle, output)


class Inbox(_Inbox):
    """For threads that block. One thread takes what arrives."""

    def __init__(self, admission: Admission, thread: EngineThread) -> None:
        self._queue: SimpleQueue[_Delivery] = SimpleQueue()
        super().__init__(admission, thread, self._queue.put)

    def get(self, timeout: float | None = None) -> Arrival:
        """The next output of any open request. Raises the FlyError that came instead, with the request's name, and
        TimeoutError when nothing came for `timeout` seconds; None is for ever."""
        try:
            delivery = self._queue.get(timeout=timeout)
        except Empty:
            raise TimeoutError from None
        return self._take(delivery)


class AsyncInbox(_Inbox):
    """For a task of the event loop that it is made in. When that loop is closed, the requests end."""

    def __init__(self, admission: Admission, thread: EngineThread) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[_Delivery] = asyncio.Queue()

        def put(delivery: _Delivery) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, delivery)
            except RuntimeError:  # the event loop is closed
                raise SinkClosedError from None

        self._queue = queue
        super().__init__(admission, thread, put)

    async def get(self) -> Arrival:
        """The next output of any open request. Raises the FlyError that came instead, with the request's name."""
        return self._take(await self._queue.get())


def _named(name: str, error: FlyError) -> FlyError:
    return type(error)(f"{name}: {error}") if name else error
