"""`tensorrt_llm.LLM` in a thread of its own: token ids go in, and what it streams comes back as events of one queue.

Its results are told to an asyncio loop that has to be running whenever a response comes, and its sockets may be used
by one thread at a time. So that loop runs in a thread here, which is the only one that uses the LLM once it is loaded.
This module knows requests by a key; it knows nothing of texts, slots or ends.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from fly_trt.errors import EngineDeadError, one_line

logger = logging.getLogger(__name__)

HEALTH_SECONDS = 2.0
"""Between two looks whether an LLM that is silent still lives."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one response adds to a request. num_cached: prompt tokens whose cache was reused. finish_reason: "stop",
    "length", what went wrong, or None where more comes; stop_reason: the stop token id, if it was one."""

    key: Hashable
    token_ids: list[int]
    num_cached: int
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class Failure:
    """One request ended with an error; where `is_fatal` the LLM can serve nothing any more."""

    key: Hashable
    reason: str
    is_fatal: bool


Event = Tokens | Failure


class TokenStreams:
    """`make()` returns the LLM, in the calling thread; whatever it raises is raised. `refusals`: the errors that are
    one request's; every other one shuts the LLM down by itself (see GenerationExecutor._handle_background_error)."""

    def __init__(self, make: Callable[[], Any], refusals: tuple[type[Exception], ...]) -> None:
        self._refusals = refusals
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._streams: dict[Hashable, asyncio.Task[None]] = {}  # the loop's thread alone
        self._looked_at = time.monotonic()
        self._llm = make()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fly-trt tensorrt_llm", daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, prompt_token_ids: list[int], sampling_params: Any) -> None:
        """Streams a request's tokens from now on. A key is not used twice."""

        def start() -> None:
            stream = self._loop.create_task(self._stream(key, prompt_token_ids, sampling_params))
            self._streams[key] = stream
            stream.add_done_callback(lambda _: self._streams.pop(key))

        self._loop.call_soon_threadsafe(start)

    def abort(self, key: Hashable) -> None:
        """Ends a request, if it still runs, without a last event; one that is on its way may come."""

        def end() -> None:
            if (stream := self._streams.get(key)) is not None:
                stream.cancel()

        self._loop.call_soon_threadsafe(end)

    def wake(self) -> None:
        """Ends the wait of `events`."""
        self._events.put(None)

    def events(self, timeout: float) -> list[Event]:
        """What has come, after at most `timeout` seconds. Raises EngineDeadError where the LLM says that it is dead."""
        events: list[Event | None] = []
        try:
            events.append(self._events.get(timeout=timeout))
            while True:
                events.append(self._events.get_nowait())
        except Empty:
            pass
        if not events:
            self._check_health()
        return [event for event in events if event is not None]

    def close(self) -> None:
        """Ends what runs and shuts the LLM down. Its end may take as long as the iteration that its workers are in."""
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stream(self, key: Hashable, prompt_token_ids: list[int], sampling_params: Any) -> None:
        result = None
        try:
            result = self._llm.generate_async(
                inputs={"prompt_token_ids": prompt_token_ids}, sampling_params=sampling_params, streaming=True
            )
            async for update in result:
                self._events.put(_tokens(key, update))
        except asyncio.CancelledError:
            if result is not None and not result.finished:
                result.abort()
        except self._refusals as error:
            self._events.put(Failure(key, one_line(error), is_fatal=False))
        except BaseException as error:  # also what is meant to end a thread: nobody else would tell who waits
            self._events.put(Failure(key, one_line(error), is_fatal=True))

    async def _shut_down(self) -> None:
        streams = list(self._streams.values())
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        try:
            self._llm.shutdown()
        except Exception:  # its processes are gone, or end with this one
            logger.exception("tensorrt_llm did not shut down in order")

    def _check_health(self) -> None:
        """Looks where errors lie that tensorrt_llm itself raises only when something is sent or comes: a worker that is
        gone sends nothing."""
        if time.monotonic() - self._looked_at < HEALTH_SECONDS:
            return
        self._looked_at = time.monotonic()
        executor = self._llm._executor
        if executor is not None and not executor.is_shutdown() and executor._error_queue.empty():
            return
        errors = [] if executor is None else list(executor._error_queue.queue)
        raise EngineDeadError(f"tensorrt_llm stopped: {one_line(errors[0]) if errors else 'its log says why'}")


def _tokens(key: Hashable, update: Any) -> Tokens:
    (output,) = update.outputs
    reason = None
    if update.finished:  # main has an error in the place of a reason, too
        reason = output.finish_reason or str(getattr(update, "error", None) or "no reason given")
    return Tokens(key, list(output.token_ids_diff), update.cached_tokens, reason, output.stop_reason)
