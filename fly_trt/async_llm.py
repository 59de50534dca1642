"""`AsyncLLM`: the runtime for a server that runs on asyncio. Requests of all clients share one in-flight batch."""

import asyncio
import functools
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

from fly_trt.outputs import RequestOutput
from fly_trt.params import SamplingParams
from fly_trt.service.facade import Facade
from fly_trt.text.prompts import Prompt


class AsyncLLM(Facade):
    """Serves requests that arrive at any time.

        async with AsyncLLM("engines/pair") as llm:
            async for output in llm.generate("Tell me", SamplingParams(max_tokens=64)):
                print(output.outputs[0].text)

    Arguments as LLM's. Loading takes the calling thread's time; everything else happens in the engine thread.
    """

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        queue_timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields outputs as params.output_kind says: CUMULATIVE everything so far, DELTA what is new, FINAL_ONLY one
        output. The last one is finished.

        request_id: unique among the requests being served; None makes one. queue_timeout: seconds that the request
        may wait for a slot once its prompt was read, None is for ever; it is looked at between two steps. Leaving
        the iteration, or cancelling the task, aborts the request. Raises RequestError for a request that cannot be
        served, QueueFullError when too many wait, QueueTimeoutError when it had no slot in time.
        """
        with self._service.open_async_inbox() as inbox:
            prepare = functools.partial(
                inbox.prepare, prompt, sampling_params, request_id=request_id, queue_timeout=queue_timeout
            )
            is_quick = self._service.is_quick(prompt, sampling_params)
            inbox.submit(prepare() if is_quick else await asyncio.to_thread(prepare))
            while inbox.num_open:
                yield (await inbox.get()).output

    async def abort(self, request_id: str) -> None:
        """Ends a request that is still served; its iterator yields a last output with finish_reason "abort"."""
        self._service.abort(request_id)

    def check_health(self) -> None:
        """Raises EngineDeadError when the engine thread has ended after an error, ConfigError after shutdown."""
        self._service.check_running()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.shutdown)
