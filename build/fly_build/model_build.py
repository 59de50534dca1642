"""One model on its way from a checkpoint to files: what is planned of it, and the steps that backends share.

It knows graphs, heads and weights. Which of the steps a model needs, in which form and what follows them is its
backend's to say.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from fly_build.checkpoint import Checkpoint
from fly_build.export import DecoderGraph, export_decoder
from fly_build.graph_edits import DTYPES, NUMPY_DTYPES
from fly_build.head import HeadForm, append_head
from fly_build.linear_forms import Kernels, bits_per_weight
from fly_build.operators import AttentionForm
from fly_build.sharding import Sharding
from fly_build.tensors import INPUT_NAME, OUTPUT_NAME, Parameter, Tensors, check_values, count_parameters
from fly_build.weights import WeightWriter
from fly_trt.manifest import Dtype, Head, Limits, ModelEngine

INLINE_BYTES = 1024
ALIGNMENT = 64
Report = Callable[[str, float], None]
"""Is told the name of a step and which fraction of it is done."""


@dataclass(frozen=True)
class ModelPlan:
    """One engine to build: `folder` is its place in the engine directory; a draft made of the target leaves out the
    blocks `skipped` (blocks.py) and lies beside it, under `name`. `kernels` compute it; `sharding` is how it is spread
    over several ranks."""

    folder: str
    checkpoint: Checkpoint
    engine: ModelEngine
    skipped: tuple[int, ...] = ()
    name: str = ""
    kernels: Kernels = "cpu"
    sharding: Sharding | None = None

    def weight_bytes(self) -> int:
        """Size of the stored weights of one rank; embeddings, norms and mixtures' experts stay unquantised."""
        plain = self._plain_bits
        bits, output_bits = self._bits_per_weight
        is_shared = self.checkpoint.config.tie_word_embeddings and output_bits == plain
        total = 0.0
        for name, shape in self.checkpoint.parameter_shapes.items():
            if name == OUTPUT_NAME and is_shared:
                continue
            own = shape if self.sharding is None else self.sharding.rank_shape(name, shape)
            is_linear = len(shape) == 2 and name != INPUT_NAME
            total += math.prod(own) * (output_bits if name == OUTPUT_NAME else bits if is_linear else plain)
        return int(total) // 8

    @property
    def _plain_bits(self) -> int:
        return 32 if self.engine.dtype == "float32" else 16

    @property
    def _bits_per_weight(self) -> tuple[float, float]:
        """Of linear layers and of the vocabulary projection."""
        if (scheme := self.checkpoint.scheme) is not None:
            return scheme.bits_per_weight, self._plain_bits
        return bits_per_weight(self.kernels, self.engine.quantization, self._plain_bits)


