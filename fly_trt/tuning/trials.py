"""Candidates at work: each answers the same prompts on engines that are loaded once, and the clock is read.

It knows services and seconds, and nothing of what an answer is worth or which candidate comes next.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from fly_trt.benchmark.client import Client, Exchange, Load
from fly_trt.engines.directory import LoadedEngines
from fly_trt.params import SamplingParams
from fly_trt.service.config import DEFAULT_MAX_QUEUE_SIZE, ServiceConfig, resolve_speculative_config
from fly_trt.service.service import Service
from fly_trt.text.prompts import Prompt
from fly_trt.tuning.result import Candidate

WARM_UP = SamplingParams(max_tokens=16, ignore_eos=True)
WARM_UP_PROMPT_TOKENS = 8  # of a prompt: no answer that is measured is known from warming up


class Trials:
    """Runs candidates with `concurrency` requests in flight, greedily, `max_tokens` at most. A service stays open until
    its candidate is dropped, so that what it has learnt of step costs stays."""

    def __init__(self, engines: LoadedEngines, concurrency: int, max_tokens: int) -> None:
        self._engines = engines
        self.concurrency = concurrency
        self._load = Load(concurrency=concurrency)
        self._params = SamplingParams(max_tokens=max_tokens)
        self._settings = ServiceConfig(
            max_batch_size=concurrency, max_queue_size=DEFAULT_MAX_QUEUE_SIZE, enable_prefix_caching=False
        )
        self._services: dict[str, Service] = {}

    def answer(self, candidate: Candidate, prompts: Sequence[Prompt]) -> list[Exchange]:
        """In the order of the prompts. Each request's own time counts: with so many in flight, tokens over the sum of
        these times are in proportion to what is served in a second."""
        service = self._services.get(candidate.name) or self._open(candidate, prompts[0])
        exchanges, _ = Client(service).complete(prompts, self._params, self._load)
        return exchanges

    def keep(self, candidates: Sequence[Candidate]) -> None:
        """Closes the services of all others."""
        names = {candidate.name for candidate in candidates}
        for name in self._services.keys() - names:
            self._services.pop(name).shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep([])

    def _open(self, candidate: Candidate, prompt: Prompt) -> Service:
        config = resolve_speculative_config(self._engines.manifest, candidate.settings)
        service = self._services[candidate.name] = Service(self._engines, config, self._settings)
        token_ids = service.tokenize(prompt)[:WARM_UP_PROMPT_TOKENS]
        Client(service).complete([{"prompt_token_ids": token_ids}] * self.concurrency, WARM_UP, self._load)
        return service
