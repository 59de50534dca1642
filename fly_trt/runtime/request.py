"""One request's state while it is served: what was asked, what is committed, and where its cache stands."""

import time
from dataclasses import dataclass, field, replace
from enum import Enum

from fly_trt.engines.base import AcceptancePolicy
from fly_trt.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from fly_trt.params import SamplingParams
from fly_trt.sequence import TokenSequence
from fly_trt.tokenizer import Detokenizer


class RequestState(Enum):
    """WAITING -> PREFILL -> DECODE -> FINISHED; an abort leads to FINISHED from anywhere."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """`sequence` is prompt and output; the target's cache holds its first `num_cached` tokens. `end_token_ids` end the
    sequence; `stop_token_ids` are those of them that only this request has."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    policy: AcceptancePolicy
    max_tokens: int
    end_token_ids: frozenset[int]
    stop_token_ids: frozenset[int]
    detokenizer: Detokenizer
    sequence: TokenSequence
    state: RequestState = RequestState.WAITING
    slot: int = -1
    num_cached: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    arrival: float = field(default_factory=time.perf_counter)

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    def commit(self, tokens: list[int]) -> int:
        """Emits tokens until the request ends and returns how many it took; the rest never existed for the caller."""
        for count, token in enumerate(tokens, start=1):
            self.output_token_ids.append(token)
            if self._ends_with(token):
                return count
        return len(tokens)

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        self.detokenizer.finish()
        self.state = RequestState.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.metrics.num_output_tokens = len(self.output_token_ids)
        self.metrics.latency = time.perf_counter() - self.arrival

    def output(self) -> RequestOutput:
        """The request as the caller sees it now; text that may still become a stop string is not shown."""
        text = self.detokenizer.text
        if self.finish_reason is None:
            text = text[: self.detokenizer.streamable_length]
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=list(self.output_token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        metrics = replace(self.metrics, acceptance_histogram=list(self.metrics.acceptance_histogram))
        return RequestOutput(self.request_id, self.prompt, self.prompt_token_ids, [completion], metrics)

    def _ends_with(self, token: int) -> bool:
        if len(self.output_token_ids) == 1:
            self.metrics.time_to_first_token = time.perf_counter() - self.arrival
        if token in self.end_token_ids:
            if self.params.include_stop_str_in_output:
                self.detokenizer.push(token)
            self.finish("stop", token if token in self.stop_token_ids else None)
        elif self.detokenizer.push(token):
            self.finish("stop", self.detokenizer.stop_string)
        elif len(self.output_token_ids) >= self.max_tokens:
            self.finish("length")
        return self.state is RequestState.FINISHED
