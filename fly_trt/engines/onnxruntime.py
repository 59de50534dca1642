"""ONNX Runtime on the CPU behind the engine contract: the default that runs anywhere.

The KV caches are NumPy arrays of all slots; a step binds a view of its slots as both past and present, so that new
tokens are written in place. The cost of ONNX Attention follows the allocated length, so caches start small, grow in
blocks, and shrink when the long sequences are gone. A graph with CacheAttention (plugins/cpu) has its keys in blocks of
16 tokens, transposed; its cost does not follow the length, and what shrinking saves is memory.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fly_trt.engines.base import (
    KEY_BLOCK_TOKENS,
    POSITION_INPUTS,
    POSITIONS_INPUT,
    ROW_INPUTS,
    TOKEN_OUTPUTS,
    TOP_OUTPUTS,
    EngineInfo,
    LoadSettings,
    LogitsBuffer,
    Step,
    StepCache,
    StepShape,
    check_slots,
)
from fly_trt.engines.cores import Cores, choose_cores
from fly_trt.engines.rollouts import NUM_STEPS, ROLLOUT_OUTPUTS, Rollout
from fly_trt.errors import ConfigError, EngineError, one_line
from fly_trt.manifest import Manifest, ModelEngine
from fly_trt.tokens import IntArray

logger = logging.getLogger(__name__)

CACHE_BLOCK_TOKENS = 128
MAX_CACHE_BLOCKS = 16  # longer caches grow in larger blocks, so that growing stays rare
SHRINK_FACTOR = 4
MAX_BOUND_SHAPES = 256
PROVIDERS = ["CPUExecutionProvider"]
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
            logger.warning(
                "num_threads %d ignored: this process already runs %d: give it to the first engine that it loads",
                num_threads,
                cls.cores.count,
            )
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


def held_cores() -> contextlib.AbstractContextManager[None]:
    """Keeps the calling thread on the pool's cores, where it has some: it computes with the pool's threads."""
    return contextlib.nullcontext() if _ThreadPool.cores is None else _ThreadPool.cores.held()


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
        rollout_path=directory / model.rollout if model.rollout else None,
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
        rollout_path: Path | None = None,
    ) -> None:
        self.info = info
        self.has_rollouts = rollout_path is not None
        self.num_preparations = 0
        self._model = model
        self._num_slots = num_slots
        self._capacity = 0
        self._num_held = [0] * num_slots  # tokens of each slot that a resize keeps
        self._generation = 0  # of the cache arrays: a step bound to older ones is bound again
        self._caches: list[np.ndarray] = []
        self._steps = StepCache(info, num_slots, MAX_BOUND_SHAPES)
        self._rollouts: OrderedDict[tuple[int, int, int], Rollout] = OrderedDict()
        self._rollout_session: ort.InferenceSession | None = None
        self._logits = LogitsBuffer(info.vocab_size)
        path = model_path
        try:
            options = session_options(num_threads)
            if cpu_kernels is not None:
                _register_kernels(options, cpu_kernels)
            with held_cores():
                self._session = ort.InferenceSession(str(path), options, providers=PROVIDERS)
                if rollout_path is not None:
                    path = rollout_path
                    self._rollout_session = ort.InferenceSession(str(path), options, providers=PROVIDERS)
        except EngineError:
            raise
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            reason = one_line(error)
            raise EngineError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {reason}") from None
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._has_key_blocks = len(inputs["past_key.0"].shape) == 5

    def step(
        self,
        first_slot: int,
        batch_size: int,
        num_tokens: int,
        *,
        num_positions: int | None = None,
        with_logits: bool = False,
        with_top: bool = False,
    ) -> Step:
        shape = StepShape.of(self.info, first_slot, batch_size, num_tokens, num_positions, with_logits, with_top)
        return self._steps.get(shape, self._make_step)

    def run(self, step: Step) -> None:
        self._make_room(step.first_slot, step.write_indices, step.input_ids.shape[1])
        if step.binding is None or step.binding[0] != self._generation:
            self.num_preparations += 1
            step.binding = (self._generation, self._bind(step))
        self._session.run_with_iobinding(step.binding[1])

    def rollout(self, first_slot: int, batch_size: int, num_steps: int) -> Rollout:
        shape = first_slot, batch_size, num_steps
        if (rollout := self._rollouts.get(shape)) is not None:
            self._rollouts.move_to_end(shape)
            return rollout
        check_slots(first_slot, batch_size, self._num_slots)
        rollout = self._rollouts[shape] = Rollout.make(*shape)
        if len(self._rollouts) > MAX_BOUND_SHAPES:
            self._rollouts.popitem(last=False)
        return rollout

    def run_rollout(self, rollout: Rollout) -> None:
        assert self._rollout_session is not None, "the engine has rollouts"
        self._make_room(rollout.first_slot, rollout.write_indices, rollout.num_steps)
        if rollout.binding is None or rollout.binding[0] != self._generation:
            self.num_preparations += 1
            rollout.binding = (self._generation, *self._bind_rollout(self._rollout_session, rollout))
        self._rollout_session.run_with_iobinding(rollout.binding[1])

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        self._num_held[target] = num_tokens
        for cache in self._caches:
            _tokens(cache, target, num_tokens)[:] = _tokens(cache, source, num_tokens)

    def swap_slots(self, first: int, second: int, num_tokens: int) -> None:
        self._num_held[first] = self._num_held[second] = num_tokens
        for cache in self._caches:
            ours, theirs = _tokens(cache, first, num_tokens), _tokens(cache, second, num_tokens)
            held = ours.copy()
            ours[:] = theirs
            theirs[:] = held

    def clear_slot(self, slot: int, start: int) -> None:
        self._num_held[slot] = min(self._num_held[slot], start)
        for cache in self._caches:
            if cache.ndim == 5:
                block, first = divmod(start, KEY_BLOCK_TOKENS)
                cache[slot, :, block : block + 1, :, first:] = 0
                cache[slot, :, block + 1 :] = 0
            else:
                cache[slot, :, start:] = 0

    def trim(self, num_tokens: int) -> int:
        if self._capacity > SHRINK_FACTOR * _whole_blocks(num_tokens):
            self._resize(num_tokens)
        return self._capacity

    @property
    def capacity(self) -> int:
        """Tokens that each slot has room for now; the cost of a step follows it, but with CacheAttention."""
        return self._capacity

    def close(self) -> None:
        self._steps.clear()
        self._rollouts.clear()
        self._logits.clear()
        self._caches.clear()
        del self._session, self._rollout_session

    def _make_step(self, shape: StepShape) -> Step:
        batch_size, num_positions = shape.batch_size, shape.num_positions
        rows: dict[str, Any] = {name: np.zeros(batch_size, dtype) for name, dtype in ROW_INPUTS.items()}
        of_positions = TOKEN_OUTPUTS | (POSITION_INPUTS if self.info.has_positions else {})
        positions: dict[str, Any] = {
            name: np.zeros((batch_size, num_positions), dtype) for name, dtype in of_positions.items()
        }
        top: dict[str, Any] = {}
        if shape.with_top:
            ranks = (batch_size, num_positions, self.info.entropy_top_k)
            top = {name: np.zeros(ranks, dtype) for name, dtype in TOP_OUTPUTS.items()}
        logits = None
        if shape.with_logits:
            logits, has_grown = self._logits.view(batch_size, num_positions)
            if has_grown:
                self._steps.drop_with_logits()
        return Step(
            first_slot=shape.first_slot,
            input_ids=np.zeros((batch_size, shape.num_tokens), np.int64),
            num_accepted=np.zeros(batch_size, np.int64),
            next_token=np.zeros(batch_size, np.int64),
            logits=logits,
            **rows,
            **positions,
            **top,
        )

    def _bind(self, step: Step) -> ort.IOBinding:
        binding = self._session.io_binding()
        of_positions = POSITION_INPUTS if self.info.has_positions else ()
        for name in ("input_ids", *of_positions, *ROW_INPUTS):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(getattr(step, name)))
        outputs = ["num_accepted", "next_token", *TOKEN_OUTPUTS]
        if step.top_ids is not None:
            outputs += TOP_OUTPUTS
        for name in outputs:
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(getattr(step, name)))
        if step.logits is not None:
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(step.logits))
        for name, value in self._cache_values(step.first_slot, len(step.input_ids)):
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        return binding

    def _bind_rollout(
        self, session: ort.InferenceSession, rollout: Rollout
    ) -> tuple[ort.IOBinding, dict[str, np.ndarray]]:
        """Beside a rollout's buffers there are how many steps, and for all of them that each row speaks of its only
        token: arrays that have to live as long as the binding."""
        batch_size = len(rollout.input_ids)
        inputs = {
            "input_ids": rollout.input_ids,
            "write_indices": rollout.write_indices,
            NUM_STEPS: np.array(rollout.num_steps, np.int64),
            POSITIONS_INPUT: np.arange(batch_size)[:, None],
            "next_tokens": np.zeros((batch_size, 1), np.int64),
            "use_full_entropy": np.ones(batch_size, np.bool_),
        }
        binding = session.io_binding()
        for value in session.get_inputs():
            if value.name in inputs:
                binding.bind_ortvalue_input(value.name, ort.OrtValue.ortvalue_from_numpy(inputs[value.name]))
        for name in ROLLOUT_OUTPUTS:
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(getattr(rollout, name)))
        for name, cache in self._cache_values(rollout.first_slot, batch_size):
            binding.bind_ortvalue_input(f"past_{name}", cache)
        return binding, inputs

    def _cache_values(self, first_slot: int, batch_size: int) -> Iterator[tuple[str, ort.OrtValue]]:
        for index, cache in enumerate(self._caches):
            name = f"{('key', 'value')[index % 2]}.{index // 2}"
            yield name, ort.OrtValue.ortvalue_from_numpy(cache[first_slot : first_slot + batch_size])

    def _make_room(self, first_slot: int, write_indices: IntArray, num_tokens: int) -> None:
        """For so many tokens from these positions of the slots on, which are then held."""
        ends = [cached + num_tokens for cached in write_indices.tolist()]
        if (needed := max(ends)) > self._capacity:
            self._resize(needed)
        self._num_held[first_slot : first_slot + len(ends)] = ends

    def _resize(self, num_tokens: int) -> None:
        """Gives every slot room for `num_tokens`, in whole blocks. Memory of slots that were never used stays
        untouched, so that the system need not provide it. Where there is not enough, the slots hold nothing."""
        model = self._model
        capacity = _whole_blocks(num_tokens)
        self._generation += 1
        self._num_held = [min(held, capacity) for held in self._num_held]
        values = (self._num_slots, model.num_kv_heads, capacity, model.head_dim)
        keys: tuple[int, ...] = values
        if self._has_key_blocks:
            keys = (*values[:2], capacity // KEY_BLOCK_TOKENS, model.head_dim, KEY_BLOCK_TOKENS)
        try:
            for index in range(2 * model.num_layers):
                resized = np.zeros((keys, values)[index % 2], CACHE_DTYPES[model.kv_cache_dtype])
                for slot, held in enumerate(self._num_held):
                    if held:
                        _tokens(resized, slot, held)[:] = _tokens(self._caches[index], slot, held)
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


def _tokens(cache: np.ndarray, slot: int, num_tokens: int) -> np.ndarray:
    """A slot's first tokens: a view, with the rest of the last block where keys lie in blocks."""
    return cache[slot, :, : -(-num_tokens // KEY_BLOCK_TOKENS) if cache.ndim == 5 else num_tokens]


def _whole_blocks(num_tokens: int) -> int:
    """What is allocated for `num_tokens`: up to 128 tokens more than needed, or an eighth more."""
    block = CACHE_BLOCK_TOKENS
    while num_tokens > MAX_CACHE_BLOCKS * block:
        block *= 2
    return -(-num_tokens // block) * block
