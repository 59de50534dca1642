"""The build: plan -> models -> tokenizer -> manifest -> self-drafts -> costs -> chain.

It knows checkpoints, tokenizers and the engine directory, which comes to be in a temporary folder that is renamed into
place last. How a model becomes files is its backend's to know. What makes graphs is imported where it is used: not all
backends need it, and not every environment has it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import fly_trt
from fly_build.backends import BACKENDS, Backend
from fly_build.calibration import calibration_prompts
from fly_build.checkpoint import Checkpoint, open_checkpoint, stop_token_ids
from fly_build.gpu_memory import GpuPlan
from fly_build.plan import ModelPlan
from fly_build.progress import Report, quietly
from fly_build.schema import Recipe
from fly_build.sharding import shard
from fly_build.tokenizer import save_tokenizer, warn_of_tokens_without_embedding
from fly_trt.errors import ConfigError
from fly_trt.files import new_directory
from fly_trt.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Head,
    Limits,
    Manifest,
    ModelEngine,
    Quantization,
    Source,
    hash_directory,
    write_manifest,
)

DEFAULT_MAX_SEQ_LEN = 8192
COSTS = ("draft_token_cost", "verification_token_cost")


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    output: Path
    limits: Limits
    head: Head
    models: list[ModelPlan]
    backend: Backend

    @property
    def gpus(self) -> list[GpuPlan]:
        """What the models take of each GPU's memory; nothing where the backend does not know."""
        return self.backend.plan_gpus(self.models, self.limits)

    @property
    def cache_tokens(self) -> int:
        """Tokens of cache that a slot takes at most."""
        return self.backend.cache_tokens(self.limits)

    @property
    def commands(self) -> list[str]:
        """What builds and serves, for backends whose library has commands of its own."""
        return self.backend.commands(self.models, self.limits, self.head, self.output)


def make_plan(
    recipe: Recipe, output: Path, *, overwrite: bool = False, to_build: bool = True, report: Report = quietly
) -> Plan:
    """Reads configurations and tokenizers, refuses what cannot work, and touches no weight and no file. A plan that is
    not `to_build` needs neither the weights nor the library that compiles them, for which `report` is as in build."""
    assert recipe.device is not None
    backend = BACKENDS[recipe.backend, recipe.device](recipe)
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: already exists: choose another -o or pass --overwrite")
    if output.exists() and not (output / MANIFEST_NAME).is_file():
        raise ConfigError(f"{output}: not an engine directory, so --overwrite does not replace it: choose another -o")
    if to_build:
        backend.prepare(report)
    sources = {"target": recipe.target, "draft": recipe.draft, "inner_draft": recipe.inner_draft}
    checkpoints = {
        folder: open_checkpoint(source.checkpoint, source.revision, needs_weights=to_build, is_exported=backend.exports)
        for folder, source in sources.items()
        if source is not None
    }
    ranks = {"target": recipe.tp_size, "draft": backend.draft_ranks}
    shardings = {
        folder: shard(checkpoint.name, checkpoint.config, checkpoint.head_dim, ranks[folder])
        for folder, checkpoint in checkpoints.items()
        if ranks.get(folder, 1) > 1 and (backend.exports or checkpoint.has_known_sizes)
    }
    target, *others = checkpoints.values()
    backend.check_checkpoints(target, others)
    if recipe.inner_draft is not None:
        calibration_prompts(recipe.chain.calibrate)
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
    limits = backend.fit_limits(limits)
    if recipe.self_draft is not None:
        from fly_build.self_draft import check_self_draft

        check_self_draft(recipe.self_draft, target, limits)
    smallest = min(checkpoint.config.vocab_size for checkpoint in checkpoints.values())
    if recipe.entropy_top_k > smallest:
        raise ConfigError(f"entropy_top_k {recipe.entropy_top_k}: the vocabulary has {smallest} tokens: use 3")
    warn_of_tokens_without_embedding(target.name, target.tokenizer, target.config.vocab_size)
    head = Head(
        entropy_top_k=recipe.entropy_top_k, stop_token_ids=stop_token_ids(target), top_tokens=True, positions=True
    )
    models = []
    for folder, checkpoint in checkpoints.items():
        engine = backend.expected(_engine(folder, checkpoint, backend, ranks.get(folder, 1)))
        bits = backend.bits_per_weight(engine.quantization)
        models.append(
            ModelPlan(folder, checkpoint, engine, kernels=backend.kernels, bits=bits, sharding=shardings.get(folder))
        )
    return Plan(recipe, output, limits, head, models, backend)


