"""A request's result."""

import queue
from dataclasses import dataclass, field

from ..llmapi.utils import AsyncQueue
from ..sampling_params import SamplingParams


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    request_perf_metrics: object = None
    _last_token_ids_len: int = 0

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._last_token_ids_len :]


class GenerationResult:
    """One request's. Iterating it takes one response a time; `outputs` is the same object every time."""

    def __init__(self, request_id: int, params: SamplingParams, executor: object) -> None:
        self.request_id = request_id
        self.sampling_params = params
        self.cached_tokens = 0
        self.decoding_iter = 0
        self._done = False
        self._aborted = False
        self._executor = executor
        self._outputs = [CompletionOutput(0)]
        try:
            self.aqueue: AsyncQueue | None = AsyncQueue()
            self.queue: AsyncQueue | queue.Queue = self.aqueue
        except RuntimeError:
            self.aqueue, self.queue = None, queue.Queue()

    @property
    def outputs(self) -> list[CompletionOutput]:
        return self._outputs

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        self._executor.abort_request(self.request_id)
        self._aborted = True

    def __aiter__(self) -> "GenerationResult":
        return self

    async def __anext__(self) -> "GenerationResult":
        if self._done:
            raise StopAsyncIteration
        assert self.aqueue is not None, "no event loop was there when it was made"
        self._handle(await self.aqueue.get())
        return self

    def _handle(self, response: dict) -> None:
        if "error" in response:
            self._executor.handle_background_error(response["error"])
        (output,) = self._outputs
        self._done = response["is_final"]
        self.cached_tokens = response["cached_tokens"]
        self.decoding_iter += 1
        output._last_token_ids_len = len(output.token_ids)
        output.token_ids.extend(response["token_ids"])
        if response["finish_reason"] == "CANCELLED":
            output.finish_reason = "cancelled"
        elif self._done:
            reasons = {"END_ID": "stop", "STOP_WORDS": "stop", "LENGTH": "length", "TIMED_OUT": "timeout"}
            output.finish_reason = reasons.get(response["finish_reason"])
            if output.finish_reason is None:  # of main alone
                self.error = response["finish_reason"]
            if response["finish_reason"] == "STOP_WORDS":
                output.stop_reason = output.token_ids[-1]
                if not self.sampling_params.include_stop_str_in_output:
                    output.token_ids = output.token_ids[:-1]
        self._executor.handle_background_error()
