"""The client of a benchmark: sends prompts as a load says and notes when what comes back.

Times are taken where the runtime hands an output over, in the engine thread, so that no other thread's turn is in them.
"""

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fly_trt.errors import ConfigError
from fly_trt.outputs import RequestMetrics, RequestOutput
from fly_trt.params import RequestOutputKind, SamplingParams
from fly_trt.service.inbox import Inbox
from fly_trt.service.service import Service
from fly_trt.text.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive: `concurrency` of them in flight until all are done, or `request_rate` a second on average,
    at random moments of a Poisson process; an infinite rate sends all at once."""

    concurrency: int | None = None
    request_rate: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.request_rate is None):
            raise ConfigError("a load has either a concurrency or a request_rate: give one of them")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"concurrency {self.concurrency}: expected at least 1 request in flight")
        if self.request_rate is not None and not self.request_rate > 0:
            raise ConfigError(f"request_rate {self.request_rate:g}: expected requests per second, above 0, or inf")

    def arrivals(self, count: int, seed: int) -> list[float]:
        """Seconds from the start at which each of `count` requests may be sent; the same for the same seed."""
        if self.request_rate is None:
            return [0.0] * count
        gaps = np.random.default_rng(seed).exponential(1 / self.request_rate, count)
        return [float(moment) for moment in np.cumsum(gaps) - gaps[:1]]  # the first one comes at once

    def __str__(self) -> str:
        return f"{self.concurrency} in flight" if self.request_rate is None else f"{self.request_rate:g} requests/s"


@dataclass(slots=True)
class Exchange:
    """One request and its answer. `sent` and `chunk_times` are seconds of one clock; a chunk is what one step brought,
    one token or several. `log_likelihood`, in nats, is the output's under the target, where somebody has asked for it.
    """

    sent: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    prompt_token_ids: list[int] = field(default_factory=list)
    log_likelihood: float | None = None

    def add(self, output: RequestOutput) -> None:
        """In the engine thread, so that no other thread's turn is in the times."""
        (completion,) = output.outputs
        if completion.token_ids:
            self.chunk_times.append(time.perf_counter())
        self.token_ids += completion.token_ids
        self.text += completion.text
        self.metrics = output.metrics
        self.prompt_token_ids = output.prompt_token_ids

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending the request to its first chunk."""
        return self.chunk_times[0] - self.sent

    @property
    def latency(self) -> float:
        """Seconds from sending the request to its last chunk."""
        return self.chunk_times[-1] - self.sent

    @property
    def nll_per_token(self) -> float | None:
        """Mean of -ln p over the output tokens, in nats."""
        return None if self.log_likelihood is None else -self.log_likelihood / len(self.token_ids)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds between consecutive chunks, however many tokens each of them has."""
        return [later - earlier for earlier, later in zip(self.chunk_times, self.chunk_times[1:], strict=False)]

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds from the first chunk to the last by output token after the first; None for a single one."""
        num_later = len(self.token_ids) - 1
        return (self.chunk_times[-1] - self.chunk_times[0]) / num_later if num_later > 0 else None


class Client:
    """Sends requests to one service and waits for them. Ctrl-C or an error aborts what is still served."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def complete(
        self, prompts: Sequence[Prompt], params: SamplingParams, load: Load, seed: int = 0
    ) -> tuple[list[Exchange], float]:
        """The exchanges, in the order of the prompts, and the seconds until the last one was complete."""
        exchanges: list[Exchange] = []
        arrivals = load.arrivals(len(prompts), seed)
        limit = load.concurrency or len(prompts)
        started = time.perf_counter()
        with self._service.open_inbox() as inbox:
            while len(exchanges) < len(prompts) or inbox.num_open:
                wait: float | None = None
                while len(exchanges) < len(prompts) and inbox.num_open < limit:
                    wait = arrivals[len(exchanges)] - (time.perf_counter() - started)
                    if wait > 0:
                        break
                    exchanges.append(_send(inbox, prompts[len(exchanges)], params))
                    wait = None
                with contextlib.suppress(TimeoutError):
                    inbox.get(timeout=wait)
        return exchanges, time.perf_counter() - started

    def outputs(self, prompts: Sequence[Prompt], params: SamplingParams, load: Load) -> list[RequestOutput]:
        """Whole outputs, in the order of the prompts, as many of them in flight as the load has; nothing is timed."""
        found: dict[str, RequestOutput] = {}
        with self._service.open_inbox() as inbox:
            handles = [inbox.prepare(prompt, params, output_kind=RequestOutputKind.FINAL_ONLY) for prompt in prompts]
            waiting = deque(handles)
            while waiting or inbox.num_open:
                while waiting and inbox.num_open < (load.concurrency or len(prompts)):
                    inbox.submit(waiting.popleft())
                arrival = inbox.get()
                found[arrival.handle.request_id] = arrival.output
        return [found[handle.request_id] for handle in handles]


def _send(inbox: Inbox, prompt: Prompt, params: SamplingParams) -> Exchange:
    exchange = Exchange(sent=time.perf_counter())
    inbox.submit(inbox.prepare(prompt, params, output_kind=RequestOutputKind.DELTA, observe=exchange.add))
    return exchange
