"""Serves a directory that was built for TensorRT-LLM's PyTorch backend: `tensorrt_llm.LLM` behind fly-trt's requests.

TensorRT-LLM batches, drafts, and accepts by FLy in its workers (`FLY_TRT_TRTLLM`); token ids come from there, and all
that is text or the end of a request is decided here. It knows requests and tokens, and nothing of caches or logits.
"""

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from fly_trt.errors import ConfigError, EngineDeadError, EngineError, QueueFullError, one_line
from fly_trt.integrations.tensorrt_llm.environment import NO_ACCEPTANCE
from fly_trt.integrations.tensorrt_llm.llm_settings import (
    ServerSettings,
    check_as_built,
    environment_of,
    read_arguments,
)
from fly_trt.integrations.tensorrt_llm.llm_streams import Event, Failure, Tokens, TokenStreams
from fly_trt.integrations.tensorrt_llm.modes import Release, release_of
from fly_trt.outputs import RoundCounts
from fly_trt.runtime.executor import ExecutorParts
from fly_trt.runtime.request import Request, RequestState

logger = logging.getLogger(__name__)

STEP_SECONDS = 0.05
"""A step without news ends after so long: aborts and deadlines are taken between steps."""
PROBE_SECONDS = 60.0
DRAFT_SOURCE = "model"
HOOK = "fly_trt.integrations.tensorrt_llm.import_hook"
"""What fly_trt_tensorrt_llm.pth of the wheel loads when a Python process starts."""


def load_executor(parts: ExecutorParts) -> "LlmExecutor":
    """Starts tensorrt_llm's workers, which load the models of the directory. Raises EngineError where tensorrt_llm is
    missing, of another version, or does not load them, and ConfigError for settings that do not fit what was built."""
    check_as_built(parts)
    if importlib.util.find_spec("tensorrt_llm") is None:
        raise EngineError(
            f"{parts.directory}: needs tensorrt_llm, which is not installed: run in NVIDIA's TensorRT-LLM container, "
            "or pip install tensorrt_llm, and there pip install --no-deps fly-trt"
        )
    arguments = read_arguments(parts.directory, parts.manifest)
    environment = environment_of(parts)
    with _environment(environment):  # from the import on, which initialises MPI
        if environment is not NO_ACCEPTANCE:
            _check_hook(parts)
        library = _import_library(parts)
        settings = ServerSettings(parts, library.release, arguments)
        try:
            streams = TokenStreams(lambda: library.load(settings.arguments), library.refusals)
        except Exception as error:
            raise EngineError(f"{parts.directory}: tensorrt_llm did not load it: {one_line(error)}") from error
    return LlmExecutor(parts, settings, streams, library)


