"""TensorRT-LLM's PyTorch backend: nothing is compiled. What comes out is what its server and its LLM API are started
from, with checkpoints left where they are; FLy is put into its worker processes by fly_trt.

It knows the recipe and the YAML; which of TensorRT-LLM's modes take FLy says fly_trt.integrations.tensorrt_llm.modes.
"""

import importlib.metadata
import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fly_build import tensorrt_llm_files as files
from fly_build.backends.base import Backend
from fly_build.schema import Recipe
from fly_trt.errors import CheckpointError, ConfigError
from fly_trt.integrations.tensorrt_llm.environment import Acceptance
from fly_trt.integrations.tensorrt_llm.modes import RELEASES, Release, release_of
from fly_trt.manifest import Dtype, Head, Limits, Manifest, ModelEngine, Quantization
from fly_trt.params import SpeculativeConfig
from fly_trt.verification import FlyPolicy

if TYPE_CHECKING:
    from fly_build.checkpoint import Checkpoint
    from fly_build.gpu_memory import GpuPlan
    from fly_build.plan import ModelPlan
    from fly_build.progress import Report

DISTRIBUTION = "tensorrt-llm"
NEWEST = "1.3"
DEFAULT_MAX_NUM_TOKENS = 8192  # TensorRT-LLM's own
PRESET_TOP_K = 3
COSTS = ("draft_token_cost", "verification_token_cost")
# Of `speculative`: the rest says how our own runtime drafts and decides, which does not run here.
SPECULATIVE_FIELDS = (
    "method", "num_speculative_tokens", "acceptance", "preset", "fly_entropy_threshold", "fly_window_size"
)  # fmt: skip
# Quantised checkpoints that its loader reads; 1.2 reads fp8 in blocks alone.
METHODS: dict[Release, tuple[str, ...]] = {
    "1.2": ("modelopt", "fp8"),
    "main": ("modelopt", "fp8", "compressed-tensors"),
}

logger = logging.getLogger(__name__)


