"""An engine that runs step by step as a test allows, and a caller's end, for tests of the engine thread."""

import math
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from fly_trt.errors import FlyError
from fly_trt.outputs import RequestOutput
from fly_trt.params import RequestOutputKind
from fly_trt.runtime.group import RequestGroup
from fly_trt.runtime.loop import GenerationLoop, LoopConfig
from fly_trt.runtime.thread import EngineThread
from loop_stack import letters, make_drafter, make_request
from table_engine import TableEngine, hashed

LANGUAGE = hashed(12, 3)
SECONDS = 20.0  # nothing here takes nearly as long
NONSENSE = 0  # a token that the language never emits
CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


class SteppedEngine(TableEngine):
    """Runs as many steps as were allowed, and then waits. A step that is told to raise has written nonsense into every
    cache."""

    def __init__(self, *, num_slots: int = 4, is_free: bool = True, trim_block: int | None = None) -> None:
        super().__init__(LANGUAGE, max_batch_size=num_slots, trim_block=trim_block)
        self.is_free = is_free
        self.failure: BaseException | None = None
        self.num_failures: float = math.inf  # steps that raise it
        self.on_trim: Callable[[], None] = lambda: None
        self.arrived = threading.Semaphore(0)  # once for each step that is about to run
        self._allowed = threading.Semaphore(0)

    def allow(self, num_steps: int) -> None:
        self._allowed.release(num_steps)

    def let_go(self) -> None:
        self.is_free = True
        self._allowed.release(1000)

    def run(self, step: Any) -> None:
        self.arrived.release()
        if not self.is_free:
            assert self._allowed.acquire(timeout=SECONDS), "the test allows every step"
        if self.failure is not None and self.num_failures:
            self.num_failures -= 1
            self.slots = [[NONSENSE] * len(slot) for slot in self.slots]
            raise self.failure
        super().run(step)

    def trim(self, num_tokens: int) -> int:
        self.on_trim()
        return super().trim(num_tokens)


class Inbox:
    """A caller's end: what its sink was given, in order."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[RequestOutput | FlyError] = SimpleQueue()
        self.put = self._queue.put

    def next(self) -> RequestOutput:
        output = self._queue.get(timeout=SECONDS)
        assert isinstance(output, RequestOutput), output
        return output

    def error(self) -> FlyError:
        while isinstance(output := self._queue.get(timeout=SECONDS), RequestOutput):
            assert not output.finished
        return output

    def all(self) -> list[RequestOutput]:
        """Every output up to the last."""
        outputs = [self.next()]
        while not outputs[-1].finished:
            outputs.append(self.next())
        return outputs

    def is_empty(self) -> bool:
        return self._queue.empty()


def make_group(
    prompt: list[int],
    inbox: Inbox,
    request_id: str = "0",
    kind: RequestOutputKind = CUMULATIVE,
    n: int = 1,
    queue_timeout: float | None = None,
    **params: Any,
) -> RequestGroup:
    requests = [make_request(prompt, request_id=request_id, index=i, **params) for i in range(n)]
    return RequestGroup(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=prompt,
        output_kind=kind,
        requests=requests,
        sink=inbox.put,
        queue_timeout=queue_timeout,
    )


def make_loop(engine: TableEngine, loop_class: type[GenerationLoop] = GenerationLoop, **sizes: Any) -> GenerationLoop:
    settings = {"num_slots": len(engine.slots), "max_seq_len": 240, "num_draft_tokens": 4, "max_num_tokens": 64}
    config = LoopConfig(**(settings | {"max_queue_size": 100} | sizes))
    return loop_class(engine, make_drafter("ngram", LANGUAGE), config, letters())


def is_over(thread: EngineThread, engine: SteppedEngine) -> bool:
    """Whether the engine thread has ended; waits for it."""
    engine.let_go()
    thread.shutdown()
    return engine.closed
