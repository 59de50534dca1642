"""One model on its way from a checkpoint to files: what is planned of it, and the steps that backends share.

It knows graphs, heads and weights. Which of the steps a model needs, in which form and what follows them is its
backend's to say.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from fly_build.cpu_linears import fuse_linears
from fly_build.export import DecoderGraph, export_decoder
from fly_build.graph_edits import DTYPES, NUMPY_DTYPES
from fly_build.head import HeadForm, append_head
from fly_build.operators import AttentionForm
from fly_build.plan import Build
from fly_build.tensors import Parameter, Tensors, check_values, count_parameters
from fly_build.weights import WeightWriter
from fly_trt.manifest import Dtype, ModelEngine

INLINE_BYTES = 1024
ALIGNMENT = 64


@dataclass(frozen=True)
class ModelBuild(Build):
    """The steps of a build that goes through a graph of ours."""

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
        """Gives the graph its weights, see WeightWriter, in the operators that the kernels have."""
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
        if self.model.kernels == "fly_cpu":
            fuse_linears(decoder.model)

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
