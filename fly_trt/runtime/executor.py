"""What the engine thread asks of whatever runs the engines: the generation loop, or an engine that schedules by itself.

It names the calls and what they promise. It knows nothing of threads, callers or how requests are served.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from fly_trt.manifest import Manifest
from fly_trt.params import SpeculativeConfig
from fly_trt.runtime.metrics import Metrics
from fly_trt.runtime.request import Request


class Executor(Protocol):
    """Serves requests, one iteration at each call of `step`.

    One thread calls `step`, `fail_running`, `probe` and `abort`. `add` and the properties may be used from any thread,
    also in the middle of a step. A request's `state`, which `enter` changes, says where it stands: WAITING until
    it has a slot.
    """

    is_admitting: bool
    """Whether `step` may start requests that wait. Set by whoever calls `step`, between two of them."""

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do."""

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""

    @property
    def num_free_places(self) -> int:
        """Requests that can still be added."""

    def add(self, requests: list[Request]) -> None:
        """Queues all of the requests or none. Raises QueueFullError when they do not fit."""

    def step(self) -> list[Request]:
        """One iteration; returns the requests that emitted tokens or ended, and none that was aborted."""

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is, unless it has ended. What it has emitted stays. Runs no engine."""

    def fail_running(self, reason: str) -> list[Request]:
        """After a step that raised: ends the requests that were in it, each with an EngineError. Those that wait go on
        waiting. Returns what `step` would have. Runs no engine."""

    def probe(self) -> None:
        """Runs the engines once, while no request is running. Raises what they raise."""


class OwnExecutor(Executor, Protocol):
    """An executor with engines of its own, which it batches, and whose caches it holds, by itself."""

    def check(self, request: Request) -> None:
        """Raises RequestError for what it cannot do, by the name of the setting. Any thread may ask."""

    def close(self) -> None:
        """Releases the engines. Called once, after the last step, by the thread that called `step`."""


@dataclass(frozen=True, slots=True)
class ExecutorParts:
    """What an OwnExecutor is made of: an engine directory, how drafts are made and accepted (`as_built`: without what
    the caller changed), and sizes in requests and tokens: num_slots in flight, of max_seq_len tokens, max_queue_size
    waiting, and max_num_tokens of one iteration, None as built. prefix_caching: prompts start from others' caches."""

    directory: Path
    manifest: Manifest
    speculative_config: SpeculativeConfig
    num_slots: int
    max_seq_len: int
    max_queue_size: int
    tokenizer: Tokenizer
    metrics: Metrics
    as_built: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    max_num_tokens: int | None = None
    prefix_caching: bool = True


class LoadExecutor(Protocol):
    """Of a backend that schedules by itself. Raises EngineError for what cannot be loaded, and ConfigError for
    settings that do not fit what was built."""

    def __call__(self, parts: ExecutorParts) -> OwnExecutor: ...
