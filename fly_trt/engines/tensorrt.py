"""TensorRT and TensorRT-RTX on a GPU behind the engine contract.

The KV caches of all slots are allocated once and updated in place; a step reads them from its first slot on. What a
step needs from the host travels in one copy from pinned memory and what it says in one copy back; the logits stay on
the device unless asked for. From its second run on, a step of one shape is one CUDA graph: both copies and the engine.
All work is put on one stream, in order, and the host waits for nothing but the outputs of a step.

An engine belongs to one GPU. TensorRT wants that GPU to be the current one of the thread that deserialises the engine,
makes contexts or runs them, and CUDA wherever memory, streams or work are made; threads come with device 0. So whatever
does any of this begins by choosing the device, since an engine is loaded in one thread and run in another.

Lengths are padded to a few sizes, so that few graphs serve all steps: padding writes behind the sequence, where the
next step overwrites it, and no output that is read depends on it.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fly_trt.engines import cuda
from fly_trt.engines.base import EngineInfo, LoadSettings, LogitsBuffer, Step, StepCache, StepShape
from fly_trt.engines.blocks import ALIGNMENT, INPUTS, PER_ROW, Block, StepBlocks, round_up, shape_of, tensors_of
from fly_trt.engines.kernel_cache import KernelCache
from fly_trt.engines.nccl import Communicator
from fly_trt.engines.tensorrt_library import cache_folder, check_compatibility, import_library
from fly_trt.errors import EngineError
from fly_trt.manifest import Dtype, Manifest, ModelEngine
from fly_trt.tokens import FloatArray

logger = logging.getLogger(__name__)

MAX_BOUND_SHAPES = 64
MAX_STEPS = 256
ROW_TOKENS = (1, 2, 4, 8)  # padded lengths of steps that verify; from there on multiples of the last
PREFILL_TOKENS_MULTIPLE = 64
DECODE, VERIFICATION, PREFILL = range(3)  # optimisation profiles, in the order in which fly_build adds them

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


def load(
    directory: Path, manifest: Manifest, model: ModelEngine, info: EngineInfo, settings: LoadSettings
) -> "TensorRTEngine":
    """The engine of one model of a directory (base.LoadEngine). It has no CPU threads to size."""
    plugins = model.tensorrt.plugin_library if model.tensorrt else None
    name = (model.model, *model.other_ranks)[settings.rank]
    return TensorRTEngine(
        directory / name,
        model,
        info,
        num_slots=settings.num_slots,
        plugin_library=directory / plugins if plugins else None,
        kernel_cache=cache_folder() / f"{manifest.files[name].sha256[:16]}.kernels",
        device_id=settings.device_id,
    )


@dataclass
class _Bound:
    """One padded shape at one first slot: its buffers, its execution context, and its graph once it ran."""

    blocks: StepBlocks
    context: Any
    graph: cuda.Graph | None = None
    is_capturable: bool = True


class TensorRTEngine:
    """One compiled decoder with its slots.

    `kernel_cache` is the file in which TensorRT-RTX's kernels are kept between processes. `device_id` is the GPU, None
    the current one of the thread that loads; it is left as the current one of every thread that uses the engine. Raises
    EngineError when the plan was built for another library version or GPU, or when memory does not suffice, and
    ConfigError for a device that does not exist.
    """

    def __init__(
        self,
        plan_path: Path,
        model: ModelEngine,
        info: EngineInfo,
        *,
        num_slots: int,
        plugin_library: Path | None = None,
        kernel_cache: Path | None = None,
        device_id: int | None = None,
    ) -> None:
        if model.tensorrt is None:
            raise EngineError(f"{plan_path}: the manifest has no TensorRT record: rebuild the engine with fly-build")
        self.info = info
        self.num_preparations = 0
        self._model = model
        self._plan = model.tensorrt
        self._library = library = import_library(self._plan.library)
        self._device = cuda.choose_device(device_id)
        check_compatibility(plan_path, self._plan, library, cuda.compute_capability())
        if plugin_library is not None:
            library.load_plugins(plugin_library)
        self._stream = cuda.Stream()
        self._runtime = library.trt.Runtime(library.log)
        self._engine = self._runtime.deserialize_cuda_engine(np.memmap(plan_path, np.uint8, "r"))
        if self._engine is None:
            raise EngineError(f"{plan_path}: {library.name} {library.version} cannot load it: {library.take_errors()}")
        self._kernels: KernelCache | None = None
        self._context_settings: Any = library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if library.name == "tensorrt_rtx":
            self._kernels = KernelCache(library.trt, self._engine, kernel_cache)
            self._context_settings = self._kernels.config
        self._scratch = cuda.DeviceBuffer(int(self._engine.device_memory_size_v2))
        item_bytes = ITEM_BYTES[model.kv_cache_dtype]
        self._token_bytes = model.head_dim * item_bytes
        self._slot_bytes = model.rank_kv_heads * self._plan.cache_tokens * self._token_bytes
        self._caches = [cuda.DeviceBuffer(num_slots * self._slot_bytes) for _ in range(2 * model.num_layers)]
        for cache in self._caches:
            self._stream.clear(cache.address, cache.num_bytes)  # a masked key counts nothing only while it is a number
        self._swapped = cuda.DeviceBuffer(self._slot_bytes)
        longest = max(num_slots * self._plan.max_row_tokens, round_up(info.max_num_tokens, PREFILL_TOKENS_MULTIPLE))
        self._logits = cuda.DeviceBuffer(longest * model.vocab_size * item_bytes)
        self._host_logits = LogitsBuffer(model.vocab_size)
        self._raw_logits = cuda.PinnedBuffer(ALIGNMENT)  # what is copied before it is widened
        self._blocks: dict[tuple[int, int], StepBlocks] = {}
        self._bound: OrderedDict[tuple[int, int, int], _Bound] = OrderedDict()
        self._prefill_context: Any = None
        self._prefill_lengths: set[int] = set()
        self._steps = StepCache(info, num_slots, MAX_STEPS)
        self._communicator: Communicator | None = None
        self._agree: Callable[[bool], bool] = lambda is_captured: is_captured

    def use_device(self) -> None:
        """Makes the engine's GPU the calling thread's current one."""
        cuda.use_device(self._device)

    def join(self, communicator: Communicator, agree: Callable[[bool], bool]) -> None:
        """What this rank sums with the others through, from the first step on; it must outlive the engine. `agree` says
        of something that this rank could do, or could not, whether all ranks could."""
        self._communicator, self._agree = communicator, agree

    def step(
        self, first_slot: int, batch_size: int, num_tokens: int, *, with_logits: bool = False, with_top: bool = False
    ) -> Step:
        return self._steps.get(StepShape(first_slot, batch_size, num_tokens, with_logits, with_top), self._make_step)

    def run(self, step: Step) -> None:
        cuda.use_device(self._device)
        if self._fits(*step.input_ids.shape):
            self._execute(step, step.logits)
        else:
            self._run_rows(step)

    def _execute(self, step: Step, logits: FloatArray | None) -> None:
        """Runs a step that fits the profiles; `logits` float32 [B, T, V] takes what it finds."""
        batch_size, num_tokens = step.input_ids.shape
        padded = self._padded(num_tokens)
        if (last := int(step.write_indices.max())) + padded > self._plan.cache_tokens:
            raise EngineError(
                f"{last} tokens cached and a step of {padded}: a slot has room for {self._plan.cache_tokens}: rebuild "
                "the engine with fly-build"
            )
        with self._communicator.in_use() if self._communicator else contextlib.nullcontext():
            bound = self._bind(step.first_slot, batch_size, padded)
            if bound.graph is not None:
                bound.graph.launch()
            else:
                self._enqueue(bound)
                if bound.is_capturable:
                    self._capture(bound)
        if step.top_ids is not None and bound.blocks.top is not None:
            self._read(bound.blocks.top)
        if logits is None:
            self._stream.synchronize()
        else:
            self._read_logits(logits)

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        cuda.use_device(self._device)
        for cache in self._caches:
            self._copy_tokens(self._slot(cache, target), self._slot(cache, source), num_tokens)

    def swap_slots(self, first: int, second: int, num_tokens: int) -> None:
        cuda.use_device(self._device)
        for cache in self._caches:
            one, other = self._slot(cache, first), self._slot(cache, second)
            self._copy_tokens(self._swapped.address, one, num_tokens)
            self._copy_tokens(one, other, num_tokens)
            self._copy_tokens(other, self._swapped.address, num_tokens)

    def clear_slot(self, slot: int, start: int) -> None:
        cuda.use_device(self._device)
        pitch, skipped = self._plan.cache_tokens * self._token_bytes, start * self._token_bytes
        for cache in self._caches:
            for head in range(self._model.rank_kv_heads):
                self._stream.clear(self._slot(cache, slot) + head * pitch + skipped, pitch - skipped)

    def trim(self, num_tokens: int) -> int:
        """The caches keep their size: the cost of a step does not follow it."""
        return self._plan.cache_tokens

    def close(self) -> None:
        with contextlib.suppress(EngineError):  # of a GPU that failed: what is held is released all the same
            cuda.use_device(self._device)
            self._stream.synchronize()
            if self._kernels is not None and self.num_preparations:
                self._kernels.save()
        self._steps.clear()
        self._host_logits.clear()
        self._bound.clear()
        self._prefill_context = None
        self._blocks.clear()
        self._caches.clear()
        del (
            self._kernels,
            self._context_settings,
            self._engine,
            self._runtime,
            self._scratch,
            self._logits,
            self._raw_logits,
            self._swapped,
        )

    def _fits(self, batch_size: int, num_tokens: int) -> bool:
        """Whether one step can have this shape; the profiles let only a single row be long."""
        return batch_size == 1 or num_tokens <= self._plan.max_row_tokens

    def _padded(self, num_tokens: int) -> int:
        if num_tokens > self._plan.max_row_tokens:
            longest = max(self.info.max_num_tokens, self._plan.max_row_tokens)
            return max(num_tokens, min(round_up(num_tokens, PREFILL_TOKENS_MULTIPLE), longest))
        return next((size for size in ROW_TOKENS if size >= num_tokens), round_up(num_tokens, ROW_TOKENS[-1]))

    def _make_step(self, shape: StepShape) -> Step:
        cuda.use_device(self._device)
        batch_size, num_tokens = shape.batch_size, shape.num_tokens
        tensors = tensors_of(shape.with_top)
        if self._fits(batch_size, num_tokens):
            arrays = self._blocks_of(batch_size, self._padded(num_tokens)).arrays()
        else:
            sizes = batch_size, num_tokens, self.info.entropy_top_k
            arrays = {name: np.zeros(shape_of(name, sizes), dtype) for name, dtype in tensors.items()}
        views = {name: arrays[name] if name in PER_ROW else arrays[name][:, :num_tokens] for name in tensors}
        logits = None
        if shape.with_logits:
            logits, has_grown = self._host_logits.view(batch_size, num_tokens)
            if has_grown:
                self._steps.drop_with_logits()
        return Step(first_slot=shape.first_slot, logits=logits, **views)

    def _blocks_of(self, batch_size: int, num_tokens: int) -> StepBlocks:
        """The blocks of one padded shape, which all its slots and lengths share."""
        blocks = self._blocks.get((batch_size, num_tokens))
        if blocks is None:
            blocks = StepBlocks.make(self.info, batch_size, num_tokens)
            self._blocks[batch_size, num_tokens] = blocks
        return blocks

    def _bind(self, first_slot: int, batch_size: int, num_tokens: int) -> _Bound:
        if num_tokens > self._plan.max_row_tokens:
            return self._bind_prefill(first_slot, num_tokens)
        key = (first_slot, batch_size, num_tokens)
        bound = self._bound.get(key)
        if bound is None:
            # Each graph has a context of its own, since a context must not change under a graph that was captured from
            # it; all of them share the scratch memory, for only one runs at a time.
            context = self._make_context(DECODE if num_tokens == 1 else VERIFICATION)
            bound = self._bound[key] = _Bound(self._blocks_of(batch_size, num_tokens), context)
            self._set_tensors(bound, first_slot, batch_size)
            if len(self._bound) > MAX_BOUND_SHAPES:
                self._bound.popitem(last=False)
        else:
            self._bound.move_to_end(key)
        return bound

    def _bind_prefill(self, first_slot: int, num_tokens: int) -> _Bound:
        """One row of a prompt: every such step has the same context, and no graph, for lengths and slots vary."""
        if self._prefill_context is None:
            self._prefill_context = self._make_context(PREFILL)
        if num_tokens not in self._prefill_lengths:
            self._prefill_lengths.add(num_tokens)
            self.num_preparations += 1  # TensorRT-RTX compiles kernels for it
        bound = _Bound(self._blocks_of(1, num_tokens), self._prefill_context, is_capturable=False)
        self._set_tensors(bound, first_slot, 1)
        return bound

    def _make_context(self, profile: int) -> Any:
        context = self._engine.create_execution_context(self._context_settings)
        if context is None:
            raise EngineError(f"{self._library.name}: no execution context: {self._library.take_errors()}")
        if self._communicator is not None:  # waits for the other ranks, which make the same contexts
            self._require(context.set_communicator(self._communicator.capsule), "communicator")
        context.set_device_memory(self._scratch.address, self._scratch.num_bytes)
        if not context.set_optimization_profile_async(profile, self._stream.handle):
            raise EngineError(f"{self._library.name}: profile {profile}: {self._library.take_errors()}")
        return context

    def _set_tensors(self, bound: _Bound, first_slot: int, batch_size: int) -> None:
        model, context = self._model, bound.context
        for name, array in bound.blocks.inputs.arrays.items():
            self._require(context.set_input_shape(name, array.shape), name)
        for block in bound.blocks:
            for name, offset in block.offsets.items():
                self._require(context.set_tensor_address(name, block.device.address + offset), name)
        self._require(context.set_tensor_address("logits", self._logits.address), "logits")
        cache_shape = (batch_size, model.rank_kv_heads, self._plan.cache_tokens, model.head_dim)
        for index, cache in enumerate(self._caches):
            name = f"{('key', 'value')[index % 2]}.{index // 2}"
            address = self._slot(cache, first_slot)
            self._require(context.set_input_shape(f"past_{name}", cache_shape), name)
            self._require(context.set_tensor_address(f"past_{name}", address), name)
            self._require(context.set_tensor_address(f"present_{name}", address), name)

    def _require(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise EngineError(f"{self._library.name}: {what}: {self._library.take_errors()}")

    def _enqueue(self, bound: _Bound) -> None:
        inputs = bound.blocks.inputs
        self._stream.copy(inputs.device.address, inputs.host.address, inputs.num_bytes)
        self._require(bound.context.execute_async_v3(self._stream.handle), "execution")
        self._read(bound.blocks.outputs)

    def _read(self, block: Block) -> None:
        self._stream.copy(block.host.address, block.device.address, block.num_bytes)

    def _capture(self, bound: _Bound) -> None:
        """The first run made the engine ready for this shape; what it did is recorded for the next ones. NCCL wants its
        sums to be in the graphs of all ranks or of none."""
        self.num_preparations += 1
        reason, graph = "another rank could not record it", None
        try:
            graph = self._stream.capture(lambda: self._enqueue(bound))
        except EngineError as error:
            reason = str(error)
        if self._agree(graph is not None):
            bound.graph = graph
            return
        bound.is_capturable = False
        shape = bound.blocks.inputs.arrays["input_ids"].shape
        logger.warning("steps of %s run without a CUDA graph: %s", shape, reason)

    def _run_rows(self, step: Step) -> None:
        """One row at a time, for steps with long rows."""
        with_top = step.top_ids is not None
        outputs = tensors_of(with_top).keys() - INPUTS
        for row in range(len(step.input_ids)):
            part = self.step(step.first_slot + row, 1, step.input_ids.shape[1], with_top=with_top)
            for name in INPUTS:
                getattr(part, name)[0] = getattr(step, name)[row]
            self._execute(part, None if step.logits is None else step.logits[row : row + 1])
            for name in outputs:
                getattr(step, name)[row] = getattr(part, name)[0]

    def _read_logits(self, logits: FloatArray) -> None:
        """Copies the last run's rows of logits and widens them to float32 [B, T, V]."""
        batch_size, num_tokens, vocab_size = logits.shape
        item_bytes = ITEM_BYTES[self._model.kv_cache_dtype]
        num_bytes = logits.size * item_bytes
        if num_bytes > len(self._raw_logits.array):
            self._raw_logits = cuda.PinnedBuffer(num_bytes)
        row_bytes = num_tokens * vocab_size * item_bytes
        pitch = self._padded(num_tokens) * vocab_size * item_bytes
        source = self._logits.address, pitch
        self._stream.copy_rows((self._raw_logits.address, row_bytes), source, row_bytes, batch_size)
        self._stream.synchronize()
        _widen(self._raw_logits.array[:num_bytes], self._model.kv_cache_dtype, logits)

    def _slot(self, cache: cuda.DeviceBuffer, slot: int) -> int:
        return cache.address + slot * self._slot_bytes

    def _copy_tokens(self, target: int, source: int, num_tokens: int) -> None:
        """The first tokens of a slot of one cache tensor [Hkv, S, D]."""
        if num_tokens:
            pitch = self._plan.cache_tokens * self._token_bytes
            num_bytes = num_tokens * self._token_bytes
            self._stream.copy_rows((target, pitch), (source, pitch), num_bytes, self._model.rank_kv_heads)


def _widen(raw: cuda.Bytes, dtype: Dtype, target: npt.NDArray[np.float32]) -> None:
    """Raw logits of any dtype as float32; a bfloat16 is the upper half of one."""
    if dtype == "bfloat16":
        np.left_shift(raw.view(np.uint16).reshape(target.shape), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        stored = np.float32 if dtype == "float32" else np.float16
        np.copyto(target, raw.view(stored).reshape(target.shape))