def installed_version() -> str | None:
    """Of tensorrt_llm in this environment. Importing it would take long, and load CUDA."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def _acceptance_of(recipe: Recipe, stop_token_ids: list[int]) -> Acceptance | None:
    """FLy as the recipe has it; None for exact acceptance."""
    settings = SpeculativeConfig.from_dict({"acceptance": "fly"} | recipe.speculative)
    if settings.acceptance == "exact":
        return None
    return Acceptance(settings.preset, settings.fly_entropy_threshold, settings.fly_window_size, tuple(stop_token_ids))


def check_acceptance(recipe: Recipe, known: tuple[str, ...], methods: tuple[str, ...]) -> None:
    """Raises ConfigError for settings of `speculative` that TensorRT-LLM cannot be given. Costs say what a pair is
    like, and change nothing there."""
    if unknown := [name for name in recipe.speculative if name not in (*known, *COSTS)]:
        raise ConfigError(
            f"speculative.{unknown[0]}: TensorRT-LLM drafts by itself, and can be told {', '.join(known)}: leave it out"
        )
    settings = SpeculativeConfig.from_dict(recipe.speculative)
    if "method" in recipe.speculative and settings.method not in methods:
        raise ConfigError(
            f"speculative.method {settings.method!r}: backend {recipe.backend} has {' and '.join(methods)}: use that"
        )
    if settings.acceptance not in ("fly", "exact"):
        raise ConfigError(
            f"speculative.acceptance {settings.acceptance!r}: TensorRT-LLM has fly and exact: use one of them"
        )


def check_models(recipe: Recipe) -> None:
    """Raises ConfigError for drafts that TensorRT-LLM has no place for."""
    if recipe.inner_draft is not None:
        raise ConfigError(f"inner_draft: backend {recipe.backend} has no chains: leave --inner-draft out")
    if recipe.self_draft is not None:
        raise ConfigError(f"self_draft: backend {recipe.backend} makes none: leave it out, and add --draft")


def check_drafts(recipe: Recipe) -> None:
    """Raises ConfigError for steps without drafts, which TensorRT-LLM refuses when it is started or built."""
    if recipe.max_draft_len == 0:
        raise ConfigError(
            f"max_draft_len 0: backend {recipe.backend} has no steps without drafts, and FLy nothing to accept there: "
            "use --max-draft-len 1 or more"
        )


def warn_of_short_drafts(name: str, num_draft_tokens: int, policy: FlyPolicy | None) -> None:
    if policy is not None and num_draft_tokens <= (least := max(policy.window, policy.lookahead)):
        logger.warning(
            "%s %d: FLy loosens a token that %d more of its draft follow, so here it never will: draft at least %d, or "
            "choose another window",
            name,
            num_draft_tokens,
            least,
            least + 1,
        )


def location(checkpoint: "Checkpoint") -> str:
    """Where TensorRT-LLM finds it, whatever its working directory is: an absolute folder, or a hub id."""
    folder = Path(checkpoint.name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else checkpoint.name


class TensorRTLlmBackend(Backend):
    default_dtype = "bfloat16"
    own_fields = ("tensorrt_llm_release", "speculative_mode")
    quantizations = ("none", "int8", "int4", "fp8")
    model_file = files.YAML_FILE
    spans_gpus = True
    exports = False

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        check_models(recipe)
        check_drafts(recipe)
        check_acceptance(recipe, SPECULATIVE_FIELDS, ("draft_model",))
        mode = recipe.speculative_mode or "draft_target"
        files.check_drafting(mode, recipe.draft.checkpoint if recipe.draft else None)
        if recipe.draft is not None and recipe.draft.revision is not None:
            raise ConfigError(
                f"draft_revision {recipe.draft.revision!r}: TensorRT-LLM's speculative_config has no revision: give a "
                "folder that holds it"
            )
        if "draft_tp_size" in recipe.model_fields_set and recipe.draft_tp_size != recipe.tp_size:
            raise ConfigError(
                f"draft_tp_size {recipe.draft_tp_size}: the draft is a part of the target's model in TensorRT-LLM's "
                f"PyTorch backend, on all of its {recipe.tp_size} GPUs: leave it out"
            )
        if recipe.entropy_top_k != PRESET_TOP_K:
            raise ConfigError(
                f"entropy_top_k {recipe.entropy_top_k}: FLy in TensorRT-LLM's PyTorch backend has its presets' "
                f"{PRESET_TOP_K}: leave it out"
            )
        if recipe.dtype == "float32":
            raise ConfigError("dtype 'float32': TensorRT-LLM's kernels have 16 bits: use bfloat16 or float16")

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.release = _release(recipe)
        self.mode = recipe.speculative_mode or "draft_target"
        settings = SpeculativeConfig.from_dict(recipe.speculative)
        asked = "num_speculative_tokens" in recipe.speculative
        self.num_draft_tokens = (
            settings.num_speculative_tokens if asked else min(settings.num_speculative_tokens, recipe.max_draft_len)
        )
        # Refuses a mode that does not take FLy there, before a checkpoint is looked for.
        self._serving("", None, None, Limits.model_construct(max_batch_size=1, max_seq_len=1, max_num_tokens=1))

    def _serving(self, target: str, revision: str | None, draft: str | None, limits: Limits) -> files.Serving:
        serving = files.Serving(
            release=self.release,
            mode=self.mode,
            target=target,
            revision=revision,
            draft=draft,
            num_draft_tokens=self.num_draft_tokens,
            dtype=self.dtype,
            tensor_parallel_size=self.recipe.tp_size,
            max_batch_size=limits.max_batch_size,
            max_seq_len=limits.max_seq_len,
            max_num_tokens=limits.max_num_tokens,
        )
        serving.speculative_config()
        return serving

    @property
    def kv_cache_dtype(self) -> Dtype:
        return self.dtype

    @property
    def draft_ranks(self) -> int:
        """The draft is a part of the target's model there, on the same ranks."""
        return self.recipe.tp_size

    @classmethod
    def model_files(cls, folder: str, num_ranks: int) -> list[str]:
        return [cls.model_file] * num_ranks

    def check_checkpoints(self, target: "Checkpoint", drafts: "list[Checkpoint]") -> None:
        if self.mode not in files.HEAD_MODES:
            super().check_checkpoints(target, drafts)
        for checkpoint in (target, *drafts):
            self._check_quantization(checkpoint)
        for draft in drafts:
            is_head = "eagle3" in draft.architecture.lower()
            if is_head and self.mode != "eagle3":
                raise CheckpointError(
                    f"{draft.name}: {draft.architecture} is an EAGLE3 head: add --speculative-mode eagle3"
                )

    def _check_quantization(self, checkpoint: "Checkpoint") -> None:
        asked, scheme = self.recipe.quantization, checkpoint.scheme
        if scheme is None and asked != "none":
            raise ConfigError(
                f"quantization {asked!r}: TensorRT-LLM's PyTorch backend rounds no weights, and {checkpoint.name} is "
                "not quantised: give a checkpoint that is (such as ModelOpt's FP8), or add --engine for int8 and int4"
            )
        if scheme is not None and scheme.method not in METHODS[self.release]:
            raise CheckpointError(
                f"{checkpoint.name}: quantised by {scheme.method}, and TensorRT-LLM {self.release} reads "
                f"{', '.join(METHODS[self.release])}: give one of those, or the original"
            )

    def kv_cache_quantization(self, checkpoint: "Checkpoint") -> Literal["none", "fp8"]:
        """`kv_cache_config.dtype: auto` follows the checkpoint."""
        return follows_checkpoint(checkpoint)

    def fit_limits(self, limits: Limits) -> Limits:
        policy = None if (rule := _acceptance_of(self.recipe, [])) is None else rule.policy(2)
        warn_of_short_drafts("num_speculative_tokens", self.num_draft_tokens, policy)
        given = "max_num_tokens" in self.recipe.model_fields_set
        least = limits.max_batch_size * (self.num_draft_tokens + 1)
        if not files.chunks_prompts(self.release):
            least = max(least, limits.max_seq_len)  # a prompt is read in one step
        most = limits.max_num_tokens if given else DEFAULT_MAX_NUM_TOKENS
        return limits.model_copy(update={"max_draft_len": self.num_draft_tokens, "max_num_tokens": max(most, least)})

    def cache_tokens(self, limits: Limits) -> int:
        return paged_tokens(limits)

    def plan_gpus(self, models: "list[ModelPlan]", limits: Limits) -> "list[GpuPlan]":
        return plan_paged(models, limits)

    def bits_per_weight(self, quantization: Quantization) -> tuple[float, float] | None:
        return 16, 16  # quantised checkpoints say what theirs are

    def commands(self, models: "list[ModelPlan]", limits: Limits, head: Head, output: Path) -> list[str]:
        target = location(models[0].checkpoint)
        acceptance = _acceptance_of(self.recipe, head.stop_token_ids)
        variables = {} if acceptance is None else acceptance.to_environment()
        environment = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
        folder = shlex.quote(str(output))
        return [
            f"{folder}/{files.SERVE_FILE} --host 0.0.0.0 --port 8000",
            f"{environment}{files.serve_command(target, f'{folder}/{files.YAML_FILE}')}",
            f"{folder}/{files.TRITON_FILE} LLMAPI_MODELS",
        ]

    def build_models(
        self, models: "list[ModelPlan]", limits: Limits, head: Head, workspace: Path, report: "Report"
    ) -> dict[str, ModelEngine]:
        report("write", 0.0)
        target, *drafts = models
        names = {model.folder: location(model.checkpoint) for model in models}
        serving = self._serving(names["target"], target.checkpoint.revision, names.get("draft"), limits)
        arguments = serving.llm_args()
        acceptance = _acceptance_of(self.recipe, head.stop_token_ids)
        texts = {
            files.YAML_FILE: files.to_yaml(arguments),
            files.TRITON_YAML_FILE: files.to_yaml(arguments | {"triton_config": files.TRITON_CONFIG}),
            files.SERVE_FILE: files.serve_script(names["target"], names.get("draft"), acceptance),
            files.TRITON_FILE: files.triton_script(names["target"], names.get("draft"), acceptance),
        }
        for name, text in texts.items():
            (workspace / name).write_text(text, encoding="utf-8")
            if name.endswith(".sh"):
                os.chmod(workspace / name, 0o755)
        report("write", 1.0)
        return {model.folder: at_location(model) for model in (target, *drafts)}

    def speculative(self) -> dict[str, Any]:
        """Of our names for what drafts, the one that is true of it: what needs no draft model copies or guesses."""
        has_draft = self.recipe.draft is not None
        usual = {"method": "draft_model"} if has_draft else {"method": "ngram", "acceptance": "fly"}
        return usual | {"num_speculative_tokens": self.num_draft_tokens} | self.recipe.speculative

    def library_versions(self) -> dict[str, str]:
        """What serves it; the one that it is written for where that is not this environment's."""
        return {"tensorrt_llm": self.recipe.tensorrt_llm_release or installed_version() or NEWEST}

    @staticmethod
    def step_costs(manifest: Manifest, directory: Path) -> None:
        """TensorRT-LLM asks no one when to draft."""


