"""One prompt with its n sequences, and the outputs that its caller gets."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from fly_trt.errors import FlyError
from fly_trt.outputs import CompletionOutput, RequestOutput
from fly_trt.params import RequestOutputKind
from fly_trt.runtime.request import Request

logger = logging.getLogger(__name__)

Sink = Callable[[RequestOutput | FlyError], None]
"""Takes outputs in the engine's thread, so it must only hand them on. An error or a finished output is the last. Raises
SinkClosedError when nobody waits for them any more."""


class SinkClosedError(Exception):
    """Whoever waited for outputs is gone: the request ends."""


@dataclass(slots=True, eq=False)
class RequestGroup:
    """`queue_timeout`: seconds that it may wait for its first slot, None is for ever."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    output_kind: RequestOutputKind
    requests: list[Request]
    sink: Sink
    queue_timeout: float | None = None
    is_done: bool = False
    _sent_tokens: list[int] = field(init=False)
    _sent_characters: list[int] = field(init=False)
    _sent_rounds: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._sent_tokens = [0] * len(self.requests)
        self._sent_characters = [0] * len(self.requests)
        self._sent_rounds = [0] * len(self.requests)

    @property
    def is_waiting(self) -> bool:
        """Whether none of the sequences has had a slot yet."""
        return all(request.is_waiting for request in self.requests)

    @property
    def is_over(self) -> bool:
        """Whether the next update is the last one."""
        return any(r.error is not None for r in self.requests) or all(r.is_finished for r in self.requests)

    def update(self, changed: list[Request]) -> None:
        """Tells the caller what the changed sequences of this group emitted."""
        if self.is_done:
            return
        failed = next((request.error for request in changed if request.error is not None), None)
        if failed is not None:
            self.fail(failed)
            return
        self.is_done = all(request.is_finished for request in self.requests)
        if self.output_kind is RequestOutputKind.DELTA:
            self._send(self._output([self._delta(request) for request in changed]))
        elif self.output_kind is RequestOutputKind.CUMULATIVE or self.is_done:
            self._send(self._output([request.completion() for request in self.requests]))

    def fail(self, error: FlyError) -> None:
        """Ends the group for its caller; the loop still has to be told."""
        self.is_done = True
        self._send(error)

    def _send(self, output: RequestOutput | FlyError) -> None:
        try:
            self.sink(output)
        except SinkClosedError:
            self.is_done = True
        except Exception:  # whoever does not take outputs gets no more of them; the others are served on
            logger.exception("request %s: its sink failed", self.request_id)
            self.is_done = True

    def _delta(self, request: Request) -> CompletionOutput:
        index = request.index
        sent = self._sent_tokens[index], self._sent_characters[index], self._sent_rounds[index]
        completion = request.completion(*sent)
        self._sent_tokens[index] += len(completion.token_ids)
        self._sent_characters[index] += len(completion.text)
        self._sent_rounds[index] += len(completion.rounds or ())
        return completion

    def _output(self, completions: list[CompletionOutput]) -> RequestOutput:
        first = self.requests[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=completions,
            metrics=first.metrics.merged([request.metrics for request in self.requests[1:]]),
            finished=self.is_done,
            prompt_logprobs=None if first.params.prompt_logprobs is None else first.prompt_logprobs,
        )
