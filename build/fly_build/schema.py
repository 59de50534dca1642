"""What a recipe says: its fields, their types and defaults. Whether they go together is recipe.py's to check."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from fly_trt.manifest import Device, Dtype, Quantization, TensorRTLibrary

TP_SIZES = 2, 4, 8
TensorRTLlmRelease = Literal["1.2", "1.3"]
SpeculativeMode = Literal["draft_target", "eagle3", "mtp", "pard", "dflash", "sa"]


class ModelSource(BaseModel):
    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    revision: str | None = None


class StepTimes(BaseModel):
    """What the parts of a target step of one token take, in any one unit: one attention (and what each 1,000 tokens in
    the cache add), one MLP, the vocabulary projection with what else every step has; and what each further token of a
    step adds, in steps of one token."""

    model_config = ConfigDict(extra="forbid")

    attention: float = Field(gt=0)
    attention_per_1000_tokens: float = Field(default=0.0, ge=0)
    mlp: float = Field(gt=0)
    head: float = Field(default=0.0, ge=0)
    further_token: float = Field(default=0.0, ge=0)


class SelfDraftSettings(BaseModel):
    """A draft made of the target's own layers. calibrate: a file of text, None for the built-in one; contexts: tokens,
    one draft is chosen for each, None means 512 or half of max_seq_len; step_times: None means measured on the machine
    that builds."""

    model_config = ConfigDict(extra="forbid")

    calibrate: str | None = None
    contexts: list[Annotated[int, Field(gt=0)]] | None = Field(default=None, min_length=1)
    step_times: StepTimes | None = None


class ChainSettings(BaseModel):
    """What says whether the inner draft shall guess for the draft, and how many tokens at a time: how often a token of
    the draft is the target's, and one of the inner draft the draft's. None means measured, where the engines run on the
    machine that builds, on what the target writes after the prompts of `calibrate`, or the built-in ones."""

    model_config = ConfigDict(extra="forbid")

    draft_acceptance: float | None = Field(default=None, ge=0, le=1)
    inner_draft_acceptance: float | None = Field(default=None, ge=0, le=1)
    calibrate: str | None = None


class Recipe(BaseModel):
    """One engine directory. `backend` is a name of fly_build.backends.BACKENDS, and `device` one that it has, None the
    usual one; `max_seq_len` None means what both
    checkpoints support, at most 8192 tokens; `dtype` None means the backend's default; `self_draft` is instead of
    `draft`; `inner_draft` guesses for `draft`, and `chain` says when.

    cpu_kernels, of ONNX Runtime on the CPU: "auto" (None is the same) compiles the library of plugins/cpu where there
    is a compiler for it, "off" goes without, and anything else is the file of a compiled one.

    Of TensorRT alone: which of its two libraries (None: the first that is installed), the plugin library whose kernels
    the head shall use (None: the graph's own functions), where kernel timings are kept between builds, and over how
    many GPUs of one machine the target is spread, and the draft: that one runs on all of them, or on the first, as an
    inner draft does.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    target: ModelSource
    draft: ModelSource | None = None
    inner_draft: ModelSource | None = None
    chain: ChainSettings = ChainSettings()
    self_draft: SelfDraftSettings | None = None
    backend: str = "onnxruntime"
    device: Device | None = None
    dtype: Dtype | None = None
    quantization: Quantization = "none"
    tensorrt_library: TensorRTLibrary | None = None
    plugin_library: str | None = None
    cpu_kernels: str | None = None
    timing_cache: str | None = None
    tensorrt_llm_release: TensorRTLlmRelease | None = None
    speculative_mode: SpeculativeMode | None = None
    tp_size: int = 1
    draft_tp_size: int = 1
    max_batch_size: int = Field(default=8, gt=0)
    max_seq_len: int | None = Field(default=None, gt=0)
    max_draft_len: int = Field(default=32, ge=0)
    max_num_tokens: int = Field(default=512, gt=0)
    entropy_top_k: int = Field(default=3, gt=0)
    speculative: dict[str, Any] = Field(default_factory=dict)
    _file: str | None = PrivateAttr(default=None)

    @property
    def file(self) -> str | None:
        """The YAML file that it was read from; None where it was made of flags alone."""
        return self._file

    def read_from(self, file: str) -> "Recipe":
        """The same recipe, of this file."""
        copy = self.model_copy()
        copy._file = file
        return copy