def _engine(folder: str, checkpoint: Checkpoint, backend: Backend, num_ranks: int) -> ModelEngine:
    first, *others = backend.model_files(folder, num_ranks)
    return ModelEngine(
        model=first,
        other_ranks=others,
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
        dtype=backend.dtype,
        quantization=_quantization(checkpoint, backend),
        kv_cache_dtype=backend.kv_cache_dtype,
        kv_cache_quantization=backend.kv_cache_quantization(checkpoint),
    )


def _quantization(checkpoint: Checkpoint, backend: Backend) -> Quantization:
    """What the recipe asks for, or what the checkpoint has already. Raises ConfigError where they differ, and for what
    the backend does not compute."""
    asked, scheme = backend.recipe.quantization, checkpoint.scheme
    if scheme is None:
        return asked
    has = f"{checkpoint.name}: its weights are {scheme.kind} already ({scheme.method})"
    if asked not in ("none", scheme.kind):
        raise ConfigError(f"{has}, asked for {asked}: leave --quantization out, or give the original")
    if scheme.kind not in backend.quantizations:
        raise ConfigError(
            f"{has}, for which backend {backend.recipe.backend} has no product: use --backend tensorrt, or the "
            "original with --quantization int8"
        )
    return scheme.kind


def build(plan: Plan, report: Report) -> Manifest:
    """Builds the engine directory. `report(step, fraction)` is called as each step advances.

    An error or Ctrl-C leaves `plan.output` as it was; it never holds an incomplete engine.
    """
    with new_directory(plan.output.absolute()) as workspace:
        engines = plan.backend.build_models(plan.models, plan.limits, plan.head, workspace, report)
        return _finish(plan, engines, workspace, report)


def _finish(plan: Plan, engines: dict[str, ModelEngine], workspace: Path, report: Report) -> Manifest:
    report("tokenizer and manifest", 0.0)
    target = plan.models[0].checkpoint
    save_tokenizer(target.tokenizer, workspace / "tokenizer")
    generation = target.load_generation_config().to_diff_dict()
    (workspace / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        backend=plan.recipe.backend,
        device=plan.recipe.device,
        name=plan.recipe.name or plan.output.name,
        fly_trt_version=fly_trt.__version__,
        library_versions=plan.backend.library_versions(),
        limits=plan.limits,
        head=plan.head,
        speculative=plan.backend.speculative(),
        target=engines["target"],
        draft=engines.get("draft"),
        inner_draft=engines.get("inner_draft"),
        files=hash_directory(workspace),
    )
    report("tokenizer and manifest", 1.0)
    if (settings := plan.recipe.self_draft) is not None:
        from fly_build.self_draft import add_self_drafts

        manifest = add_self_drafts(manifest, settings, target, plan.backend, workspace, report)
    manifest = add_costs(manifest, workspace, report)
    if manifest.inner_draft is not None:
        from fly_build.chain import add_chain

        manifest = add_chain(manifest, plan.recipe.chain, plan.backend, workspace, report)
    write_manifest(manifest, workspace)
    return manifest


def add_costs(manifest: Manifest, directory: Path, report: Report) -> Manifest:
    """The manifest with draft_token_cost and verification_token_cost among its speculative defaults, where they are not
    given."""
    given = {name: manifest.speculative[name] for name in COSTS if manifest.speculative.get(name) is not None}
    has_draft = manifest.draft is not None or manifest.self_drafts
    if not has_draft or len(given) == len(COSTS):
        return manifest
    report("measure", 0.0)
    assert manifest.device is not None
    costs = BACKENDS[manifest.backend, manifest.device].step_costs(manifest, directory)
    report("measure", 1.0)
    if costs is None:
        return manifest
    rounded = {name: float(f"{cost:.2g}") for name, cost in zip(COSTS, costs, strict=True)}
    return manifest.model_copy(update={"speculative": manifest.speculative | rounded | given})
