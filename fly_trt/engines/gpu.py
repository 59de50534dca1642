"""What the engines of a GPU have in common: caches and buffers in device memory, one stream, and what is copied when.

The KV caches of all slots are allocated once and updated in place; a step reads them from its first slot on. What a
step needs from the host travels in one copy from pinned memory and what it says in one copy back; the logits stay on
the device unless asked for. All work is put on one stream, in order, and the host waits for nothing but the outputs of
a step.

An engine belongs to one GPU. CUDA wants that GPU to be the current one of the thread wherever memory, streams or work
are made, and so do the libraries that compute; threads come with device 0. So whatever does any of this begins by
choosing the device, since an engine is loaded in one thread and run in another.

Lengths are padded to a few sizes, so that few graphs serve all steps: padding writes behind the sequence, where the
next step overwrites it, and no output that is read depends on it. How a step is computed is the subclass's to know.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fly_trt.engines import cuda
from fly_trt.engines.base import POSITIONS_INPUT, EngineInfo, LogitsBuffer, Step, StepCache, StepShape
from fly_trt.engines.blocks import (
    ALIGNMENT,
    PER_ROW,
    Block,
    Sizes,
    StepBlocks,
    inputs_of,
    outputs_of,
    round_up,
    shape_of,
)
from fly_trt.errors import EngineError
from fly_trt.manifest import Dtype, Limits, ModelEngine
from fly_trt.tokens import FloatArray

MAX_STEPS = 256
ROW_TOKENS = (1, 2, 4, 8)  # padded lengths of steps that verify; from there on multiples of the last
PREFILL_TOKENS_MULTIPLE = 64
CACHE_TOKENS_MULTIPLE = 64
# Rows of a step that verifies have a few context tokens beside the drafts; longer ones run one at a time.
MAX_CONTEXT_TOKENS = 8

WITH_PADDING = PER_ROW | {POSITIONS_INPUT}  # what a step of padded blocks has whole
ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class StepSizes:
    """Rows of a step, tokens of a row in a step of several, tokens of a step of one row, tokens of a slot."""

    max_batch_size: int
    max_row_tokens: int
    max_num_tokens: int
    cache_tokens: int

    @classmethod
    def of(cls, limits: Limits | EngineInfo) -> Self:
        """A step may write as many tokens as it has, padding included, behind the last position of a sequence, and a
        step of the draft behind the drafts that follow it."""
        row = round_up(limits.max_draft_len + MAX_CONTEXT_TOKENS, ROW_TOKENS[-1])
        longest = max(row, limits.max_num_tokens)
        return cls(
            max_batch_size=limits.max_batch_size,
            max_row_tokens=row,
            max_num_tokens=longest,
            cache_tokens=round_up(limits.max_seq_len + limits.max_draft_len + longest, CACHE_TOKENS_MULTIPLE),
        )


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor of a step at its place on the device; `dtype` None is that of caches and logits."""

    name: str
    is_input: bool
    address: int
    shape: tuple[int, ...]
    dtype: type[np.generic] | None = None


