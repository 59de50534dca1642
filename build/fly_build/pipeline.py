"""The build: plan -> trace -> head -> weights -> compile -> tokenizer -> manifest.

It happens in a temporary folder that is renamed into place last."""

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

import fly_trt
from fly_build.attention import make_shape_invariant
from fly_build.checkpoint import Checkpoint, check_same_tokenizer, open_checkpoint, stop_token_ids
from fly_build.export import DecoderGraph, export_decoder
from fly_build.head import HeadForm, append_head
from fly_build.measure import add_costs
from fly_build.recipe import Recipe
from fly_build.tensorrt import (
    MAX_PLUGIN_TOP_K,
    PLUGIN_LIBRARY,
    EngineBuilder,
    Sizes,
    attention_names,
    default_timing_cache,
    fix_cache_length,
)
from fly_build.tensors import check_values, count_parameters
from fly_build.tokenizer import save_tokenizer, warn_of_tokens_without_embedding
from fly_build.weights import DTYPES, WeightWriter
from fly_trt.engines.tensorrt_library import Library, import_library
from fly_trt.errors import ConfigError
from fly_trt.files import new_directory
from fly_trt.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Dtype,
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
PLAN_FILE = "model.plan"
INLINE_BYTES = 1024
ALIGNMENT = 64
LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
# A block of 32 weights has a float32 scale, so one bit more per weight; int4 keeps the vocabulary projection in 8 bits.
BITS_PER_WEIGHT = {"int8": 8.0, "int4": 5.0}
BITS_PER_PROJECTION_WEIGHT = {"int8": 8.0, "int4": 9.0}

logger = logging.getLogger(__name__)

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
    library: Library | None  # of TensorRT

    @property
    def cache_tokens(self) -> int:
        """Tokens of cache that a slot takes at most."""
        return self.limits.max_seq_len if self.library is None else Sizes.of(self.limits).cache_tokens


def make_plan(recipe: Recipe, output: Path, *, overwrite: bool = False) -> Plan:
    """Reads configurations and tokenizers, refuses what cannot work, and touches no weight and no file."""
    library = _tensorrt(recipe)
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
    warn_of_tokens_without_embedding(target.name, target.tokenizer, target.config.vocab_size)
    head = Head(entropy_top_k=recipe.entropy_top_k, stop_token_ids=stop_token_ids(target))
    models = [
        ModelPlan(folder, checkpoint, _engine(folder, checkpoint, recipe)) for folder, checkpoint in checkpoints.items()
    ]
    return Plan(recipe, output, limits, head, models, library)


def _tensorrt(recipe: Recipe) -> Library | None:
    """The library to compile with, its plugins loaded. Raises what would fail late otherwise."""
    if recipe.backend == "tensorrt-llm":
        raise ConfigError("backend 'tensorrt-llm' cannot be built by this version: use onnxruntime or tensorrt")
    if recipe.backend != "tensorrt":
        return None
    library = import_library(recipe.tensorrt_library)
    if library.name == "tensorrt_rtx":
        if recipe.plugin_library is not None:
            raise ConfigError("plugin_library: tensorrt_rtx has no plugin layers: leave it out, or use tensorrt")
        if recipe.timing_cache is not None:
            raise ConfigError("timing_cache: tensorrt_rtx times nothing while it builds: leave it out, or use tensorrt")
    if recipe.plugin_library is not None:
        if recipe.entropy_top_k > MAX_PLUGIN_TOP_K:
            raise ConfigError(
                f"entropy_top_k {recipe.entropy_top_k}: the plugins look at {MAX_PLUGIN_TOP_K} at most: "
                "leave --plugin-library out"
            )
        library.load_plugins(Path(recipe.plugin_library))
    return library


def _engine(folder: str, checkpoint: Checkpoint, recipe: Recipe) -> ModelEngine:
    is_compiled = recipe.backend == "tensorrt"
    return ModelEngine(
        model=f"{folder}/{PLAN_FILE if is_compiled else MODEL_FILE}",
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
        dtype=recipe.stored_dtype,
        quantization=recipe.quantization,
        kv_cache_dtype=recipe.stored_dtype if is_compiled else "float32",
    )


def build(plan: Plan, report: Report) -> Manifest:
    """Builds the engine directory. `report(step, fraction)` is called as each step advances.

    An error or Ctrl-C leaves `plan.output` as it was; it never holds an incomplete engine.
    """
    with new_directory(plan.output.absolute()) as workspace:
        engines = {model.folder: _build_model(model, plan, workspace, report) for model in plan.models}
        return _finish(plan, engines, workspace, report)


