"""A backend that schedules by itself, in one module: it counts on from the last token, one token a step."""

from fly_trt import ConfigError, RequestError
from fly_trt.errors import EngineError, QueueFullError
from fly_trt.runtime.executor import ExecutorParts
from fly_trt.runtime.request import Request, RequestState

CLOSED: list[str] = []


def load_executor(parts: ExecutorParts) -> "CountingExecutor":
    if parts.speculative_config.method == "ngram":
        raise ConfigError("method 'ngram': the toy has none")
    return CountingExecutor(parts)


class CountingExecutor:
    def __init__(self, parts: ExecutorParts) -> None:
        self.is_admitting = True
        self._parts = parts
        self._requests: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return sum(not request.is_waiting for request in self._requests)

    @property
    def num_free_places(self) -> int:
        return self._parts.max_queue_size - len(self._requests)

    def check(self, request: Request) -> None:
        if request.params.temperature > 0:
            raise RequestError(f"temperature {request.params.temperature}: the toy samples nothing")

    def add(self, requests: list[Request]) -> None:
        if len(requests) > self.num_free_places:
            raise QueueFullError("full")
        self._requests += requests

    def step(self) -> list[Request]:
        for request in self._requests:
            request.enter(RequestState.DECODE)
            request.commit([(int(request.sequence.tokens[-1]) + 1) % self._parts.manifest.target.vocab_size])
        changed, self._requests = self._requests, [r for r in self._requests if not r.is_finished]
        return changed

    def abort(self, request: Request) -> None:
        if not request.is_finished:
            request.finish("abort")
            self._requests.remove(request)

    def fail_running(self, reason: str) -> list[Request]:
        failed, self._requests = self._requests, []
        for request in failed:
            request.fail(EngineError(reason))
        return failed

    def probe(self) -> None:
        """It has no engine that could fail."""

    def close(self) -> None:
        CLOSED.append(self._parts.manifest.name)