class LlmExecutor:
    """Requests wait here until one of `num_slots` is free, and are then TensorRT-LLM's to schedule."""

    def __init__(
        self, parts: ExecutorParts, settings: ServerSettings, streams: TokenStreams, library: "_Library"
    ) -> None:
        self.is_admitting = True
        self._parts = parts
        self._settings = settings
        self._streams = streams
        self._library = library
        self._metrics = parts.metrics
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._running: dict[Request, None] = {}
        self._changed: dict[Request, None] = {}  # since somebody was told
        # Each response is then one iteration: one token, and the draft tokens that were accepted before it.
        self._counts_rounds = settings.speculates and settings.arguments.get("stream_interval", 1) == 1

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_free_places(self) -> int:
        return self._parts.max_queue_size - len(self._waiting)

    def check(self, request: Request) -> None:
        self._settings.check(request)

    def add(self, requests: list[Request]) -> None:
        with self._lock:
            if len(requests) > self.num_free_places:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, max_queue_size is {self._parts.max_queue_size}: try "
                    "again later"
                )
            self._waiting += requests
        self._streams.wake()

    def step(self) -> list[Request]:
        self._admit()
        for event in self._streams.events(STEP_SECONDS):
            if (request := event.key) not in self._running:
                continue  # it ended here while this was on its way
            assert isinstance(request, Request)
            self._take(request, event)
            self._changed[request] = None
        self._set_load()
        return self._take_changed()

    def abort(self, request: Request) -> None:
        if request.is_finished:
            return
        request.finish("abort")
        if request in self._running:
            self._streams.abort(request)
        self._remove(request)
        self._set_load()

    def fail_running(self, reason: str) -> list[Request]:
        for request in list(self._running):
            self._streams.abort(request)
            if not request.is_finished:
                name = f"request {request.request_id}"
                request.fail(EngineError(f"{name}: the step that it was in failed ({reason}): send it again"))
            self._changed[request] = None  # beside those that had ended in it
            self._remove(request)
        return self._take_changed()

    def probe(self) -> None:
        key = object()
        params = self._library.sampling_params(max_tokens=1, end_id=0, ignore_eos=True, detokenize=False)
        self._streams.submit(key, [0], params)
        for _ in range(round(PROBE_SECONDS / STEP_SECONDS)):
            for event in self._streams.events(STEP_SECONDS):
                if event.key is not key:
                    continue
                if isinstance(event, Failure):
                    raise EngineError(event.reason)
                if event.finish_reason is not None:
                    return
        raise EngineError(f"tensorrt_llm has not made one token within {PROBE_SECONDS:g} s")

    def close(self) -> None:
        self._streams.close()

    def _admit(self) -> None:
        while self.is_admitting and len(self._running) < self._parts.num_slots:
            with self._lock:
                if not self._waiting:
                    return
                request = self._waiting.popleft()
                request.enter(RequestState.PREFILL)
                self._running[request] = None
            try:
                params = self._sampling_params(request)
            except Exception as error:  # the library refuses a value: it is this request's
                request.fail(EngineError(f"request {request.request_id}: tensorrt_llm refuses it: {one_line(error)}"))
                self._changed[request] = None
                self._remove(request)
                continue
            self._streams.submit(request, request.prompt_token_ids, params)

    def _take(self, request: Request, event: Event) -> None:
        if isinstance(event, Failure):
            if event.is_fatal:
                logger.error("tensorrt_llm stopped: %s", event.reason)
                raise EngineDeadError(f"tensorrt_llm stopped: {event.reason}")
            request.fail(EngineError(f"request {request.request_id}: tensorrt_llm ended it: {event.reason}"))
        else:
            self._take_tokens(request, event)
        if request.is_finished:
            self._remove(request)

    def _take_tokens(self, request: Request, event: Tokens) -> None:
        request.num_prefix_hits = event.num_cached
        if token_ids := self._with_end(request, event):
            request.enter(RequestState.DECODE)
            self._commit(request, token_ids)
        if request.is_finished:
            if event.finish_reason is None:  # a stop string, which only the text has
                self._streams.abort(request)
        elif event.finish_reason == "length":
            request.finish("length")
        elif event.finish_reason is not None:
            reason = f"request {request.request_id}: tensorrt_llm ended it: {event.finish_reason}"
            request.fail(EngineError(f"{reason}: its log says why"))

    def _with_end(self, request: Request, event: Tokens) -> list[int]:
        """The tokens, and the end token that ended them where it is not among them."""
        ids, ends = event.token_ids, request.end_token_ids
        if event.finish_reason != "stop" or not ends or (ids and ids[-1] in ends):
            return ids
        reason = event.stop_reason
        return [*ids, reason if isinstance(reason, int) else self._end_id(request)]

    def _commit(self, request: Request, token_ids: list[int]) -> None:
        is_first = not request.output_token_ids
        num_emitted = request.commit(token_ids)
        self._metrics.record_tokens(num_emitted, request.seconds_since_tokens(), is_first=is_first)
        if is_first or not self._counts_rounds:
            return
        num_draft = self._parts.speculative_config.num_speculative_tokens
        num_accepted = min(num_emitted, len(token_ids) - 1)
        by_source = {DRAFT_SOURCE: num_draft}, {DRAFT_SOURCE: num_accepted}
        counts = RoundCounts(num_draft, num_accepted, 0, *by_source)
        request.metrics.record_round(counts)
        self._metrics.record_round(counts, request.policy.name)

    def _remove(self, request: Request) -> None:
        with self._lock:
            if request in self._running:
                del self._running[request]
                self._metrics.record_prompt(len(request.prompt_token_ids), request.num_prefix_hits)
            else:
                self._waiting.remove(request)
        self._metrics.record_end(request.finish_reason or "abort", request.metrics.latency or 0.0)

    def _take_changed(self) -> list[Request]:
        changed = list(self._changed)
        self._changed.clear()
        return changed

    def _set_load(self) -> None:
        self._metrics.set_load(len(self._running), len(self._waiting), 0.0)

    def _end_id(self, request: Request) -> int:
        """The one that TensorRT-LLM takes as the end of a sequence; others are its stop tokens."""
        own = (token for token in self._parts.manifest.head.stop_token_ids if token in request.end_token_ids)
        return next(own, min(request.end_token_ids, default=0))

    def _sampling_params(self, request: Request) -> Any:
        params, end_id = request.params, self._end_id(request)
        others = sorted(request.end_token_ids - {end_id})
        sampling: dict[str, Any] = {}
        if params.temperature > 0:
            sampling["temperature"] = params.temperature
            sampling |= {"top_k": params.top_k} if params.top_k > 0 else {}
            sampling |= {"top_p": params.top_p} if params.top_p < 1 else {}
        return self._library.sampling_params(
            max_tokens=request.max_tokens,
            end_id=end_id,
            stop_token_ids=others or None,
            include_stop_str_in_output=True,
            ignore_eos=not request.end_token_ids,
            detokenize=False,
            **sampling,
        )


class _Library(NamedTuple):
    """What is used of an imported tensorrt_llm. refusals: errors that are one request's."""

    release: Release
    llm: Any
    merge: Any
    sampling_params: Any
    refusals: tuple[type[Exception], ...]

    def load(self, arguments: Mapping[str, Any]) -> Any:
        """Its LLM. Plain values become its settings as trtllm-serve has it."""
        return self.llm(**self.merge({}, dict(arguments), None))


def _import_library(parts: ExecutorParts) -> _Library:
    """Each name from the module that defines it."""
    try:
        version, llm, llm_args, sampling_params, utils = (
            importlib.import_module(f"tensorrt_llm.{module}")
            for module in ("version", "llmapi.llm", "llmapi.llm_args", "sampling_params", "executor.utils")
        )
        return _Library(
            release_of(version.__version__),
            llm.LLM,
            llm_args.update_llm_args_with_extra_dict,
            sampling_params.SamplingParams,
            (utils.RequestError, ValueError, TypeError),
        )
    except ConfigError as error:
        raise EngineError(f"{parts.directory}: {error}") from None
    except (ImportError, AttributeError, OSError) as error:
        raise EngineError(f"{parts.directory}: tensorrt_llm cannot be used: {one_line(error)}") from error


def _check_hook(parts: ExecutorParts) -> None:
    """Without it workers would accept exactly, and say nothing."""
    starts = f"import sys; sys.exit({HOOK!r} not in sys.modules)"
    if subprocess.run([sys.executable, "-c", starts], stdin=subprocess.DEVNULL, check=False).returncode:
        raise EngineError(
            f"{parts.directory}: {sys.executable} starts processes without FLy in them: {sys.executable} -m pip "
            "install --no-deps fly-trt"
        )


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Has processes that start now find these variables, and puts back what was there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
