"""The build: plan -> trace -> head -> weights -> tokenizer -> manifest, in a temporary folder that is renamed last."""

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

import fly_trt
from fly_build.attention import make_shape_invariant
from fly_build.checkpoint import Checkpoint, check_same_tokenizer, open_checkpoint, stop_token_ids
from fly_build.export import export_decoder
from fly_build.head import append_head
from fly_build.recipe import Recipe
from fly_build.weights import WeightWriter
from fly_trt.errors import ConfigError
from fly_trt.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Head,
    Limits,
    Manifest,
    ModelEngine,
    Source,
    hash_directory,
    write_manifest,
)

DEFAULT_MAX_SEQ_LEN = 8192
MODEL_FILE = "model.onnx"
INLINE_BYTES = 1024
ALIGNMENT = 64
LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
# A block of 32 weights has a float32 scale, so one bit more per weight; int4 keeps the vocabulary projection in 8 bits.
BITS_PER_WEIGHT = {"int8": 8.0, "int4": 5.0}
BITS_PER_PROJECTION_WEIGHT = {"int8": 8.0, "int4": 9.0}

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class ModelPlan:
    """One engine to build: `folder` is its place in the engine directory."""

    folder: str
    checkpoint: Checkpoint
    engine: ModelEngine

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
        bits = (embedding + experts) * plain_bits + (others - experts) * BITS_PER_WEIGHT[engine.quantization]
        return int(bits + projection * BITS_PER_PROJECTION_WEIGHT[engine.quantization]) // 8


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    output: Path
    limits: Limits
    head: Head
    models: list[ModelPlan]


def make_plan(recipe: Recipe, output: Path, *, overwrite: bool = False) -> Plan:
    """Reads configurations and tokenizers, refuses what cannot work, and touches no weight and no file."""
    if recipe.backend != "onnxruntime":
        raise ConfigError(f"backend {recipe.backend!r} cannot be built by this version: use --backend onnxruntime")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: already exists: choose another -o or pass --overwrite")
    if output.exists() and not (output / MANIFEST_NAME).is_file():
        raise ConfigError(f"{output}: not an engine directory, so --overwrite does not replace it: choose another -o")
    target = open_checkpoint(recipe.target.checkpoint, recipe.target.revision)
    checkpoints = {"target": target}
    if recipe.draft is not None:
        checkpoints["draft"] = open_checkpoint(recipe.draft.checkpoint, recipe.draft.revision)
        check_same_tokenizer(target, checkpoints["draft"])
    longest = min(checkpoint.max_seq_len for checkpoint in checkpoints.values())
    limits = Limits(
        max_batch_size=recipe.max_batch_size,
        max_seq_len=recipe.max_seq_len or min(longest, DEFAULT_MAX_SEQ_LEN),
        max_draft_len=recipe.max_draft_len,
        max_num_tokens=recipe.max_num_tokens,
    )
    if limits.max_seq_len > longest:
        raise ConfigError(
            f"max_seq_len {limits.max_seq_len}: the checkpoints support {longest}: use --max-seq-len {longest}"
        )
    smallest = min(checkpoint.config.vocab_size for checkpoint in checkpoints.values())
    if recipe.entropy_top_k > smallest:
        raise ConfigError(f"entropy_top_k {recipe.entropy_top_k}: the vocabulary has {smallest} tokens: use 3")
    head = Head(entropy_top_k=recipe.entropy_top_k, stop_token_ids=stop_token_ids(target))
    models = [
        ModelPlan(folder, checkpoint, _engine(folder, checkpoint, recipe)) for folder, checkpoint in checkpoints.items()
    ]
    return Plan(recipe, output, limits, head, models)


def _engine(folder: str, checkpoint: Checkpoint, recipe: Recipe) -> ModelEngine:
    return ModelEngine(
        model=f"{folder}/{MODEL_FILE}",
        source=Source(
            checkpoint=checkpoint.name,
            revision=checkpoint.revision,
            architecture=checkpoint.architecture,
            num_parameters=checkpoint.num_parameters,
        ),
        vocab_size=checkpoint.config.vocab_size,
        num_layers=checkpoint.config.num_hidden_layers,
        num_kv_heads=checkpoint.num_kv_heads,
        head_dim=checkpoint.head_dim,
        dtype=recipe.dtype,
        quantization=recipe.quantization,
        kv_cache_dtype="float32",
    )


def build(plan: Plan, report: Report) -> Manifest:
    """Builds the engine directory. `report(step, fraction)` is called as each step advances.

    An error or Ctrl-C leaves `plan.output` as it was; it never holds an incomplete engine.
    """
    output = plan.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{output.name}.building-", dir=output.parent))
    try:
        for model in plan.models:
            _build_model(model, plan, workspace, report)
        manifest = _finish(plan, workspace, report)
        _move_into_place(workspace, output)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return manifest


def _build_model(model: ModelPlan, plan: Plan, workspace: Path, report: Report) -> None:
    report(f"{model.folder}: trace", 0.0)
    decoder = export_decoder(model.checkpoint, plan.limits.max_seq_len)
    # For the kernels of ONNX Runtime, which is the only backend; another one gets a pass of its own, or none.
    make_shape_invariant(decoder.model, model.checkpoint.config.num_attention_heads, model.checkpoint.num_kv_heads)
    append_head(decoder.model, plan.head.entropy_top_k, plan.head.stop_token_ids)
    report(f"{model.folder}: trace", 1.0)

    report(f"{model.folder}: load weights", 0.0)
    tensors = model.checkpoint.load_weights()
    report(f"{model.folder}: load weights", 1.0)

    step = f"{model.folder}: write weights"
    writer = WeightWriter(
        graph=decoder.model.graph,
        tensors=tensors,
        dtype=model.engine.dtype,
        quantization=model.engine.quantization,
        output_name="lm_head.weight" if "lm_head.weight" in decoder.parameters else "model.embed_tokens.weight",
    )
    writer.attach(decoder.parameters)
    path = workspace / model.engine.model
    path.parent.mkdir()
    ir.save(
        decoder.model,
        path,
        external_data=f"{MODEL_FILE}.data",
        size_threshold_bytes=INLINE_BYTES,
        alignment=ALIGNMENT,
        align_threshold=0,
        callback=lambda _, progress: report(step, (progress.index + 1) / progress.total),
        max_workers=1,
    )
    report(step, 1.0)


def _finish(plan: Plan, workspace: Path, report: Report) -> Manifest:
    report("tokenizer and manifest", 0.0)
    target = plan.models[0].checkpoint
    target.load_tokenizer().save_pretrained(workspace / "tokenizer")
    generation = target.load_generation_config().to_diff_dict()
    (workspace / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    engines = {model.folder: model.engine for model in plan.models}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        backend=plan.recipe.backend,
        name=plan.recipe.name or plan.output.name,
        fly_trt_version=fly_trt.__version__,
        library_versions={name: importlib.metadata.version(name) for name in LIBRARIES},
        limits=plan.limits,
        head=plan.head,
        speculative=plan.recipe.speculative,
        target=engines["target"],
        draft=engines.get("draft"),
        files=hash_directory(workspace),
    )
    write_manifest(manifest, workspace)
    report("tokenizer and manifest", 1.0)
    return manifest


def _move_into_place(workspace: Path, output: Path) -> None:
    workspace.chmod(0o755)
    if not output.exists():
        os.rename(workspace, output)
        return
    replaced = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    try:
        os.rename(output, replaced / output.name)
        os.rename(workspace, output)
    finally:
        if not output.exists():
            os.rename(replaced / output.name, output)
        shutil.rmtree(replaced)
