"""ONNX Runtime on the CPU behind the engine contract: the default that runs anywhere.

The KV caches are NumPy arrays of all slots; a step binds a view of its slots as both past and present, so
TensorScatter writes in place. The cost of ONNX Attention follows the allocated length, so caches start small, grow in
blocks, and shrink when the long sequences are gone.
"""

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fly_trt.engines.base import (
    ROW_INPUTS,
    TOKEN_OUTPUTS,
    TOP_OUTPUTS,
    EngineInfo,
    LoadSettings,
    LogitsBuffer,
    Step,
    StepCache,
    StepShape,
)
from fly_trt.engines.cores import Cores, choose_cores
from fly_trt.errors import ConfigError, EngineError, one_line
from fly_trt.manifest import Manifest, ModelEngine

logger = logging.getLogger(__name__)

CACHE_BLOCK_TOKENS = 128
MAX_CACHE_BLOCKS = 16  # longer caches grow in larger blocks, so that growing stays rare
SHRINK_FACTOR = 4
MAX_BOUND_SHAPES = 256
CACHE_DTYPES = {"float32": np.float32, "float16": np.float16}


class _ThreadPool:
    """One pool for every session of the process: with a pool each, the idle session's spinning workers take the cores
    from the one that runs (measured: 123 to 169 tokens/s instead of 309). Its threads stay on the cores that were
    chosen; those that somebody asks for run wherever the process may."""

    cores: Cores | None = None

    @classmethod
    def size(cls, num_threads: int | None) -> Cores:
        if cls.cores is None:
            cls.cores = Cores(num_threads, None, "as asked") if num_threads else choose_cores()
            with cls.cores.held():
                ort.set_global_thread_pool_sizes(cls.cores.count, 1)
            logger.info("%s", describe_threads())
        elif num_threads and num_threads != cls.cores.count:
            logger.warning("num_threads %d ignored: this process already runs %d", num_threads, cls.cores.count)
        return cls.cores


def session_options(num_threads: int | None = None) -> ort.SessionOptions:
    """Options for a session on the thread pool that all sessions of the process share.

    From the first call on, ONNX Runtime refuses sessions of this process that want threads of their own: give them
    SessionOptions.use_per_session_threads = False.
    """
    _ThreadPool.size(num_threads)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    return options


def num_pool_threads() -> int | None:
    """Threads of the pool that all sessions share; None before the first session."""
    return None if _ThreadPool.cores is None else _ThreadPool.cores.count


def describe_threads() -> str | None:
    """The same in words, such as "2 threads (4 physical cores, quota 2)"."""
    if (cores := _ThreadPool.cores) is None:
        return None
    return f"{cores.count} thread{'s' * (cores.count > 1)} ({cores.reason})"


def load(
    directory: Path, manifest: Manifest, model: ModelEngine, info: EngineInfo, settings: LoadSettings
) -> "OnnxRuntimeEngine":
    """The engine of one model of a directory (base.LoadEngine). Raises ConfigError for a device."""
    if settings.device_id is not None:
        raise ConfigError(
            f"device_id {settings.device_id}: has no effect, {directory} was built for {manifest.backend}, which runs "
            "on the CPU: leave it out, or rebuild with --device cuda"
        )
    return OnnxRuntimeEngine(
        directory / model.model,
        model,
        info,
        num_slots=settings.num_slots,
        num_threads=settings.num_threads,
        cpu_kernels=directory / model.cpu_kernels if model.cpu_kernels else None,
    )


