"""One C++ Executor of TensorRT-LLM, and the mailbox that several of them answer to.

Each has a thread that waits for its responses, so that one that waits for both hears of either at once; the library
gives up Python's lock while it waits. It knows responses and request ids, and nothing of what requests are for.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from fly_trt.errors import EngineDeadError, one_line

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # after which a listener looks whether it is to end; a response is taken at once
CLOSE_SECONDS = 5.0
DEFAULT_TOKENS_PER_BLOCK = 32


class Answer(NamedTuple):
    """What an executor said of one of its requests: tokens that it had not said before, the name of why it ended, and
    blocks of its prompt whose cache was reused, where that was asked for. With an `error` it is the last one."""

    client: "ExecutorClient"
    request_id: int
    tokens: list[int]
    is_final: bool
    reason: str = ""
    num_reused_blocks: int = 0
    error: str | None = None


class Mailbox:
    """Answers of all clients, in the order in which they came."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[list[Answer] | EngineDeadError] = queue.SimpleQueue()
        self._failure: EngineDeadError | None = None

    def put(self, answers: list[Answer]) -> None:
        self._queue.put(answers)

    def wake(self) -> None:
        """Whoever waits looks around."""
        self._queue.put([])

    def fail(self, error: EngineDeadError) -> None:
        self._queue.put(error)

    def take(self, seconds: float) -> list[Answer]:
        """All that there is, after at most so long a wait for the first. Raises EngineDeadError when an executor ended,
        and whenever it is asked after that."""
        if self._failure is not None:
            raise self._failure
        taken: list[Answer] = []
        try:
            item = self._queue.get(timeout=seconds)
            while True:
                if isinstance(item, EngineDeadError):
                    self._failure = item
                    raise item
                taken += item
                item = self._queue.get_nowait()
        except queue.Empty:
            return taken


class ExecutorClient:
    """`executor` is a `tensorrt_llm.bindings.executor.Executor`, which this one closes; `name` is for errors."""

    def __init__(self, name: str, executor: Any, mailbox: Mailbox) -> None:
        self.name = name
        self.tokens_per_block = DEFAULT_TOKENS_PER_BLOCK
        self._executor = executor
        self._mailbox = mailbox
        self._usage = 0.0
        self._is_closing = False
        self._thread = threading.Thread(target=self._listen, name=f"fly-trt {name} responses", daemon=True)
        self._thread.start()

    def enqueue(self, requests: Sequence[Any]) -> list[int]:
        """Their ids, in the same order. Raises EngineDeadError when the executor takes none any more."""
        return list(self._call(lambda: self._executor.enqueue_requests(list(requests))))

    def cancel(self, request_id: int) -> None:
        """Answers to it may still come, the last of which says so."""
        self._call(lambda: self._executor.cancel_request(request_id))

    def cache_usage(self) -> float:
        """The largest part of its cache that requests had, since it was asked last or when it said so last."""
        usages = []
        for stats in self._call(self._executor.get_latest_iteration_stats):
            if (cache := stats.kv_cache_stats) is not None and cache.max_num_blocks:
                usages.append(cache.used_num_blocks / cache.max_num_blocks)
                self.tokens_per_block = cache.tokens_per_block
        self._usage = max(usages, default=self._usage)
        return self._usage

    def close(self) -> None:
        self._is_closing = True  # nobody may wait for responses of an executor that was shut down
        self._thread.join(CLOSE_SECONDS)
        try:
            self._executor.shutdown()
        except Exception as error:
            logger.warning("TensorRT-LLM's executor of the %s did not shut down: %s", self.name, one_line(error))

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise self._dead(one_line(error)) from error

    def _listen(self) -> None:
        try:
            while not self._is_closing:
                began = time.monotonic()
                responses = self._executor.await_responses(timeout=timedelta(seconds=POLL_SECONDS))
                if responses:
                    self._mailbox.put([self._answer(response) for response in responses])
                elif time.monotonic() - began < POLL_SECONDS / 2 and not self._is_closing:
                    # It waits for as long as it lives.
                    self._mailbox.fail(self._dead("it has ended"))
                    return
        except Exception as error:
            if not self._is_closing:
                logger.debug("%s: its responses cannot be had", self.name, exc_info=True)
                self._mailbox.fail(self._dead(one_line(error)))

    def _answer(self, response: Any) -> Answer:
        if response.has_error():
            return Answer(self, response.request_id, [], is_final=True, error=" ".join(response.error_msg.split()))
        result = response.result
        tokens = [int(token) for token in result.output_token_ids[0]] if result.output_token_ids else []
        reason = result.finish_reasons[0].name if result.finish_reasons else ""
        measured = result.request_perf_metrics
        num_reused = 0 if measured is None else measured.kv_cache_metrics.num_reused_blocks
        return Answer(self, response.request_id, tokens, result.is_final, reason, num_reused)

    def _dead(self, reason: str) -> EngineDeadError:
        return EngineDeadError(f"TensorRT-LLM's executor of the {self.name} stopped ({reason}): load the engines again")
