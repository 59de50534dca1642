"""The engines behind one server: a request goes to those with the least to do, and never to dead ones.

The pool counts the requests that it has given to each. It knows nothing of HTTP.
"""

import contextlib
import itertools
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from fly_trt.async_llm import AsyncLLM
from fly_trt.engines import find_backend
from fly_trt.engines.directory import num_ranks
from fly_trt.errors import ConfigError, EngineDeadError, FlyError, RequestError, one_line
from fly_trt.manifest import Manifest, read_manifest
from fly_trt.outputs import RequestOutput
from fly_trt.params import SamplingParams
from fly_trt.serving.openai.http.errors import ApiError
from fly_trt.text.prompts import Prompt

Observer = Callable[[Prompt, SamplingParams, RequestOutput | None], None]
"""Is told of every prompt that is sent to an engine, and again of the last output of each."""


class PooledEngine:
    """One AsyncLLM whose requests are counted. What else it has is AsyncLLM's."""

    def __init__(self, llm: AsyncLLM, pool: "EnginePool") -> None:
        self.llm = llm
        self.request_ids: set[str] = set()
        self.last_choice = -1
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)

    @property
    def num_requests(self) -> int:
        return len(self.request_ids)

    @property
    def is_alive(self) -> bool:
        try:
            self.llm.check_health()
        except FlyError:
            return False
        return True

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """As AsyncLLM's, with the pool's queue_timeout. Raises ApiError in place of an output that was cut short
        because the server stops."""
        params = sampling_params or SamplingParams()
        request_id = request_id or f"req-{secrets.token_hex(12)}"
        if request_id in self.request_ids:
            raise RequestError(f"request_id {request_id!r}: already in use: give each request its own")
        self._pool.observe(prompt, params, None)
        outputs = self.llm.generate(prompt, params, request_id, queue_timeout=self._pool.queue_timeout)
        self.request_ids.add(request_id)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if output.finished:
                        self._pool.check_not_cut(output)
                        self._pool.observe(prompt, params, output)
                    yield output
        except ConfigError as error:
            if self.is_alive:
                raise
            raise EngineDeadError(one_line(error)) from None  # this LLM was shut down: no fault of the caller
        finally:
            self.request_ids.discard(request_id)


class EnginePool:
    """One AsyncLLM or several of the same engine directory, each on devices of its own."""

    def __init__(self, llms: Sequence[AsyncLLM], *, queue_timeout: float | None = None) -> None:
        self.llms = tuple(llms)
        self.engines = tuple(PooledEngine(llm, self) for llm in llms)
        self.queue_timeout = queue_timeout
        self.observe: Observer = lambda prompt, params, output: None
        self._is_cut_short = False
        self._choices = itertools.count()

    @property
    def manifest(self) -> Manifest:
        return self.llms[0].manifest

    @property
    def num_requests(self) -> int:
        return sum(engine.num_requests for engine in self.engines)

    @property
    def num_alive(self) -> int:
        return sum(engine.is_alive for engine in self.engines)

    def choose(self) -> PooledEngine:
        """The one with the fewest requests; of several such the one that was not chosen for longest, since what was
        chosen begins a moment later. Raises EngineDeadError when none is left."""
        alive = [engine for engine in self.engines if engine.is_alive]
        if not alive:
            self.llms[0].check_health()
        best = min(alive, key=lambda engine: (engine.num_requests, engine.last_choice))
        best.last_choice = next(self._choices)
        return best

    def reset_breaker(self, setting: str | None) -> list[str]:
        """On all engines, of which each judges by its own audits; returns which settings were tripped. Raises
        RequestError for one that none of them knows, ConfigError without a breaker."""
        knowing = [llm for llm in self.llms if any(setting in (None, state.setting) for state in llm.breaker_state())]
        return sorted({name for llm in knowing or self.llms[:1] for name in llm.reset_breaker(setting)})

    async def cut_short(self) -> None:
        """Ends the requests that are served: their callers get an error, as do those of later ones. One whose prompt is
        being read now needs another call."""
        self._is_cut_short = True
        for engine in self.engines:
            for request_id in list(engine.request_ids):
                await engine.llm.abort(request_id)

    def check_not_cut(self, output: RequestOutput) -> None:
        if self._is_cut_short and any(completion.finish_reason == "abort" for completion in output.outputs):
            raise ApiError(503, "the server stops: send the request again", code="server_stopping")

    def shutdown(self) -> None:
        """Ends the engines of all, also when one does not end well."""
        failures = []
        for llm in self.llms:
            try:
                llm.shutdown()
            except FlyError as error:
                failures.append(error)
        if failures:
            raise failures[0]


def device_groups(engine_dir: str | os.PathLike[str], devices: Sequence[int] | None) -> list[list[int] | None]:
    """The devices of each engine: as many as it has ranks, or what it has to say of them. None leaves them open."""
    if devices is None:
        return [None]
    directory = Path(engine_dir).expanduser()
    manifest = read_manifest(directory)
    if not find_backend(directory, manifest).is_gpu:
        return [list(devices)]  # the engine says what is wrong
    return list(group_devices(devices, num_ranks(manifest)))


def group_devices(devices: Sequence[int], num_ranks: int) -> list[list[int]]:
    """In the order that they were given in. Where they do not go up they stay together, for the engine to refuse."""
    if not devices or len(devices) % num_ranks or len(set(devices)) < len(devices):
        return [list(devices)]
    return [list(devices[start : start + num_ranks]) for start in range(0, len(devices), num_ranks)]


def load_pool(load: Sequence[Callable[[], AsyncLLM]], queue_timeout: float | None) -> EnginePool:
    """Loads one engine after the other, ready for grammars; where one fails, those before it end."""
    if queue_timeout is not None and not queue_timeout > 0:
        raise ConfigError(f"queue_timeout {queue_timeout!r}: expected seconds, above 0")
    with contextlib.ExitStack() as stack:
        llms = []
        for load_one in load:
            llms.append(load_one())
            stack.callback(llms[-1].shutdown)
            llms[-1].warm_up_grammars()
        stack.pop_all()
    return EnginePool(llms, queue_timeout=queue_timeout)