class OnnxRuntimeEngine:
    """One decoder graph with its slots. Raises EngineError when the model file does not load."""

    def __init__(
        self,
        model_path: Path,
        model: ModelEngine,
        info: EngineInfo,
        *,
        num_slots: int,
        num_threads: int | None = None,
        cpu_kernels: Path | None = None,
    ) -> None:
        self.info = info
        self.num_preparations = 0
        self._model = model
        self._num_slots = num_slots
        self._capacity = 0
        self._thread: int | None = None  # that runs steps: it computes with those of the pool
        self._num_held = [0] * num_slots  # tokens of each slot that a resize keeps
        self._generation = 0  # of the cache arrays: a step bound to older ones is bound again
        self._caches: list[np.ndarray] = []
        self._steps = StepCache(info, num_slots, MAX_BOUND_SHAPES)
        self._logits = LogitsBuffer(info.vocab_size)
        try:
            self._cores = _ThreadPool.size(num_threads)
            options = session_options()
            if cpu_kernels is not None:
                _register_kernels(options, cpu_kernels)
            with self._cores.held():
                self._session = ort.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        except EngineError:
            raise
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            reason = one_line(error)
            raise EngineError(f"{model_path}: ONNX Runtime {ort.__version__} cannot load it: {reason}") from None

    def step(
        self, first_slot: int, batch_size: int, num_tokens: int, *, with_logits: bool = False, with_top: bool = False
    ) -> Step:
        return self._steps.get(StepShape(first_slot, batch_size, num_tokens, with_logits, with_top), self._make_step)

    def run(self, step: Step) -> None:
        batch_size, num_tokens = step.input_ids.shape
        if self._thread != (thread := threading.get_ident()):
            self._cores.hold()
            self._thread = thread
        ends = [cached + num_tokens for cached in step.write_indices.tolist()]
        if (needed := max(ends)) > self._capacity:
            self._resize(needed)
        self._num_held[step.first_slot : step.first_slot + batch_size] = ends
        if step.binding is None or step.binding[0] != self._generation:
            self.num_preparations += 1
            step.binding = (self._generation, self._bind(step))
        self._session.run_with_iobinding(step.binding[1])

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        self._num_held[target] = num_tokens
        for cache in self._caches:
            cache[target, :, :num_tokens] = cache[source, :, :num_tokens]

    def swap_slots(self, first: int, second: int, num_tokens: int) -> None:
        self._num_held[first] = self._num_held[second] = num_tokens
        for cache in self._caches:
            held = cache[first, :, :num_tokens].copy()
            cache[first, :, :num_tokens] = cache[second, :, :num_tokens]
            cache[second, :, :num_tokens] = held

    def clear_slot(self, slot: int, start: int) -> None:
        self._num_held[slot] = min(self._num_held[slot], start)
        for cache in self._caches:
            cache[slot, :, start:] = 0

    def trim(self, num_tokens: int) -> int:
        if self._capacity > SHRINK_FACTOR * _whole_blocks(num_tokens):
            self._resize(num_tokens)
        return self._capacity

    @property
    def capacity(self) -> int:
        """Tokens that each slot has room for now; the cost of a step follows it."""
        return self._capacity

    def close(self) -> None:
        self._steps.clear()
        self._logits.clear()
        self._caches.clear()
        del self._session

    def _make_step(self, shape: StepShape) -> Step:
        batch_size, num_tokens = shape.batch_size, shape.num_tokens
        rows: dict[str, Any] = {name: np.zeros(batch_size, dtype) for name, dtype in ROW_INPUTS.items()}
        tokens: dict[str, Any] = {
            name: np.zeros((batch_size, num_tokens), dtype) for name, dtype in TOKEN_OUTPUTS.items()
        }
        top: dict[str, Any] = {}
        if shape.with_top:
            ranks = (batch_size, num_tokens, self.info.entropy_top_k)
            top = {name: np.zeros(ranks, dtype) for name, dtype in TOP_OUTPUTS.items()}
        logits = None
        if shape.with_logits:
            logits, has_grown = self._logits.view(batch_size, num_tokens)
            if has_grown:
                self._steps.drop_with_logits()
        return Step(
            first_slot=shape.first_slot,
            input_ids=np.zeros((batch_size, num_tokens), np.int64),
            num_accepted=np.zeros(batch_size, np.int64),
            next_token=np.zeros(batch_size, np.int64),
            logits=logits,
            **rows,
            **tokens,
            **top,
        )

    def _bind(self, step: Step) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name in ("input_ids", *ROW_INPUTS):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(getattr(step, name)))
        outputs = ["num_accepted", "next_token", *TOKEN_OUTPUTS]
        if step.top_ids is not None:
            outputs += TOP_OUTPUTS
        for name in outputs:
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(getattr(step, name)))
        if step.logits is not None:
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(step.logits))
        slots = slice(step.first_slot, step.first_slot + len(step.input_ids))
        for index, cache in enumerate(self._caches):
            name = f"{('key', 'value')[index % 2]}.{index // 2}"
            value = ort.OrtValue.ortvalue_from_numpy(cache[slots])
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        return binding

    def _resize(self, num_tokens: int) -> None:
        """Gives every slot room for `num_tokens`, in whole blocks. Memory of slots that were never used stays
        untouched, so that the system need not provide it. Where there is not enough, the slots hold nothing."""
        model = self._model
        capacity = _whole_blocks(num_tokens)
        self._generation += 1
        self._num_held = [min(held, capacity) for held in self._num_held]
        shape = (self._num_slots, model.num_kv_heads, capacity, model.head_dim)
        try:
            for index in range(2 * model.num_layers):
                resized = np.zeros(shape, CACHE_DTYPES[model.kv_cache_dtype])
                for slot, held in enumerate(self._num_held):
                    if held:
                        resized[slot, :, :held] = self._caches[index][slot, :, :held]
                self._caches[index : index + 1] = [resized]
        except BaseException:  # some layers have the new length and others the old one
            self._caches.clear()
            self._capacity, self._num_held = 0, [0] * self._num_slots
            raise
        self._capacity = capacity


def _register_kernels(options: ort.SessionOptions, library: Path) -> None:
    """Raises EngineError where the library of an engine directory does not run here, as on another kind of CPU."""
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        reason = one_line(error).rpartition(" : FAIL : ")[2]
        if reason.startswith("Failed to"):  # the system's words, not the library's, which name a fix
            reason += ": rebuild with fly-build on this machine, or with --cpu-kernels off"
        raise EngineError(f"{library}: {reason}") from None


def _whole_blocks(num_tokens: int) -> int:
    """What is allocated for `num_tokens`: up to 128 tokens more than needed, or an eighth more."""
    block = CACHE_BLOCK_TOKENS
    while num_tokens > MAX_CACHE_BLOCKS * block:
        block *= 2
    return -(-num_tokens // block) * block