def at_location(model: "ModelPlan") -> ModelEngine:
    """The record of a model, with its checkpoint where it is found from any working directory."""
    source = model.engine.source.model_copy(update={"checkpoint": location(model.checkpoint)})
    return model.engine.model_copy(update={"source": source})


def follows_checkpoint(checkpoint: "Checkpoint") -> Literal["none", "fp8"]:
    """How the KV cache is quantised where the checkpoint says it."""
    scheme = checkpoint.scheme
    return "fp8" if scheme is not None and scheme.kv_cache_algorithm == "FP8" else "none"


def paged_tokens(limits: Limits) -> int:
    """Tokens of cache that a sequence of the greatest length takes, in whole blocks, with the drafts behind it."""
    blocks = -(-(limits.max_seq_len + limits.max_draft_len) // files.TOKENS_PER_BLOCK)
    return blocks * files.TOKENS_PER_BLOCK


def plan_paged(models: "list[ModelPlan]", limits: Limits) -> "list[GpuPlan]":
    from fly_build.gpu_memory import plan_paged_gpus

    for model in models:
        if not model.checkpoint.has_known_sizes:
            logger.warning(
                "%s: how TensorRT-LLM spreads a %s over GPUs is not known here: no memory is planned",
                model.checkpoint.name,
                model.checkpoint.config.model_type,
            )
            return []
    return plan_paged_gpus(models, limits, paged_tokens(limits))


def _release(recipe: Recipe) -> Release:
    if recipe.tensorrt_llm_release is not None:
        return RELEASES[recipe.tensorrt_llm_release]
    version = installed_version()
    return RELEASES[NEWEST] if version is None else release_of(version)