def _build_model(model: ModelPlan, plan: Plan, workspace: Path, report: Report) -> ModelEngine:
    (workspace / model.folder).mkdir()
    if plan.library is not None:
        return _compile_model(model, plan, plan.library, workspace, report)
    report(f"{model.folder}: trace", 0.0)
    decoder = export_decoder(model.checkpoint, plan.limits.max_seq_len)
    make_shape_invariant(decoder.model, model.checkpoint.config.num_attention_heads, model.checkpoint.num_kv_heads)
    append_head(decoder.model, plan.head.entropy_top_k, plan.head.stop_token_ids, form="lazy_functions")
    report(f"{model.folder}: trace", 1.0)
    return _save_graph(model, decoder, "float32", workspace / model.engine.model, report)


def _compile_model(model: ModelPlan, plan: Plan, library: Library, workspace: Path, report: Report) -> ModelEngine:
    """A TensorRT engine. The graph computes in the stored dtype, and is only an intermediate file."""
    recipe, dtype = plan.recipe, model.engine.dtype
    report(f"{model.folder}: trace", 0.0)
    decoder = export_decoder(model.checkpoint, plan.limits.max_seq_len, dtype=DTYPES[dtype][0], attention="mask")
    has_plugins = recipe.plugin_library is not None
    form: HeadForm = "plugins" if has_plugins else "functions"
    append_head(decoder.model, plan.head.entropy_top_k, plan.head.stop_token_ids, form=form)
    fix_cache_length(decoder.model, plan.cache_tokens)
    report(f"{model.folder}: trace", 1.0)

    plan_path = workspace / model.engine.model
    onnx_path = plan_path.with_name(MODEL_FILE)
    engine = _save_graph(model, decoder, dtype, onnx_path, report)
    if recipe.plugin_library is not None:
        shutil.copy(recipe.plugin_library, workspace / PLUGIN_LIBRARY)
    timing_cache = Path(recipe.timing_cache) if recipe.timing_cache else default_timing_cache(library)
    builder = EngineBuilder(
        library, Sizes.of(plan.limits), dtype, PLUGIN_LIBRARY if has_plugins else None, timing_cache
    )
    step = f"{model.folder}: compile"
    report(step, 0.0)
    serialised, record = builder.build(
        onnx_path, attention_names(decoder.model), model.engine.num_layers, lambda fraction: report(step, fraction)
    )
    plan_path.write_bytes(serialised)
    for path in onnx_path.parent.glob(f"{MODEL_FILE}*"):
        path.unlink()
    report(step, 1.0)
    if number := record.layers.decomposed_attention:
        logger.warning(
            "%s: no kernel computes the attention of %d of %d layers whole (float32, a soft cap, or a head size that "
            "has none): slower than it could be",
            model.folder,
            number,
            model.engine.num_layers,
        )
    return engine.model_copy(update={"tensorrt": record})


def _save_graph(
    model: ModelPlan, decoder: DecoderGraph, compute_dtype: Dtype, path: Path, report: Report
) -> ModelEngine:
    """Writes the graph with its weights as external data. Returns the engine with the parameters that there were."""
    report(f"{model.folder}: load weights", 0.0)
    tensors = model.checkpoint.load_weights()
    check_values(model.checkpoint.name, tensors, DTYPES[model.engine.dtype][0])
    report(f"{model.folder}: load weights", 1.0)

    step = f"{model.folder}: write weights"
    writer = WeightWriter(
        graph=decoder.model.graph,
        tensors=tensors,
        dtype=model.engine.dtype,
        quantization=model.engine.quantization,
        compute_dtype=compute_dtype,
    )
    writer.attach(decoder.parameters)
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
    source = model.engine.source.model_copy(update={"num_parameters": count_parameters(tensors)})
    return model.engine.model_copy(update={"source": source})


def _finish(plan: Plan, engines: dict[str, ModelEngine], workspace: Path, report: Report) -> Manifest:
    report("tokenizer and manifest", 0.0)
    target = plan.models[0].checkpoint
    save_tokenizer(target.tokenizer, workspace / "tokenizer")
    generation = target.load_generation_config().to_diff_dict()
    (workspace / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    if plan.library is not None:
        versions[plan.library.name] = plan.library.version
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        backend=plan.recipe.backend,
        name=plan.recipe.name or plan.output.name,
        fly_trt_version=fly_trt.__version__,
        library_versions=versions,
        limits=plan.limits,
        head=plan.head,
        speculative=plan.recipe.speculative,
        target=engines["target"],
        draft=engines.get("draft"),
        files=hash_directory(workspace),
    )
    report("tokenizer and manifest", 1.0)
    manifest = add_costs(manifest, workspace, lambda fraction: report("measure", fraction))
    write_manifest(manifest, workspace)
    return manifest
