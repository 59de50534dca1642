"""TensorRT-LLM's engines, which releases 1.2.x are the last to have: target and draft are compiled by its own builder,
in its own environment, with FLy's plugin behind the target's logits.

It knows the recipe and where files go; what TensorRT-LLM is asked for is in tensorrt_llm_engine.py.
"""

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fly_build.backends.base import Backend
from fly_build.backends.tensorrt_llm import (
    DEFAULT_MAX_NUM_TOKENS,
    at_location,
    check_acceptance,
    check_drafts,
    check_models,
    follows_checkpoint,
    installed_version,
    location,
    paged_tokens,
    plan_paged,
    warn_of_short_drafts,
)
from fly_build.measure import estimate_costs
from fly_build.schema import Recipe
from fly_build.tensorrt_builder import MAX_PLUGIN_TOP_K, PLUGIN_LIBRARY
from fly_build.tensorrt_llm_engine import MAX_STOP_TOKENS, EngineBuild, LoosePlugin, find_creator
from fly_trt.engines.tensorrt_library import import_library
from fly_trt.errors import CheckpointError, ConfigError
from fly_trt.manifest import Dtype, Head, Limits, Manifest, ModelEngine, Quantization
from fly_trt.params import SpeculativeConfig
from fly_trt.verification import FlyPolicy, HeadInfo

if TYPE_CHECKING:
    from fly_build.checkpoint import Checkpoint
    from fly_build.gpu_memory import GpuPlan
    from fly_build.plan import Build, ModelPlan
    from fly_build.progress import Report

RELEASE = "1.2."
ENVIRONMENT = "tools/tensorrt_llm_env.sh"
METHODS = ("multi_level", "draft_model", "ngram")
SPECULATIVE_FIELDS = (
    "method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min", "prompt_lookup_num_tokens",
    "acceptance", "preset", "fly_entropy_threshold", "fly_window_size",
)  # fmt: skip
# Of linear layers; TensorRT-LLM leaves the vocabulary projection as it is.
LINEAR_BITS: dict[Quantization, float] = {"none": 16, "int8": 8, "int4": 4, "fp8": 8}


