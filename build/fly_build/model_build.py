"""One model on its way from a checkpoint to files: what is planned of it, and the steps that backends share.

It knows graphs, heads and weights. Which of the steps a model needs, in which form and what follows them is its
backend's to say.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from fly_build.checkpoint import Checkpoint
from fly_build.export import DecoderGraph, export_decoder
from fly_build.head import HeadForm, append_head
from fly_build.operators import AttentionForm
from fly_build.quantization import BLOCK_SIZE
from fly_build.tensors import check_values, count_parameters
from fly_build.weights import DTYPES, WeightWriter
from fly_trt.manifest import Device, Dtype, Head, Limits, ModelEngine

INLINE_BYTES = 1024
ALIGNMENT = 64
# A block of 32 weights has a float32 scale, so one bit more per weight; int4 keeps the vocabulary projection in 8 bits.
BITS_PER_WEIGHT = {"int8": 8.0, "int4": 5.0}
BITS_PER_PROJECTION_WEIGHT = {"int8": 8.0, "int4": 9.0}
BLOCK_BITS = {"int8": 8, "int4": 4}

Tensors = dict[str, torch.Tensor]
"""The parameters of a checkpoint, by name."""

Report = Callable[[str, float], None]
"""Is told the name of a step and which fraction of it is done."""


@dataclass(frozen=True)
class ModelPlan:
    """One engine to build: `folder` is its place in the engine directory; a draft made of the target leaves out the
    blocks `skipped` (blocks.py) and lies beside it, under `name`. It runs on `device`."""

    folder: str
    checkpoint: Checkpoint
    engine: ModelEngine
    skipped: tuple[int, ...] = ()
    name: str = ""
    device: Device = "cpu"

    def weight_bytes(self) -> int:
        """Size of the stored weights; embeddings, norms and mixtures' experts stay unquantised."""
        engine, config = self.engine, self.checkpoint.config
        plain_bits = 32 if engine.dtype == "float32" else 16
        if engine.quantization == "none":
            return engine.source.num_parameters * plain_bits // 8
        embedding = config.vocab_size * config.hidden_size
        projection = embedding
        others = engine.source.num_parameters - embedding - (0 if config.tie_word_embeddings else projection)
        experts = self.checkpoint.num_expert_parameters
        per_weight = BITS_PER_WEIGHT[engine.quantization]
        per_projection_weight = BITS_PER_PROJECTION_WEIGHT[engine.quantization]
        if self.device == "cuda":  # all in blocks, with scales as wide as an unquantised weight
            per_weight = BLOCK_BITS[engine.quantization] + plain_bits / BLOCK_SIZE
            per_projection_weight = BLOCK_BITS["int8"] + plain_bits / BLOCK_SIZE
        bits = (embedding + experts) * plain_bits + (others - experts) * per_weight
        return int(bits + projection * per_projection_weight) // 8


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
    def step(self, name: str) -> Iterator[Callable[[float], None]]:
        """Reports the begin and the end of a step, and in between what the function is told, as a fraction."""
        name = f"{self.model.name or self.model.folder}: {name}"
        self.report(name, 0.0)
        yield lambda fraction: self.report(name, fraction)
        self.report(name, 1.0)

    def export(self, compute_dtype: Dtype, attention: AttentionForm) -> DecoderGraph:
        """The decoder without a head. Raises CheckpointError when it cannot be traced."""
        dtype, _ = DTYPES[compute_dtype]
        model, longest = self.model, self.limits.max_seq_len
        return export_decoder(model.checkpoint, longest, dtype=dtype, attention=attention, skipped=model.skipped)

    def append_head(self, decoder: DecoderGraph, form: HeadForm) -> None:
        append_head(decoder.model, self.head.entropy_top_k, self.head.stop_token_ids, form=form)

    def save_graph(self, decoder: DecoderGraph, compute_dtype: Dtype, path: Path) -> ModelEngine:
        """Writes the graph with its weights as external data. Returns the engine with the parameters there were."""
        checkpoint, engine = self.model.checkpoint, self.model.engine
        with self.step("load weights"):
            tensors = checkpoint.load_weights()
            check_values(checkpoint.name, tensors, DTYPES[engine.dtype][0])
        self._attach(decoder, tensors, compute_dtype)
        with self.step("write weights") as advance:
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
        return self._with_parameters(tensors)

    def save_sharing(self, decoder: DecoderGraph, tensors: Tensors, compute_dtype: Dtype, owner: Path) -> ModelEngine:
        """Writes the graph with the weights of the graph `owner` beside it, which has all of them, as external data."""
        used = {name: tensors[name] for name, value in decoder.parameters.items() if value.uses()}
        self._attach(decoder, tensors, compute_dtype)
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

    def _attach(self, decoder: DecoderGraph, tensors: Tensors, compute_dtype: Dtype) -> None:
        engine = self.model.engine
        writer = WeightWriter(
            graph=decoder.model.graph,
            tensors=tensors,
            dtype=engine.dtype,
            quantization=engine.quantization,
            compute_dtype=compute_dtype,
            device=self.model.device,
        )
        writer.attach(decoder.parameters)

    def _with_parameters(self, tensors: Tensors) -> ModelEngine:
        engine = self.model.engine
        source = engine.source.model_copy(update={"num_parameters": count_parameters(tensors)})
        return engine.model_copy(update={"source": source})
