"""From prompts with SamplingParams to a response: whole, or as a stream. What /v1/completions and /v1/chat/completions
make of outputs is a `Writer` of each; nothing else differs.
"""

import asyncio
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fly_trt.errors import RequestError
from fly_trt.inspection.records import round_records, token_records
from fly_trt.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fly_trt.params import RequestOutputKind, SamplingParams
from fly_trt.serving.openai.answers.usage import metrics_object, usage_object
from fly_trt.serving.openai.config import SpecDecodeMetrics
from fly_trt.serving.openai.http.streaming import (
    CLIENT_CLOSED_REQUEST,
    ClientGoneError,
    EventStream,
    event,
    json_response,
    to_json,
    while_connected,
)
from fly_trt.serving.openai.pool import PooledEngine
from fly_trt.serving.openai.requests.protocol import GenerationRequest
from fly_trt.serving.openai.requests.sampling import Defaults
from fly_trt.text.prompts import Prompt
from fly_trt.text.token_text import TokenReader

EXACT_BECAUSE = "X-Fly-Exact-Because"
"""A header of answers that were decoded exactly although their setting is loose, or of streams that begin so."""

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]


@dataclass(frozen=True, slots=True)
class Shared:
    """What the requests of a server have in common. developer: the role that messages of that name have for the chat
    template."""

    reader: TokenReader
    defaults: Defaults
    spec_decode_metrics: SpecDecodeMetrics
    developer: str

    def sampling(self, body: GenerationRequest) -> dict[str, Any]:
        """Fields of SamplingParams that are no client's to choose."""
        kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
        return {"output_kind": kind, "detailed_metrics": self.spec_decode_metrics == "detailed"}


class Writer(ABC):
    """Makes the answer to one request, or the chunks of its stream. Of several prompts with n completions each, choice
    i belongs to prompt i // n."""

    object_name: str
    chunk_name: str

    def __init__(
        self,
        llm: PooledEngine,
        shared: Shared,
        body: GenerationRequest,
        params: SamplingParams,
        answer_id: str,
        model: str,
    ) -> None:
        self.llm = llm
        self.shared = shared
        self.body = body
        self.params = params
        options = body.stream_options
        self._has_usage = bool(options and options.include_usage)
        self._has_all_usage = bool(options and options.continuous_usage_stats)
        self._metrics: dict[int, RequestMetrics] = {}
        self._head = {"id": answer_id, "object": self.object_name, "created": int(time.time()), "model": model}
        head = self._head | {"object": self.chunk_name}
        self._chunk_head = json.dumps(head, separators=(",", ":")).encode()[:-1] + b',"choices":['
        self._begun: set[int] = set()

    @abstractmethod
    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """A finished one. index: of the choice."""

    @abstractmethod
    def chunks(
        self, index: int, output: RequestOutput, completion: CompletionOutput, *, is_first: bool
    ) -> list[dict[str, Any]]:
        """What is new in a choice, as choices of a stream's chunks."""

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        """What an answer has at its top level besides."""
        return {}

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """From the last outputs, one for each prompt."""
        choices = [
            self.choice(number * self.params.n + completion.index, output, completion)
            for number, output in enumerate(outputs)
            for completion in output.outputs
        ]
        metrics = [output.metrics for output in outputs]
        answer = {**self._head, "choices": choices, "usage": self.usage(metrics)}
        if (found := self._speculation(metrics)) is not None:
            answer["metrics"] = found
        return answer | self.extras(outputs[0])

    def usage(self, metrics: Sequence[RequestMetrics]) -> dict[str, Any]:
        return usage_object(metrics)

    def events(self, number: int, output: RequestOutput) -> bytes:
        """Of one output of a stream; empty where it says nothing new."""
        self._metrics[number] = output.metrics
        found = []
        for completion in output.outputs:
            index = number * self.params.n + completion.index
            is_first = index not in self._begun
            self._begun.add(index)
            found += self.chunks(index, output, completion, is_first=is_first)
        return b"".join(map(self._event, found))

    def last_event(self) -> bytes:
        """With what the whole request used, where that was asked for."""
        if not self._has_usage:
            return b""
        metrics = list(self._metrics.values())
        last = b'],"usage":' + to_json(self.usage(metrics))
        if (found := self._speculation(metrics)) is not None:
            last += b',"metrics":' + to_json(found)
        return event(self._chunk_head + last + b"}")

    def additions(self, token_ids: Sequence[int], completion: CompletionOutput) -> dict[str, Any]:
        """What a choice has besides OpenAI's fields, where it was asked for."""
        found: dict[str, Any] = {}
        if self.body.return_token_ids:
            found["token_ids"] = list(token_ids)
        if self.body.speculation_trace:
            found["speculation_trace"] = token_records(self.shared.reader, token_ids, completion.trace or ())
            found["speculation_rounds"] = round_records(self.shared.reader, completion.rounds or ())
        return found

    def _speculation(self, metrics: Sequence[RequestMetrics]) -> dict[str, Any] | None:
        if self.shared.spec_decode_metrics == "none":
            return None
        return metrics_object(metrics, self.params, self.llm.speculative_config)

    def _event(self, choice: dict[str, Any]) -> bytes:
        usage = b""
        if self._has_all_usage:
            usage = b',"usage":' + to_json(self.usage(list(self._metrics.values())))
        elif self._has_usage:
            usage = b',"usage":null'
        return event(self._chunk_head + to_json(choice) + b"]" + usage + b"}")


