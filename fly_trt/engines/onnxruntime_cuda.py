"""ONNX Runtime's CUDA provider behind the engine contract: the path for every NVIDIA GPU without TensorRT at hand.

What all engines of a GPU do is gpu.py's, also the memory of caches and steps, to which ONNX Runtime is bound by
address: past and present are one tensor, which TensorScatter then updates in place. The session computes on the
engine's stream, so that copies and steps stay in order. A step of one shape is one CUDA graph, which ONNX Runtime
captures itself: its first run computes three times what the others compute once, each time with the same result. Steps
of a prompt are not captured, for their lengths and slots vary.

ONNX Runtime falls back to the CPU where anything is missing, and says so in its log. Here that is refused.
"""

import contextlib
import ctypes
import io
import logging
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fly_trt.engines import cuda
from fly_trt.engines.base import EngineInfo, LoadSettings
from fly_trt.engines.blocks import Sizes, StepBlocks
from fly_trt.engines.gpu import GpuEngine, StepSizes
from fly_trt.engines.onnxruntime import session_options
from fly_trt.errors import EngineError, one_line
from fly_trt.manifest import Dtype, Manifest, ModelEngine

logger = logging.getLogger(__name__)

PROVIDER = "CUDAExecutionProvider"
PROVIDER_LIBRARY = "libonnxruntime_providers_cuda.so"
# Older ones anchor the causal mask of a step behind cached tokens at the first key.
OLDEST = (1, 31, 1)
INSTALL = (
    "pip install 'fly-trt[cuda]', then pip uninstall -y onnxruntime and pip install --no-deps --force-reinstall "
    "onnxruntime-gpu, since both are the module onnxruntime"
)
# ONNX Runtime releases no graph before the session ends (seen in 1.31.1), so that later shapes go without.
MAX_GRAPHS = 128
MAX_UNCAPTURED_SHAPES = 64
NO_GRAPH = -1
ERRORS = 3  # of its log: it warns of shape arithmetic on the CPU, which is as it should be
BFLOAT16 = 16  # of onnx.TensorProto; NumPy has none
BFLOAT16_CAPABILITY = 8.0
CACHE_DTYPES: dict[Dtype, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": BFLOAT16}


def load(
    directory: Path, manifest: Manifest, model: ModelEngine, info: EngineInfo, settings: LoadSettings
) -> "OnnxRuntimeCudaEngine":
    """The engine of one model of a directory (base.LoadEngine)."""
    return OnnxRuntimeCudaEngine(
        directory / model.model,
        model,
        info,
        num_slots=settings.num_slots,
        num_threads=settings.num_threads,
        device_id=settings.device_id,
    )


_Shape = tuple[int, Sizes]  # first slot, sizes with padding


@dataclass
class _Bound:
    """One padded shape at one first slot; the options have the number of its graph, if any."""

    blocks: StepBlocks
    binding: Any
    options: Any
    has_run: bool = False


class OnnxRuntimeCudaEngine(GpuEngine):
    """One decoder graph with its slots. Raises EngineError also for a library that has no CUDA, a CUDA provider that
    does not load, and a graph that would not run on the GPU whole."""

    def __init__(
        self,
        model_path: Path,
        model: ModelEngine,
        info: EngineInfo,
        *,
        num_slots: int,
        num_threads: int | None = None,
        device_id: int | None = None,
    ) -> None:
        _check_library()
        sizes = StepSizes.of(info)
        super().__init__(
            model, info, max_row_tokens=sizes.max_row_tokens, cache_tokens=sizes.cache_tokens, device_id=device_id
        )
        if model.dtype == "bfloat16" and float(capability := cuda.compute_capability()) < BFLOAT16_CAPABILITY:
            raise EngineError(
                f"{model_path}: bfloat16 needs compute capability {BFLOAT16_CAPABILITY}, this GPU has {capability}: "
                "rebuild with --dtype float16"
            )
        self._max_graphs = MAX_GRAPHS
        self._captured: dict[_Shape, _Bound] = {}
        self._uncaptured: OrderedDict[_Shape, _Bound] = OrderedDict()
        self._session = self._open(model_path, num_threads)
        self._allocate(num_slots)

    def _compute(self, first_slot: int, sizes: Sizes) -> StepBlocks:
        shape = first_slot, sizes
        bound = self._bind(shape)
        try:
            self._run(bound)
        except EngineError as error:
            if bound.has_run or shape not in self._captured:
                raise
            bound = self._without_graphs(shape, error)
        bound.has_run = True
        self._read(bound.blocks.outputs)
        return bound.blocks

    def _run(self, bound: _Bound) -> None:
        self._write_inputs(bound.blocks)
        try:
            self._session.run_with_iobinding(bound.binding, bound.options)
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            raise EngineError(f"ONNX Runtime {ort.__version__}: {one_line(error)}") from None

    def _without_graphs(self, shape: _Shape, error: EngineError) -> _Bound:
        """Runs a step that could not be captured; later shapes are not tried."""
        self._stream.end_capture()
        self._max_graphs = 0
        del self._captured[shape]
        bound = self._make(shape)
        self._run(bound)
        logger.warning("steps of other shapes than before run without a CUDA graph: %s", error)
        return bound

    def _release(self) -> None:
        self._captured.clear()
        self._uncaptured.clear()
        del self._session

    def _open(self, path: Path, num_threads: int | None) -> Any:
        _load_libraries()
        options = session_options(num_threads)
        options.log_severity_level = ERRORS
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        settings = {
            "device_id": str(self._device),
            "user_compute_stream": str(self._stream.handle),
            "enable_cuda_graph": "1",  # refused, too, where a node would run on the CPU
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",  # float32 means float32
        }
        session, reason = None, "it chose the CPU"
        try:
            session = ort.InferenceSession(str(path), options, providers=[(PROVIDER, settings)], enable_fallback=0)
        except Exception as error:  # as above
            reason = one_line(error)
        if session is not None and PROVIDER in session.get_providers():
            return session
        found = f"{path}: ONNX Runtime {ort.__version__} cannot load"
        if (missing := _missing_library()) is not None:  # also where the CPU was refused for what it cannot compute
            raise EngineError(
                f"{found} its CUDA provider ({missing}): install the CUDA libraries that it is built for, and a driver "
                "for them: pip install 'fly-trt[cuda]'"
            )
        raise EngineError(f"{found} it: {reason}")

    def _bind(self, shape: _Shape) -> _Bound:
        bound = self._captured.get(shape) or self._uncaptured.get(shape)
        if bound is None:
            return self._make(shape)
        if shape in self._uncaptured:
            self._uncaptured.move_to_end(shape)
        return bound

    def _make(self, shape: _Shape) -> _Bound:
        first_slot, sizes = shape
        self.num_preparations += 1
        blocks = self._blocks_of(sizes)
        binding = self._session.io_binding()
        for tensor in self._tensors(blocks, first_slot):
            dtype = tensor.dtype or CACHE_DTYPES[self._model.kv_cache_dtype]
            bind = binding.bind_input if tensor.is_input else binding.bind_output
            bind(tensor.name, "cuda", self._device, dtype, tensor.shape, tensor.address)
        is_captured = sizes.num_tokens <= self._max_row_tokens and len(self._captured) < self._max_graphs
        options = ort.RunOptions()
        graph_id = len(self._captured) + 1 if is_captured else NO_GRAPH  # 0 is ONNX Runtime's own
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the outputs are waited for
        bound = _Bound(blocks, binding, options)
        if is_captured:
            self._captured[shape] = bound
        else:
            self._uncaptured[shape] = bound
            if len(self._uncaptured) > MAX_UNCAPTURED_SHAPES:
                self._uncaptured.popitem(last=False)
        return bound


def _check_library() -> None:
    if PROVIDER not in ort.get_available_providers():
        raise EngineError(f"onnxruntime {ort.__version__}: the package without CUDA: {INSTALL}")
    version = tuple(int(number) for number in re.findall(r"\d+", ort.__version__)[:3])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"onnxruntime-gpu {ort.__version__}: {oldest} or newer is needed: {INSTALL}")


def _load_libraries() -> None:
    """Those of NVIDIA's Python packages, where there are any. What is missing shows when the provider is loaded."""
    ort.set_default_logger_severity(ERRORS)
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls(directory="")


def _missing_library() -> str | None:
    """Why the CUDA provider does not load, or None where it does."""
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / PROVIDER_LIBRARY))
    except OSError as error:
        return one_line(error)
    return None
