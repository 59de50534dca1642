"""An engine directory in memory: manifest, tokenizer, and the engines of target and draft, each loaded when first used.

A service loads its own, or is given a `LoadedEngines` that others have too: a pair that fills a GPU is then there once,
whatever the number of ways in which it is served. This module knows files and slots; it knows nothing of requests.
"""

import dataclasses
import os
import time
import weakref
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from tokenizers import Tokenizer

from fly_trt.engines import Engine, load_engine
from fly_trt.errors import ConfigError, EngineError
from fly_trt.fork import HomeProcess, let_children_exit
from fly_trt.manifest import Manifest, read_manifest
from fly_trt.runtime.turn import Turn
from fly_trt.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from fly_trt.service import ServiceConfig

Role = Literal["target", "draft"]


class LoadedEngines:
    """The engines of `engine_dir`, for one LLM or for several that take turns.

        with LoadedEngines("engines/pair") as engines:
            plain = LLM(engines, speculative_config={"method": None}, enable_prefix_caching=False)
            fly = LLM(engines, enable_prefix_caching=False)

    One of those that share them serves at a time: it has its `turn` until none of its requests is left or, where others
    wait for theirs, until those that run have ended; the rest waits for its next turn. Nobody can count on a cache that
    another one writes to, so that all of them go without prefix caching.
    Shutting one down leaves the engines to the others; `close` releases them, after the last one was shut down.

    max_batch_size: slots of the caches, None means as many as were built for; whoever shares them may use fewer.
    num_threads, device_id, verify_hashes: as ServiceConfig has them. `load_seconds` has the time that each engine took.
    Raises EngineError for a directory that cannot be used.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str],
        *,
        max_batch_size: int | None = None,
        num_threads: int | None = None,
        device_id: int | None = None,
        verify_hashes: bool = False,
    ) -> None:
        self.directory = Path(engine_dir).expanduser()
        self.manifest: Manifest = read_manifest(self.directory, verify_hashes=verify_hashes)
        self.max_batch_size = max_batch_size or self.manifest.limits.max_batch_size
        self.load_seconds: dict[Role, float] = {}
        self.turn = Turn()
        self._home = HomeProcess("engines")
        self._settings: dict[str, Any] = {"num_threads": num_threads, "device_id": device_id}
        self._engines: dict[Role, Engine] = {}
        # Also when the interpreter ends without a close(), and then after the threads that use them.
        self._finalizer = weakref.finalize(self, _close_all, self._engines, self._home)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory)

    @property
    def target(self) -> Engine:
        return self._engine("target")

    @property
    def draft(self) -> Engine:
        """Raises EngineError for a directory without a draft."""
        return self._engine("draft")

    def close(self) -> None:
        """Releases the engines. Safe to call twice, and in a forked process, which has none."""
        self._finalizer()

    def fitted(self, config: "ServiceConfig") -> "ServiceConfig":
        """The settings of one of those that share these engines. Raises ConfigError for what was settled by loading
        them, for what cannot be shared, and in a forked process."""
        self._home.check()
        for name, default in (("num_threads", None), ("device_id", None), ("verify_hashes", False)):
            if (value := getattr(config, name)) is not default:
                raise ConfigError(f"{name} {value!r}: the engines are loaded already: give it to LoadedEngines")
        if config.enable_prefix_caching:
            raise ConfigError(
                "enable_prefix_caching True: others write to the caches of shared engines: add "
                "enable_prefix_caching=False"
            )
        if (config.max_batch_size or 0) > self.max_batch_size:
            raise ConfigError(
                f"max_batch_size {config.max_batch_size}: the engines were loaded for {self.max_batch_size}: give "
                f"LoadedEngines max_batch_size={config.max_batch_size}"
            )
        return dataclasses.replace(config, max_batch_size=config.max_batch_size or self.max_batch_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _engine(self, role: Role) -> Engine:
        self._home.check()
        if not self._finalizer.alive:
            raise ConfigError(f"{self.directory}: these engines were closed: load them again")
        if role not in self._engines:
            model = getattr(self.manifest, role)
            if model is None:
                raise EngineError(f"{self.directory}: built without a {role}: rebuild with --{role}")
            let_children_exit()
            started = time.perf_counter()
            self._engines[role] = load_engine(
                self.directory, self.manifest, model, num_slots=self.max_batch_size, **self._settings
            )
            self.load_seconds[role] = time.perf_counter() - started
        return self._engines[role]


def _close_all(engines: dict[Role, Engine], home: HomeProcess) -> None:
    while engines and home.is_here:
        engines.popitem()[1].close()