class TensorRTLlmEngineBackend(Backend):
    default_dtype = "bfloat16"
    own_fields = ("plugin_library",)
    quantizations = ("none", "int8", "int4", "fp8")
    model_file = "rank0.engine"
    spans_gpus = True
    exports = False

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        check_models(recipe)
        check_drafts(recipe)
        check_acceptance(recipe, SPECULATIVE_FIELDS, METHODS)
        if recipe.entropy_top_k > MAX_PLUGIN_TOP_K:
            raise ConfigError(
                f"entropy_top_k {recipe.entropy_top_k}: the plugin looks at {MAX_PLUGIN_TOP_K} at most: use 3"
            )
        if recipe.dtype == "float32":
            raise ConfigError("dtype 'float32': TensorRT-LLM's attention has 16 bits: use bfloat16 or float16")
        if recipe.plugin_library is not None and cls._policy_of(recipe, 2) is None:
            raise ConfigError(
                f"plugin_library {recipe.plugin_library!r}: acceptance is exact, which needs no plugin: leave it out"
            )

    def prepare(self, report: "Report") -> None:
        version = installed_version()
        if version is None or not version.startswith(RELEASE):
            raise ConfigError(
                f"backend {self.recipe.backend}: found {f'tensorrt_llm {version}' if version else 'no tensorrt_llm'}, "
                f"expected {RELEASE}x, the last that has engines: {ENVIRONMENT} makes an environment that has it"
            )
        if self._policy(2) is None:
            return
        if self.recipe.plugin_library is None:
            raise ConfigError(
                f"plugin_library: FLy in TensorRT-LLM's engines is a plugin: add --plugin-library {PLUGIN_LIBRARY} (in "
                f"the environment of {ENVIRONMENT}: $FLY_PLUGINS), or say acceptance exact in the recipe's speculative"
            )
        library = import_library("tensorrt")
        library.load_plugins(Path(self.recipe.plugin_library))
        find_creator(library.trt)

    def _policy(self, vocab_size: int) -> FlyPolicy | None:
        return self._policy_of(self.recipe, vocab_size)

    @staticmethod
    def _policy_of(recipe: Recipe, vocab_size: int) -> FlyPolicy | None:
        """FLy as the recipe has it; None for exact acceptance."""
        head = HeadInfo(vocab_size, recipe.entropy_top_k, has_top_tokens=True)
        policy = SpeculativeConfig.from_dict(recipe.speculative).policy(head)
        return policy if isinstance(policy, FlyPolicy) and policy.is_loose else None

    @property
    def kv_cache_dtype(self) -> Dtype:
        return self.dtype

    @classmethod
    def model_files(cls, folder: str, num_ranks: int) -> list[str]:
        """TensorRT-LLM's own names, beside its config.json."""
        return [f"{folder}/rank{rank}.engine" for rank in range(num_ranks)]

    def check_checkpoints(self, target: "Checkpoint", drafts: "list[Checkpoint]") -> None:
        super().check_checkpoints(target, drafts)
        for checkpoint in (target, *drafts):
            scheme = checkpoint.scheme
            if scheme is not None and scheme.method != "modelopt":
                raise CheckpointError(
                    f"{checkpoint.name}: quantised by {scheme.method}, and TensorRT-LLM's engines are built from what "
                    "ModelOpt quantised: give such a checkpoint, or the original with --quantization int8 or int4"
                )
            if scheme is not None and (cache := scheme.kv_cache_algorithm) and (cache, scheme.kind) != ("FP8", "fp8"):
                raise CheckpointError(
                    f"{checkpoint.name}: {scheme.kind} weights with a KV cache of {cache}: TensorRT-LLM reuses blocks "
                    "of a quantised cache only where weights and cache are fp8: export it without kv_cache_quant_algo"
                )
            if scheme is None and self.recipe.quantization == "fp8":
                raise ConfigError(
                    f"quantization 'fp8': TensorRT-LLM calibrates it, and {checkpoint.name} is not quantised: quantise "
                    "it with ModelOpt (examples/llm_ptq/hf_ptq.py --qformat fp8) and give what that exports"
                )

    def kv_cache_quantization(self, checkpoint: "Checkpoint") -> Literal["none", "fp8"]:
        return follows_checkpoint(checkpoint)

    def fit_limits(self, limits: Limits) -> Limits:
        """Every round is read as one prompt with its drafts: there are no chunks."""
        warn_of_short_drafts("max_draft_len", limits.max_draft_len, self._policy(2))
        given = "max_num_tokens" in self.recipe.model_fields_set
        asked = limits.max_num_tokens if given else DEFAULT_MAX_NUM_TOKENS
        rounds = limits.max_batch_size * (limits.max_draft_len + 1)
        return limits.model_copy(
            update={"max_num_tokens": max(asked, limits.max_seq_len + limits.max_draft_len, rounds)}
        )

    def cache_tokens(self, limits: Limits) -> int:
        return paged_tokens(limits)

    def plan_gpus(self, models: "list[ModelPlan]", limits: Limits) -> "list[GpuPlan]":
        return plan_paged(models, limits)

    def bits_per_weight(self, quantization: Quantization) -> tuple[float, float] | None:
        return LINEAR_BITS[quantization], 16

    def commands(self, models: "list[ModelPlan]", limits: Limits, head: Head, output: Path) -> list[str]:
        recipe = self.recipe
        flags: dict[str, object] = {}
        for model in models:
            flags[model.folder] = location(model.checkpoint)
            flags[f"{model.folder}-revision"] = model.checkpoint.revision
        flags |= {
            "dtype": self.dtype,
            "quantization": None if recipe.quantization == "none" else recipe.quantization,
            "tp-size": recipe.tp_size,
            "draft-tp-size": recipe.draft_tp_size if recipe.draft is not None else None,
            "max-batch-size": limits.max_batch_size,
            "max-seq-len": limits.max_seq_len,
            "max-draft-len": limits.max_draft_len,
            "max-num-tokens": limits.max_num_tokens,
            "entropy-top-k": recipe.entropy_top_k,
        }
        words = ["fly-build", "--backend", "tensorrt-llm", "--engine"]
        for name, value in flags.items():
            words += [] if value is None else [f"--{name}", str(value)]
        build = shlex.join(words)
        if self._policy(2) is not None:
            library = recipe.plugin_library
            build += f" --plugin-library {'$FLY_PLUGINS' if library is None else shlex.quote(library)}"
        build += f" -o {shlex.quote(str(output))}"
        if recipe.file is not None:  # `speculative` has no flags
            build += f" {shlex.quote(recipe.file)}"
        generate = shlex.join(["fly-generate", str(output), "Tell me"])
        return [f"{ENVIRONMENT} make", *(f"{ENVIRONMENT} run {shlex.quote(command)}" for command in (build, generate))]

    def build_models(
        self, models: "list[ModelPlan]", limits: Limits, head: Head, workspace: Path, report: "Report"
    ) -> dict[str, ModelEngine]:
        from fly_build.plan import Build as ModelBuild

        for model in models:
            build = ModelBuild(model, limits, head, workspace, report)
            (workspace / model.folder).mkdir()
            plan = self._plan_engine(build)
            for rank in range(plan.num_ranks):
                with build.step("compile", rank):
                    plan.save(rank, workspace / model.folder)
        if self.recipe.plugin_library is not None:
            shutil.copy(self.recipe.plugin_library, workspace / PLUGIN_LIBRARY)
        return {model.folder: at_location(model) for model in models}

    def _plan_engine(self, build: "Build") -> EngineBuild:
        model, checkpoint = build.model, build.model.checkpoint
        return EngineBuild(
            name=checkpoint.name,
            folder=_folder(checkpoint),
            architecture=checkpoint.architecture,
            dtype=self.dtype,
            quantization=model.engine.quantization,
            is_prequantized=checkpoint.scheme is not None,
            num_ranks=model.engine.tensor_parallel_size,
            limits=build.limits,
            plugin=self._plugin(build) if model.folder == "target" else None,
        )

    def _plugin(self, build: "Build") -> LoosePlugin | None:
        vocab_size, stops = build.model.engine.vocab_size, build.head.stop_token_ids
        policy = self._policy(vocab_size)
        if policy is None:
            return None
        if len(stops) > MAX_STOP_TOKENS:
            raise ConfigError(
                f"{build.model.checkpoint.name}: {len(stops)} stop tokens, and the plugin holds {MAX_STOP_TOKENS}: "
                "shorten eos_token_id in its generation_config.json"
            )
        return LoosePlugin(policy, self.recipe.entropy_top_k, vocab_size, stops)

    def library_versions(self) -> dict[str, str]:
        return {"tensorrt_llm": str(installed_version()), "tensorrt": import_library("tensorrt").version}

    @staticmethod
    def step_costs(manifest: Manifest, directory: Path) -> tuple[float, float]:
        return estimate_costs(manifest)


def _folder(checkpoint: "Checkpoint") -> Path:
    """TensorRT-LLM reads folders; what is on the hub is fetched into the cache that all share."""
    folder = Path(checkpoint.name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(checkpoint.name, revision=checkpoint.revision))
