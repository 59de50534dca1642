"""An engine directory in memory: manifest, tokenizer, and engines of target and drafts, each loaded when first used.

A service loads its own, or is given a `LoadedEngines` that others have too: a pair that fills a GPU is then there once,
whatever the number of ways in which it is served. This module knows files and slots; it knows nothing of requests.
"""

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tokenizers import Tokenizer

from fly_trt.checks import check_at_least, check_flag, is_whole
from fly_trt.engines import Engine, EngineInfo, engine_info, find_backend, load_engine
from fly_trt.engines.fork import HomeProcess, let_children_exit
from fly_trt.engines.ranks import Ranks
from fly_trt.engines.turn import Turn
from fly_trt.errors import ConfigError, EngineError
from fly_trt.manifest import Manifest, ModelEngine, read_manifest
from fly_trt.text.tokenizer import load_tokenizer

Role = Literal["target", "draft", "self_draft", "inner_draft"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How the engines of a directory are loaded.

    max_batch_size: slots of the caches; None means as many as were built for. num_threads: CPU threads, shared by all
    engines of the process and free to run wherever it may; None chooses them (cores.choose_cores). device_id: CUDA
    device, for engines of a GPU; None means the calling thread's current one, and the thread is left with theirs as its
    current one.
    devices: in its place, a CUDA device for each rank of an engine that spans several; None means 0 and up.
    verify_hashes: check every file against the manifest's sha256 first.
    """

    max_batch_size: int | None = None
    num_threads: int | None = None
    device_id: int | None = None
    devices: Sequence[int] | None = None
    verify_hashes: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_batch_size", 1), ("num_threads", 1), ("device_id", 0)):
            if (value := getattr(self, name)) is not None:
                check_at_least(name, value, least)
        if self.devices is not None:
            self._check_devices(self.devices)
        check_flag("verify_hashes", self.verify_hashes)

    def _check_devices(self, devices: Sequence[int]) -> None:
        is_list = isinstance(devices, Sequence) and not isinstance(devices, (str, bytes))
        if not is_list or not devices or not all(is_whole(device) and device >= 0 for device in devices):
            raise ConfigError(f"devices {devices!r}: expected a list of CUDA devices, such as [0, 1]")
        if len(set(devices)) < len(devices):
            raise ConfigError(f"devices {list(devices)}: a device twice: each rank needs one of its own")
        if self.device_id is not None:
            raise ConfigError(f"device_id {self.device_id} and devices {list(devices)}: give one of them")


class LoadedEngines:
    """The engines of `engine_dir`, for one LLM or for several that take turns.

        with LoadedEngines("engines/pair") as engines:
            plain = LLM(engines, speculative_config={"method": None}, enable_prefix_caching=False)
            fly = LLM(engines, enable_prefix_caching=False)

    One of those that share them serves at a time: it has its `turn` until none of its requests is left or, where others
    wait for theirs, until those that run have ended; the rest waits for its next turn. Nobody can count on a cache that
    another one writes to, so that all of them go without prefix caching.
    Shutting one down leaves the engines to the others; `close` releases them, after the last one was shut down.

    The settings are those of EngineSettings; whoever shares the engines may use fewer than max_batch_size slots. The
    target has num_spare_slots more, in which no requests run.
    `watch(role, model, engine)` returns what stands in for each engine, once it is loaded: one that notes its steps.
    `load_seconds` has the time that each engine took, the self-drafts together. Raises EngineError for a directory that
    cannot be used, and ConfigError for a setting that cannot be.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str],
        *,
        max_batch_size: int | None = None,
        num_threads: int | None = None,
        device_id: int | None = None,
        devices: Sequence[int] | None = None,
        verify_hashes: bool = False,
        num_spare_slots: int = 0,
        watch: Callable[[Role, ModelEngine, Engine], Engine] | None = None,
    ) -> None:
        wanted = EngineSettings(
            max_batch_size=max_batch_size or None,
            num_threads=num_threads,
            device_id=device_id,
            devices=devices,
            verify_hashes=verify_hashes,
        )
        self.directory = Path(engine_dir).expanduser()
        self.manifest: Manifest = read_manifest(self.directory, verify_hashes=wanted.verify_hashes)
        self.backend = backend = find_backend(self.directory, self.manifest)
        self.max_batch_size = wanted.max_batch_size or self.manifest.limits.max_batch_size
        self.num_spare_slots = num_spare_slots
        self.load_seconds: dict[Role, float] = {}
        self._watch = watch
        self.turn = Turn()
        self._home = HomeProcess("engines")
        if backend.schedules:
            _check_own_places(self.manifest, wanted)
        elif wanted.num_threads is not None and not backend.has_threads:
            raise ConfigError(
                f"num_threads {wanted.num_threads}: has no effect, {self.manifest.name} was built for "
                f"{self.manifest.backend}, which computes on the GPU: leave it out"
            )
        places = [None] if backend.schedules else choose_devices(self.manifest, wanted, is_gpu=backend.is_gpu)
        self._settings: dict[str, Any] = {"num_threads": wanted.num_threads, "device_id": places[0]}
        self._ranks = Ranks([device for device in places if device is not None])
        self._engines: dict[str, Engine] = {}  # by model file
        # Also when the interpreter ends without a close(), and then after the threads that use them.
        self._finalizer = weakref.finalize(self, _close_all, self._engines, self._ranks, self._home)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory)

    @property
    def info(self) -> EngineInfo:
        """What the target can do. Where its backend schedules by itself, it is as the manifest has it."""
        if not self.backend.schedules:
            return self.target.info
        return engine_info(self.manifest, self.manifest.target)

    @property
    def target(self) -> Engine:
        return self._engine("target")

    @property
    def draft(self) -> Engine:
        """Raises EngineError for a directory without a draft."""
        return self._engine("draft")

    @property
    def self_drafts(self) -> list[tuple[int, Engine]]:
        """Drafts made of the target, each with the tokens from which on it is used, in that order; several may be one
        engine. Raises EngineError for a directory without any."""
        if not (drafts := self.manifest.self_drafts):
            raise EngineError(f"{self.directory}: built without a self-draft: rebuild with --self-draft")
        return [(draft.min_tokens, self._load("self_draft", draft.engine)) for draft in drafts]

    @property
    def inner_draft(self) -> Engine:
        """Raises EngineError for a directory without an inner draft."""
        return self._engine("inner_draft")

    @property
    def threads(self) -> str | None:
        """The CPU threads that compute and where their number comes from, in words; None before an engine is loaded,
        and where a GPU computes."""
        if self.backend.is_gpu:
            return None
        from fly_trt.engines.onnxruntime import describe_threads

        return describe_threads()

    def held_cores(self) -> contextlib.AbstractContextManager[None]:
        """Keeps a thread that runs loaded engines on the cores on which they compute, where a CPU does: it is one of
        those that compute."""
        if self.backend.is_gpu:
            return contextlib.nullcontext()
        from fly_trt.engines.onnxruntime import held_cores

        return held_cores()

    def when_failed(self, tell: Callable[[str], None]) -> None:
        """Has the bound method `tell` told why engines of several ranks cannot run any more, in one line, once that is
        so and by any thread."""
        self._ranks.when_failed(tell)

    def close(self) -> None:
        """Releases the engines. Safe to call twice, and in a forked process, which has none."""
        self._finalizer()

    def check_home(self) -> None:
        """Raises ConfigError in a process that was forked from the one that made this."""
        self._home.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _engine(self, role: Literal["target", "draft", "inner_draft"]) -> Engine:
        model = getattr(self.manifest, role)
        if model is None:
            raise EngineError(f"{self.directory}: built without a {role}: rebuild with --{role.replace('_', '-')}")
        return self._load(role, model)

    def _load(self, role: Role, model: ModelEngine) -> Engine:
        self._home.check()
        if not self._finalizer.alive:
            raise ConfigError(f"{self.directory}: these engines were closed: load them again")
        if model.model not in self._engines:
            let_children_exit()
            # Ranks do one thing at a time, all in the same order: nothing that another LLM runs may come in between.
            with self.turn.held() if model.tensor_parallel_size > 1 else contextlib.nullcontext():
                if model.model not in self._engines:
                    self._engines[model.model] = self._open(role, model)
        return self._engines[model.model]

    def _open(self, role: Role, model: ModelEngine) -> Engine:
        started = time.perf_counter()
        settings: dict[str, Any] = {
            "num_slots": self.max_batch_size,
            "num_spare_slots": self.num_spare_slots if role == "target" else 0,
        }
        if model.tensor_parallel_size > 1:
            engine: Engine = self._ranks.load(self.directory, self.manifest, model, **settings)
        else:
            engine = load_engine(self.directory, self.manifest, model, **settings, **self._settings)
        self.load_seconds[role] = self.load_seconds.get(role, 0.0) + time.perf_counter() - started
        return engine if self._watch is None else self._watch(role, model, engine)


