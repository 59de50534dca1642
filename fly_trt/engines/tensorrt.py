"""TensorRT and TensorRT-RTX on a GPU behind the engine contract.

What all engines of a GPU do is gpu.py's. From its second run on, a step of one shape is one CUDA graph: both copies and
the engine. TensorRT, too, wants the engine's GPU to be the current one of the thread that deserialises the engine,
makes contexts or runs them.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fly_trt.engines import cuda
from fly_trt.engines.base import RANK_CHANNELS, RANK_OUTPUT, EngineInfo, LoadSettings
from fly_trt.engines.blocks import Sizes, StepBlocks
from fly_trt.engines.gpu import DeviceTensor, GpuEngine
from fly_trt.engines.kernel_cache import KernelCache
from fly_trt.engines.nccl import Communicator
from fly_trt.engines.tensorrt_library import cache_folder, check_compatibility, import_library
from fly_trt.errors import EngineError
from fly_trt.manifest import Manifest, ModelEngine
from fly_trt.tokens import FloatArray

logger = logging.getLogger(__name__)

MAX_BOUND_SHAPES = 64
RANK_BYTES = RANK_CHANNELS * np.dtype(np.float32).itemsize  # of a token
DECODE, VERIFICATION, PREFILL = range(3)  # optimisation profiles, in the order in which fly_build adds them


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


class TensorRTEngine(GpuEngine):
    """One compiled decoder with its slots.

    `kernel_cache` is the file in which TensorRT-RTX's kernels are kept between processes. Raises EngineError also when
    the plan was built for another library version or GPU.
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
        self._plan = plan = model.tensorrt
        self._library = library = import_library(plan.library)
        super().__init__(
            model, info, max_row_tokens=plan.max_row_tokens, cache_tokens=plan.cache_tokens, device_id=device_id
        )
        check_compatibility(plan_path, plan, library, cuda.compute_capability())
        if plugin_library is not None:
            library.load_plugins(plugin_library)
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
        self._bound: OrderedDict[tuple[int, Sizes], _Bound] = OrderedDict()
        self._prefill_context: Any = None
        self._prefill_sizes: set[Sizes] = set()
        self._communicator: Communicator | None = None
        self._agree: Callable[[bool], bool] = lambda could: could
        self._allocate(num_slots)
        self._rank_output: cuda.DeviceBuffer | None = None
        if model.tensor_parallel_size > 1:
            self._rank_output = cuda.DeviceBuffer(self._most_tokens(num_slots) * RANK_BYTES)

    def use_device(self) -> None:
        """Makes the engine's GPU the calling thread's current one."""
        cuda.use_device(self._device)

    def join(self, communicator: Communicator, agree: Callable[[bool], bool]) -> None:
        """What this rank sums with the others through, from the first step on; it must outlive the engine. `agree` says
        of something that this rank could do, or could not, whether all ranks could."""
        self._communicator, self._agree = communicator, agree

    def rank_output(self, num_positions: int) -> FloatArray:
        """float32 [num_positions, RANK_CHANNELS] of a sharded engine: what this rank's last step of one row ended with,
        before the vocabulary. Waits for the step."""
        assert self._rank_output is not None
        host = cuda.PinnedBuffer(num_positions * RANK_BYTES)
        self._stream.copy(host.address, self._rank_output.address, num_positions * RANK_BYTES)
        self._stream.synchronize()
        return host.array.view(np.float32).reshape(num_positions, RANK_CHANNELS).copy()

    def _tensors(self, blocks: StepBlocks, first_slot: int) -> Iterator[DeviceTensor]:
        yield from super()._tensors(blocks, first_slot)
        if self._rank_output is not None:
            shape = (*blocks.outputs.arrays["argmax"].shape, RANK_CHANNELS)
            yield DeviceTensor(RANK_OUTPUT, False, self._rank_output.address, shape, np.float32)

    def _compute(self, first_slot: int, sizes: Sizes) -> StepBlocks:
        with self._communicator.in_use() if self._communicator else contextlib.nullcontext():
            bound = self._bind(first_slot, sizes)
            if bound.graph is not None:
                bound.graph.launch()
            else:
                self._enqueue(bound)
                if bound.is_capturable:
                    self._capture(bound)
        return bound.blocks

    def _save(self) -> None:
        if self._kernels is not None and self.num_preparations:
            self._kernels.save()

    def _release(self) -> None:
        self._bound.clear()
        self._prefill_context = None
        del self._kernels, self._context_settings, self._engine, self._runtime, self._scratch, self._rank_output

    def _bind(self, first_slot: int, sizes: Sizes) -> _Bound:
        if sizes.num_tokens > self._max_row_tokens:
            return self._bind_prefill(first_slot, sizes)
        key = (first_slot, sizes)
        bound = self._bound.get(key)
        if bound is None:
            # Each graph has a context of its own, since a context must not change under a graph that was captured from
            # it; all of them share the scratch memory, for only one runs at a time.
            context = self._make_context(DECODE if sizes.num_tokens == 1 else VERIFICATION)
            bound = self._bound[key] = _Bound(self._blocks_of(sizes), context)
            self._set_tensors(bound, first_slot)
            if len(self._bound) > MAX_BOUND_SHAPES:
                self._bound.popitem(last=False)
        else:
            self._bound.move_to_end(key)
        return bound

    def _bind_prefill(self, first_slot: int, sizes: Sizes) -> _Bound:
        """One row of a prompt: every such step has the same context, and no graph, for lengths and slots vary."""
        if self._prefill_context is None:
            self._prefill_context = self._make_context(PREFILL)
        if sizes not in self._prefill_sizes:
            self._prefill_sizes.add(sizes)
            self.num_preparations += 1  # TensorRT-RTX compiles kernels for it
        bound = _Bound(self._blocks_of(sizes), self._prefill_context, is_capturable=False)
        self._set_tensors(bound, first_slot)
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

    def _set_tensors(self, bound: _Bound, first_slot: int) -> None:
        for tensor in self._tensors(bound.blocks, first_slot):
            if tensor.is_input:
                self._require(bound.context.set_input_shape(tensor.name, tensor.shape), tensor.name)
            self._require(bound.context.set_tensor_address(tensor.name, tensor.address), tensor.name)

    def _require(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise EngineError(f"{self._library.name}: {what}: {self._library.take_errors()}")

    def _enqueue(self, bound: _Bound) -> None:
        self._write_inputs(bound.blocks)
        self._require(bound.context.execute_async_v3(self._stream.handle), "execution")
        self._read(bound.blocks.outputs)

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