@dataclass(frozen=True)
class ModelBuild:
    """What a backend builds one model from and where: `workspace` becomes the engine directory."""

    model: ModelPlan
    limits: Limits
    head: Head
    workspace: Path
    report: Report

    @property
    def path(self) -> Path:
        """Of the file that the runtime loads."""
        return self.workspace / self.model.engine.model

    @contextlib.contextmanager
    def step(self, name: str, rank: int | None = None) -> Iterator[Callable[[float], None]]:
        """Reports the begin and the end of a step, and in between what the function is told, as a fraction. `rank` is
        that of a step which each rank of a sharded model has."""
        num_ranks = self.model.engine.tensor_parallel_size
        of_ranks = f" rank {rank} of {num_ranks}" if num_ranks > 1 and rank is not None else ""
        name = f"{self.model.name or self.model.folder}{of_ranks}: {name}"
        self.report(name, 0.0)
        yield lambda fraction: self.report(name, fraction)
        self.report(name, 1.0)

    def export(self, compute_dtype: Dtype, attention: AttentionForm) -> DecoderGraph:
        """The decoder without a head. Raises CheckpointError when it cannot be traced."""
        dtype, _ = DTYPES[compute_dtype]
        model, longest = self.model, self.limits.max_seq_len
        return export_decoder(
            model.checkpoint,
            longest,
            dtype=dtype,
            attention=attention,
            skipped=model.skipped,
            sharding=model.sharding,
        )

    def append_head(self, decoder: DecoderGraph, form: HeadForm) -> None:
        append_head(decoder.model, self.head.entropy_top_k, self.head.stop_token_ids, form=form)

    def save_graph(self, decoder: DecoderGraph, compute_dtype: Dtype, path: Path) -> ModelEngine:
        """Writes the graph with its weights as external data. Returns the engine with the parameters there were."""
        graph = self.load_weights(decoder, compute_dtype)
        graph.save(path)
        return graph.engine

    def load_weights(self, decoder: DecoderGraph, compute_dtype: Dtype) -> "LoadedGraph":
        """Finds the weights; each is read when it is written."""
        with self.step("load weights"):
            tensors = self.model.checkpoint.load_weights()
        return LoadedGraph(self, decoder, compute_dtype, tensors, self._with_parameters(tensors))

    def save_sharing(self, decoder: DecoderGraph, tensors: Tensors, compute_dtype: Dtype, owner: Path) -> ModelEngine:
        """Writes the graph with the weights of the graph `owner` beside it, which has all of them, as external data."""
        used = {name: tensors[name] for name, value in decoder.parameters.items() if value.uses()}
        self.attach(decoder, tensors, compute_dtype)
        stored = ir.load(owner).graph.initializers
        for name, value in decoder.model.graph.initializers.items():
            weight = stored[name].const_value if name in stored else None
            if isinstance(weight, ir.ExternalTensor):
                assert value.const_value is not None
                assert (weight.dtype, weight.shape) == (value.const_value.dtype, value.const_value.shape), name
                value.const_value = weight
            else:
                assert value.const_value is not None
                assert value.const_value.nbytes <= INLINE_BYTES, f"{name} is not among the weights of {owner.name}"
        ir.save(decoder.model, self.path)
        return self._with_parameters(used)

    def attach(
        self,
        decoder: DecoderGraph,
        tensors: Tensors,
        compute_dtype: Dtype,
        prepare: Callable[[str, Parameter], Parameter] = lambda name, tensor: tensor,
    ) -> None:
        """Gives the graph its weights, see WeightWriter."""
        engine = self.model.engine
        writer = WeightWriter(
            graph=decoder.model.graph,
            tensors=tensors,
            dtype=engine.dtype,
            quantization=engine.quantization,
            compute_dtype=compute_dtype,
            kernels=self.model.kernels,
            prepare=prepare,
        )
        writer.attach(decoder.parameters)

    def _with_parameters(self, tensors: Tensors) -> ModelEngine:
        engine = self.model.engine
        source = engine.source.model_copy(update={"num_parameters": count_parameters(tensors)})
        return engine.model_copy(update={"source": source})


@dataclass(frozen=True)
class LoadedGraph:
    """A decoder graph and the weights that were found for it, of the whole model. It is written as it is, or once for
    each rank of a sharded model. `engine` counts the parameters that there are."""

    build: ModelBuild
    decoder: DecoderGraph
    compute_dtype: Dtype
    tensors: Tensors
    engine: ModelEngine

    def save(self, path: Path, rank: int = 0) -> None:
        """Writes the graph with its weights as external data, each of which is read, checked, written and dropped. Of a
        sharded model the rank's part is written, and the graph is left as it is for the next one."""
        sharding = self.build.model.sharding
        decoder = self.decoder if sharding is None else self.decoder.copy()
        tensors = self.tensors if sharding is None else {**self.tensors, **sharding.rank_vectors()}

        def part(name: str, tensor: Parameter) -> Parameter:
            own = tensor if sharding is None else sharding.part(name, tensor, rank)
            stored, computed = DTYPES[self.engine.dtype][0], NUMPY_DTYPES[self.compute_dtype]
            check_values(self.build.model.checkpoint.name, {name: own}, stored, computed)
            return own

        self.build.attach(decoder, tensors, self.compute_dtype, part)
        with self.build.step("write weights", rank) as advance:
            ir.save(
                decoder.model,
                path,
                external_data=f"{path.name}.data",
                size_threshold_bytes=INLINE_BYTES,
                alignment=ALIGNMENT,
                align_threshold=0,
                callback=lambda _, progress: advance((progress.index + 1) / progress.total),
                max_workers=1,
            )