def num_ranks(manifest: Manifest) -> int:
    """Of the engine of a directory that has most, which is how many GPUs it takes."""
    drafts = (manifest.draft, manifest.inner_draft, *(draft.engine for draft in manifest.self_drafts))
    return max(model.tensor_parallel_size for model in filter(None, (manifest.target, *drafts)))


def choose_devices(manifest: Manifest, settings: EngineSettings, *, is_gpu: bool) -> list[int | None]:
    """A device for each rank; None is the calling thread's current one. Raises ConfigError where what was asked for is
    not as many as there are ranks, and for engines of the CPU."""
    count, devices = num_ranks(manifest), settings.devices
    if devices is not None and not is_gpu:
        raise ConfigError(
            f"devices {list(devices)}: has no effect, {manifest.name} was built for {manifest.backend}, which runs on "
            "the CPU: leave it out, or rebuild with --device cuda"
        )
    ranks = f"{manifest.name} was built for {count} ranks, a GPU each"
    if devices is not None and len(devices) != count:
        one = f"{manifest.name} was built for one GPU" if count == 1 else ranks
        raise ConfigError(f"devices {list(devices)}: {one}: give {count} of them, or rebuild with --tp-size")
    if devices is not None:
        return list(devices)
    if count > 1 and settings.device_id is not None:
        raise ConfigError(f"device_id {settings.device_id}: {ranks}: give devices={list(range(count))} instead")
    return [settings.device_id] if count == 1 else list(range(count))


def _check_own_places(manifest: Manifest, settings: EngineSettings) -> None:
    for name in ("num_threads", "device_id", "devices"):
        if (value := getattr(settings, name)) is not None:
            raise ConfigError(
                f"{name} {value!r}: {manifest.name} was built for {manifest.backend}, which places its models by "
                "itself: leave it out, CUDA_VISIBLE_DEVICES says which GPUs it sees"
            )


def _close_all(engines: dict[str, Engine], ranks: Ranks, home: HomeProcess) -> None:
    if not home.is_here:
        return
    try:
        while engines:
            engines.popitem()[1].close()
    finally:  # processes must not be left, whatever an engine says
        ranks.end()
