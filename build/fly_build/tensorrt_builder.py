"""Compiles a decoder graph into a TensorRT engine, with `tensorrt` or with `tensorrt_rtx`, which needs no GPU for it.

The ONNX parser makes the network; attention layers are then made anew through the network's API, since the parser can
say neither how many keys of the cache are valid nor that an attention may be decomposed. The rest is the graph's own.
It needs nothing of the extra `build` but the library.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fly_trt.engines.base import POSITION_INPUTS
from fly_trt.engines.gpu import StepSizes
from fly_trt.engines.tensorrt_library import Library, cache_folder, keep
from fly_trt.errors import EngineError
from fly_trt.manifest import Dtype, LayerSummary, TensorRTPlan

logger = logging.getLogger(__name__)

MAX_PLUGIN_TOP_K = 8
PLUGIN_LIBRARY = "libfly_plugins.so"
FP8_COMPUTE_CAPABILITY = "8.9"


@dataclass(frozen=True)
class AttentionNames:
    """The tensors of one Attention node, by which it is found again in the network."""

    query: str
    key: str
    value: str
    mask: str
    output: str


Shape = tuple[int, int, int]  # rows, tokens and positions of a step


class Sizes(StepSizes):
    """What the engine's optimisation profiles allow, in rows and tokens."""

    def profiles(self) -> Iterator[tuple[Shape, Shape, Shape]]:
        """(B, T, L) at least, at best and at most: decode, verification, prefill. The runtime picks them by this order.
        Of most of a prompt one position is looked at; of one whose log-probabilities are wanted it is all of them."""
        rows, tokens = self.max_batch_size, self.max_row_tokens
        usual, verified = max(1, rows // 2), min(16, tokens)
        yield (1, 1, 1), (usual, 1, 1), (rows, 1, 1)
        yield (1, 2, 1), (usual, verified, verified), (rows, tokens, tokens)
        yield (1, 1, 1), (1, self.max_num_tokens, 1), (1, self.max_num_tokens, self.max_num_tokens)


@dataclass
class EngineBuilder:
    """Builds the engines of one engine directory. `report(fraction)` follows the builder's own progress."""

    library: Library
    sizes: Sizes
    dtype: Dtype
    plugin_library: str | None
    timing_cache: Path | None
    needs_fp8: bool = False

    def build(
        self, onnx_path: Path, attentions: list[AttentionNames], num_layers: int, report: Callable[[float], None]
    ) -> tuple[Any, TensorRTPlan]:
        """The serialised engine (a buffer) and its record. `num_layers` of the model have an attention each.

        Half precision asks for a dedicated attention kernel and falls back to a decomposed one; float32 has none.
        Raises EngineError with TensorRT's reason, KeyboardInterrupt after Ctrl-C.
        """
        reason = ""
        for decomposable in (True,) if self.dtype == "float32" else (False, True):
            builder, network = self._parse(onnx_path)
            native = 0
            for attention in _replace_attentions(self.library.trt, network, attentions):
                attention.decomposable = decomposable
                native += not decomposable
            layers = self._summarise(network, native, num_layers)
            plan = self._serialise(builder, network, report)
            if plan is not None:
                return plan, self._record(layers)
            reason = self.library.take_errors()
            logger.debug("%s: decomposable=%s: %s", onnx_path, decomposable, reason)
        raise EngineError(f"{self.library.name} {self.library.version} cannot build the engine: {reason}")

    def __post_init__(self) -> None:
        """Raises EngineError where the GPU that an engine is built on has no fp8 arithmetic. Warns of what the portable
        library leaves out."""
        if not self.needs_fp8:
            return
        if self._is_portable:
            logger.warning(
                "fp8: this engine needs compute capability %s or later, and tensorrt_rtx supports no Hopper (H100, "
                "H200): for those build with --tensorrt-library tensorrt on one of them",
                FP8_COMPUTE_CAPABILITY,
            )
        elif (found := self._compute_capability) and float(found) < float(FP8_COMPUTE_CAPABILITY):
            raise EngineError(
                f"fp8 needs compute capability {FP8_COMPUTE_CAPABILITY} or later, this GPU has {found}: use "
                "--quantization int8, or build on the GPU that shall run it"
            )

    def _parse(self, onnx_path: Path) -> tuple[Any, Any]:
        trt = self.library.trt
        self.library.errors.clear()
        try:
            builder = trt.Builder(self.library.log)
        except TypeError:  # what pybind makes of a null pointer
            raise EngineError(
                f"{self.library.name} {self.library.version} does not start: {self.library.take_errors()}: it needs a "
                "GPU also to build; tensorrt_rtx does not: use --tensorrt-library tensorrt_rtx"
            ) from None
        # TensorRT 11 and TensorRT-RTX know no other networks than strongly typed ones.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, self.library.log)
        if not parser.parse_from_file(str(onnx_path)):
            reason = self.library.take_errors()
            if parser.num_errors:
                first = parser.get_error(0)
                reason = f"{first.node_operator()}: {' '.join(first.desc().split())}"
            raise EngineError(f"{self.library.name} {self.library.version} cannot parse the graph: {reason}")
        return builder, network

    def _serialise(self, builder: Any, network: Any, report: Callable[[float], None]) -> Any:
        trt = self.library.trt
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
        config.set_flag(trt.BuilderFlag.STRICT_NANS)  # logits that are not numbers must be seen in the head
        if self._is_portable:
            config.num_compute_capabilities = 1
            oldest = trt.ComputeCapability.SM89 if self.needs_fp8 else trt.ComputeCapability.SM80
            config.set_compute_capability(oldest, 0)
        for profile_sizes in self.sizes.profiles():
            config.add_optimization_profile(_make_profile(builder, network, *profile_sizes))
        timings = self._read_timing_cache(config)
        monitor = _make_monitor(trt, report)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if monitor.is_interrupted:
            raise KeyboardInterrupt
        if plan is not None and timings is not None and self.timing_cache is not None:
            keep(self.timing_cache, timings.serialize(), "kernel timings")
        return plan

    @property
    def _is_portable(self) -> bool:
        """Built for a family of GPUs rather than for the one that is there."""
        return self.library.name == "tensorrt_rtx"

    @property
    def _compute_capability(self) -> str:
        """Of the GPU that is there, or of the oldest one that an engine of the portable library runs on."""
        oldest = FP8_COMPUTE_CAPABILITY if self.needs_fp8 else "8.0"
        return oldest if self._is_portable else _compute_capability()

    def _record(self, layers: LayerSummary) -> TensorRTPlan:
        return TensorRTPlan(
            library=self.library.name,
            version=self.library.version,
            compute_capability=self._compute_capability,
            cache_tokens=self.sizes.cache_tokens,
            max_row_tokens=self.sizes.max_row_tokens,
            head="functions" if self.plugin_library is None else "plugins",
            plugin_library=self.plugin_library,
            layers=layers,
        )

    def _summarise(self, network: Any, native_attention: int, num_layers: int) -> LayerSummary:
        types = [network.get_layer(index).type.name for index in range(network.num_layers)]
        return LayerSummary(
            total=len(types),
            native_attention=native_attention,
            decomposed_attention=num_layers - native_attention,
            kv_cache_update=types.count("KV_CACHE_UPDATE"),
            plugin=types.count("PLUGIN_V3"),
            collective=types.count("DIST_COLLECTIVE"),
        )

    def _read_timing_cache(self, config: Any) -> Any:
        if self.timing_cache is None:
            return None
        content = self.timing_cache.read_bytes() if self.timing_cache.is_file() else b""
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            logger.warning("%s: not a timing cache of this version and GPU: starting anew", self.timing_cache)
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache


def default_timing_cache(library: Library) -> Path | None:
    """None for tensorrt_rtx, which compiles kernels where it runs and times none while it builds."""
    if library.name == "tensorrt_rtx":
        return None
    return cache_folder() / f"{library.name}-{library.version}.timing"


def _replace_attentions(trt: Any, network: Any, attentions: list[AttentionNames]) -> list[Any]:
    """Makes every Attention of the parsed network anew, with the count of valid keys where the library has an input for
    it, and gives its output to all that read the old one, which the builder then drops. Returns the new attentions."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    tensors = {layer.get_output(i).name: layer.get_output(i) for layer in layers for i in range(layer.num_outputs)}
    lengths = _valid_keys(trt, network) if attentions else None
    made, outputs = [], {}
    for names in attentions:
        query, key, value, mask = (tensors[name] for name in (names.query, names.key, names.value, names.mask))
        softmax = trt.AttentionNormalizationOp.SOFTMAX
        if hasattr(network, "add_attention_v2"):
            attention = network.add_attention_v2(query, key, value, softmax, trt.CausalMaskKind.NONE)
        else:  # before TensorRT 11
            attention = network.add_attention(query, key, value, softmax, False)
        attention.mask = mask
        if hasattr(attention, "key_value_lengths"):
            attention.key_value_lengths = lengths
        attention.name = names.output
        made.append(attention)
        outputs[names.output] = attention.get_output(0)
    for layer in layers:
        for index in range(layer.num_inputs):
            read = layer.get_input(index)
            if read is not None and read.name in outputs:
                layer.set_input(index, outputs[read.name])
    return made


def _valid_keys(trt: Any, network: Any) -> Any:
    """int32 [B]: tokens in the cache after the step has written all its positions, the padding included."""
    inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    shape = network.add_shape(inputs["input_ids"]).get_output(0)
    length = network.add_slice(shape, start=(1,), shape=(1,), stride=(1,)).get_output(0)
    sum_ = network.add_elementwise(inputs["write_indices"], length, trt.ElementWiseOperation.SUM).get_output(0)
    return network.add_cast(sum_, trt.int32).get_output(0)


def _make_profile(builder: Any, network: Any, least: Shape, best: Shape, most: Shape) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = (_shape(tensor.name, tuple(tensor.shape), sizes) for sizes in (least, best, most))
        profile.set_shape(tensor.name, *shapes)
    return profile


def _shape(name: str, shape: tuple[int, ...], sizes: Shape) -> tuple[int, ...]:
    """The first dimension of every input is B; the only other ones that vary are T and L."""
    batch_size, num_tokens, num_positions = sizes
    length = num_positions if name in POSITION_INPUTS else num_tokens
    return (batch_size, *(length if size == -1 else size for size in shape[1:]))


def _make_monitor(trt: Any, report: Callable[[float], None]) -> Any:
    """Follows the outermost phase of the builder. Ctrl-C ends the build at the next step."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.is_interrupted = False
            self.outermost: tuple[str, int] | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outermost = (phase_name, max(num_steps, 1))

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if self.outermost is not None and phase_name == self.outermost[0]:
                    report(min(1.0, (step + 1) / self.outermost[1]))
            except KeyboardInterrupt:
                self.is_interrupted = True
            return not self.is_interrupted

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _compute_capability() -> str:
    """Of the current CUDA device, which a full TensorRT builds for."""
    from fly_trt.engines import cuda

    return cuda.compute_capability()