async def respond(request: Request, prompts: Sequence[Prompt], writer: Writer) -> Response:
    """Raises FlyError for what fails before the first token; when the client goes away, the requests are aborted."""
    outputs = _generate(writer, prompts)
    try:
        if not writer.body.stream:
            found = await while_connected(request.receive, _collect(outputs))
            outputs_found = [found[number] for number in range(len(prompts))]
            return json_response(writer.answer(outputs_found), _headers(outputs_found))
        number, output = await while_connected(request.receive, _next(outputs))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return EventStream(writer.events(number, output), _stream(outputs, writer), _headers([output]))


def _headers(outputs: Sequence[RequestOutput]) -> dict[str, str]:
    reason = next((output.metrics.exact_because for output in outputs if output.metrics.exact_because), None)
    return {} if reason is None else {EXACT_BECAUSE: reason}


async def _generate(writer: Writer, prompts: Sequence[Prompt]) -> Outputs:
    """Outputs with the number of their prompt, in flight together. An error of one ends all."""
    streams = [writer.llm.generate(prompt, writer.params) for prompt in prompts]
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as outputs:
            async for output in outputs:
                yield 0, output
        return
    arrivals: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue()
    tasks = []
    try:
        for number, stream in enumerate(streams):
            tasks.append(asyncio.create_task(_forward(number, stream, arrivals)))
            await asyncio.sleep(0)  # others have their turn between any two prompts, which take time to be read
        num_open = len(tasks)
        while num_open:
            number, arrival = await arrivals.get()
            if isinstance(arrival, Exception):
                raise arrival
            num_open -= arrival.finished
            yield number, arrival
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    number: int, outputs: AsyncGenerator[RequestOutput, None], arrivals: "asyncio.Queue[tuple[int, Any]]"
) -> None:
    async with contextlib.aclosing(outputs):
        try:
            async for output in outputs:
                arrivals.put_nowait((number, output))
        except RequestError as error:
            arrivals.put_nowait((number, type(error)(f"prompt[{number}]: {error}")))
        except Exception as error:  # a bug too ends the request, which would wait for ever otherwise
            arrivals.put_nowait((number, error))


async def _collect(outputs: Outputs) -> dict[int, RequestOutput]:
    return {number: output async for number, output in outputs}


async def _next(outputs: Outputs) -> tuple[int, RequestOutput]:
    return await anext(outputs)


async def _stream(outputs: Outputs, writer: Writer) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(outputs):
        async for number, output in outputs:
            if events := writer.events(number, output):
                yield events
        if last := writer.last_event():
            yield last