class GpuEngine(ABC):
    """One decoder with its slots on a GPU (base.Engine), but for what computes.

    A subclass's constructor calls this one, which chooses the device, loads what computes, and calls `_allocate`, after
    which work waits on the stream. `device_id` is the GPU, None the current one of the thread that loads; it is left as
    the current one of every thread that uses the engine. Raises EngineError when memory does not suffice, and
    ConfigError for a device that does not exist.
    """

    def __init__(
        self, model: ModelEngine, info: EngineInfo, *, max_row_tokens: int, cache_tokens: int, device_id: int | None
    ) -> None:
        self.info = info
        self.num_preparations = 0
        self._model = model
        self._max_row_tokens = max_row_tokens
        self._cache_tokens = cache_tokens
        self._device = cuda.choose_device(device_id)
        self._stream = cuda.Stream()

    @abstractmethod
    def _compute(self, first_slot: int, sizes: Sizes) -> StepBlocks:
        """Puts a step of this padded shape on the stream: its inputs to the device, the decoder, the usual outputs to
        the host. Returns the shape's blocks."""

    @abstractmethod
    def _release(self) -> None:
        """Lets go of all that the subclass holds."""

    def _save(self) -> None:  # noqa: B027
        """Keeps what the next process can use; nothing by default. Called before the end, when all work is done."""

    def _allocate(self, num_slots: int) -> None:
        """All memory whose size does not depend on the steps."""
        model, info = self._model, self.info
        item_bytes = ITEM_BYTES[model.kv_cache_dtype]
        self._token_bytes = model.head_dim * item_bytes
        self._slot_bytes = model.rank_kv_heads * self._cache_tokens * self._token_bytes
        self._caches = [cuda.DeviceBuffer(num_slots * self._slot_bytes) for _ in range(2 * model.num_layers)]
        for cache in self._caches:
            self._stream.clear(cache.address, cache.num_bytes)  # a masked key counts nothing only while it is a number
        self._swapped = cuda.DeviceBuffer(self._slot_bytes)
        self._logits = cuda.DeviceBuffer(self._most_tokens(num_slots) * model.vocab_size * item_bytes)
        self._host_logits = LogitsBuffer(model.vocab_size)
        self._raw_logits = cuda.PinnedBuffer(ALIGNMENT)  # what is copied before it is widened
        self._blocks: dict[Sizes, StepBlocks] = {}
        self._steps = StepCache(info, num_slots, MAX_STEPS)

    def _most_tokens(self, num_slots: int) -> int:
        """Of a step, padding included."""
        longest = round_up(self.info.max_num_tokens, PREFILL_TOKENS_MULTIPLE)
        return max(num_slots * self._max_row_tokens, longest)

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
        cuda.use_device(self._device)
        if self._fits(*step.input_ids.shape):
            self._execute(step, step.logits)
        else:
            self._run_rows(step)

    def _execute(self, step: Step, logits: FloatArray | None) -> None:
        """Runs a step that need not be cut; `logits` float32 [B, L, V] takes what it finds."""
        batch_size, num_tokens = step.input_ids.shape
        sizes = self._padded_sizes(batch_size, num_tokens, step.num_positions)
        if (last := int(step.write_indices.max())) + sizes.num_tokens > self._cache_tokens:
            raise EngineError(
                f"{last} tokens cached and a step of {sizes.num_tokens}: a slot has room for {self._cache_tokens}: "
                "rebuild the engine with fly-build"
            )
        blocks = self._compute(step.first_slot, sizes)
        if step.top_ids is not None and blocks.top is not None:
            self._read(blocks.top)
        if logits is None:
            self._stream.synchronize()
        else:
            self._read_logits(logits, sizes.num_positions)

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
        pitch, skipped = self._cache_tokens * self._token_bytes, start * self._token_bytes
        for cache in self._caches:
            for head in range(self._model.rank_kv_heads):
                self._stream.clear(self._slot(cache, slot) + head * pitch + skipped, pitch - skipped)

    def trim(self, num_tokens: int) -> int:
        """The caches keep their size, which was chosen when the engine was built."""
        return self._cache_tokens

    def close(self) -> None:
        with contextlib.suppress(EngineError):  # of a GPU that failed: what is held is released all the same
            cuda.use_device(self._device)
            self._stream.synchronize()
            self._save()
        self._steps.clear()
        self._host_logits.clear()
        self._release()
        self._blocks.clear()
        self._caches.clear()
        del self._logits, self._raw_logits, self._swapped

    def _fits(self, batch_size: int, num_tokens: int) -> bool:
        """Whether one step can have this shape; only a single row may be long."""
        return batch_size == 1 or num_tokens <= self._max_row_tokens

    def _padded(self, num_tokens: int) -> int:
        if num_tokens > self._max_row_tokens:
            longest = max(self.info.max_num_tokens, self._max_row_tokens)
            return max(num_tokens, min(round_up(num_tokens, PREFILL_TOKENS_MULTIPLE), longest))
        return next((size for size in ROW_TOKENS if size >= num_tokens), round_up(num_tokens, ROW_TOKENS[-1]))

    def _padded_sizes(self, batch_size: int, num_tokens: int, num_positions: int) -> Sizes:
        """Positions are padded as tokens are, but for the one of a prompt."""
        padded = self._padded(num_tokens)
        asked = 1 if num_positions == 1 else min(padded, self._padded(num_positions))
        return Sizes(batch_size, padded, asked, self.info.entropy_top_k)

    def _make_step(self, shape: StepShape) -> Step:
        cuda.use_device(self._device)
        asked = Sizes(shape.batch_size, shape.num_tokens, shape.num_positions, self.info.entropy_top_k)
        tensors = inputs_of(self.info) | outputs_of(shape.with_top)
        row_tokens = asked.num_tokens
        if self._fits(asked.batch_size, asked.num_tokens):
            sizes = self._padded_sizes(asked.batch_size, asked.num_tokens, asked.num_positions)
            arrays, row_tokens = self._blocks_of(sizes).arrays(), sizes.num_tokens
        else:
            arrays = {name: np.zeros(shape_of(name, asked), dtype) for name, dtype in tensors.items()}
        views = {
            name: arrays[name] if name in WITH_PADDING else _without_padding(arrays[name], name, asked)
            for name in tensors
        }
        logits = None
        if shape.with_logits:
            logits, has_grown = self._host_logits.view(asked.batch_size, asked.num_positions)
            if has_grown:
                self._steps.drop_with_logits()
        return Step(first_slot=shape.first_slot, logits=logits, row_tokens=row_tokens, **views)

    def _blocks_of(self, sizes: Sizes) -> StepBlocks:
        """The blocks of one padded shape, which all its slots and lengths share."""
        blocks = self._blocks.get(sizes)
        if blocks is None:
            blocks = self._blocks[sizes] = StepBlocks.make(self.info, sizes)
        return blocks

    def _tensors(self, blocks: StepBlocks, first_slot: int) -> Iterator[DeviceTensor]:
        """All tensors of the decoder, inputs and outputs, in a step from this slot on."""
        model = self._model
        for block in blocks:
            for name, array in block.arrays.items():
                address = block.device.address + block.offsets[name]
                yield DeviceTensor(name, block is blocks.inputs, address, array.shape, array.dtype.type)
        batch_size, num_positions = blocks.outputs.arrays["argmax"].shape
        yield DeviceTensor("logits", False, self._logits.address, (batch_size, num_positions, model.vocab_size))
        cache_shape = (batch_size, model.rank_kv_heads, self._cache_tokens, model.head_dim)
        for index, cache in enumerate(self._caches):
            name, address = f"{('key', 'value')[index % 2]}.{index // 2}", self._slot(cache, first_slot)
            yield DeviceTensor(f"past_{name}", True, address, cache_shape)
            yield DeviceTensor(f"present_{name}", False, address, cache_shape)

    def _write_inputs(self, blocks: StepBlocks) -> None:
        inputs = blocks.inputs
        self._stream.copy(inputs.device.address, inputs.host.address, inputs.num_bytes)

    def _read(self, block: Block) -> None:
        self._stream.copy(block.host.address, block.device.address, block.num_bytes)

    def _run_rows(self, step: Step) -> None:
        """One row at a time, for steps with long rows."""
        with_top, length = step.top_ids is not None, step.input_ids.shape[1]
        outputs = outputs_of(with_top)
        for row in range(len(step.input_ids)):
            part = self.step(step.first_slot + row, 1, length, num_positions=step.num_positions, with_top=with_top)
            for name in inputs_of(step):
                if name != POSITIONS_INPUT:
                    getattr(part, name)[0] = getattr(step, name)[row]
            part.speak_from(0, step.first_position[row])
            self._execute(part, None if step.logits is None else step.logits[row : row + 1])
            for name in outputs:
                getattr(step, name)[row] = getattr(part, name)[0]

    def _read_logits(self, logits: FloatArray, num_positions: int) -> None:
        """Copies the last run's rows of logits, of so many positions each, and widens the first ones to float32
        [B, L, V]."""
        batch_size, num_wanted, vocab_size = logits.shape
        item_bytes = ITEM_BYTES[self._model.kv_cache_dtype]
        num_bytes = logits.size * item_bytes
        if num_bytes > len(self._raw_logits.array):
            self._raw_logits = cuda.PinnedBuffer(num_bytes)
        row_bytes = num_wanted * vocab_size * item_bytes
        pitch = num_positions * vocab_size * item_bytes
        source = self._logits.address, pitch
        self._stream.copy_rows((self._raw_logits.address, row_bytes), source, row_bytes, batch_size)
        self._stream.synchronize()
        widen(self._raw_logits.array[:num_bytes], self._model.kv_cache_dtype, logits)

    def _slot(self, cache: cuda.DeviceBuffer, slot: int) -> int:
        return cache.address + slot * self._slot_bytes

    def _copy_tokens(self, target: int, source: int, num_tokens: int) -> None:
        """The first tokens of a slot of one cache tensor [Hkv, S, D]."""
        if num_tokens:
            pitch = self._cache_tokens * self._token_bytes
            num_bytes = num_tokens * self._token_bytes
            self._stream.copy_rows((target, pitch), (source, pitch), num_bytes, self._model.rank_kv_heads)


def _without_padding(array: npt.NDArray[Any], name: str, asked: Sizes) -> npt.NDArray[Any]:
    return array[:, : shape_of(name, asked)[1]]


def widen(raw: cuda.Bytes, dtype: Dtype, target: npt.NDArray[np.float32]) -> None:
    """Raw logits of any dtype as float32; a bfloat16 is the upper half of one."""
    if dtype == "bfloat16":
        np.left_shift(raw.view(np.uint16).reshape(target.shape), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        stored: Any = np.float32 if dtype == "float32" else np.float16
        np.copyto(target, raw.view(stored).reshape(target.shape))
