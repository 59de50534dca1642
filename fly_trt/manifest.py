"""The engine directory and its manifest `fly.json`: what was built, from what, with which limits.

fly-build writes it, every engine reads it. It knows files, sizes and hashes, and nothing about models or backends.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fly_trt.errors import EngineError
from fly_trt.files import new_file

SCHEMA_VERSION = 1
MANIFEST_NAME = "fly.json"
HASH_BLOCK_BYTES = 1 << 22

Dtype = Literal["float32", "float16", "bfloat16"]
Quantization = Literal["none", "int8", "int4", "fp8"]
Device = Literal["cpu", "cuda"]
TensorRTLibrary = Literal["tensorrt", "tensorrt_rtx"]


def _inside(name: str) -> str:
    """A name that stays in its directory on every system, as the directory may come from another one."""
    parts = name.split("/")
    if "\\" in name or "\0" in name or PureWindowsPath(name).drive or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} may lie outside the engine directory, expected a path such as target/model.onnx")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
"""A file of the engine directory: a relative POSIX path without '..'."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Record):
    """Sizes that the engines were built for, in rows, tokens per sequence, draft tokens per step, tokens per step."""

    max_batch_size: int = Field(gt=0)
    max_seq_len: int = Field(gt=0)
    max_draft_len: int = Field(ge=0)
    max_num_tokens: int = Field(gt=0)

    @model_validator(mode="after")
    def _step_holds_drafts_and_context(self) -> Self:
        if self.max_num_tokens <= self.max_draft_len:
            raise ValueError(
                f"max_num_tokens {self.max_num_tokens} must be more than max_draft_len {self.max_draft_len}"
            )
        return self


class Head(_Record):
    """What the verification head computes. Stop tokens are never loosened. With `top_tokens` it says which tokens the
    entropy_top_k most probable are, too, and with `positions` the engines speak of those positions of a step that they
    are asked of: fly-build writes both, and directories that were built before have none."""

    entropy_top_k: int = Field(gt=0)
    stop_token_ids: list[int]
    top_tokens: bool = False
    positions: bool = False


class Source(_Record):
    """The checkpoint that an engine was built from."""

    checkpoint: str
    revision: str | None = None
    architecture: str
    num_parameters: int


class LayerSummary(_Record):
    """Layers of a TensorRT network before the builder fuses them. Attention is native where a dedicated kernel computes
    it, decomposed where the builder or the graph writes it out as matrix products and a softmax. A collective is what
    all ranks of a sharded model do together in a step."""

    total: int
    native_attention: int
    decomposed_attention: int
    kv_cache_update: int
    plugin: int
    collective: int = 0


class TensorRTPlan(_Record):
    """What a serialised TensorRT engine fits to, and how it was built.

    `compute_capability` is that of the one GPU that it runs on ("9.0") or, for tensorrt_rtx, of the oldest ("8.0").
    A slot has `cache_tokens` tokens of cache. Steps of several rows have at most `max_row_tokens` tokens a row. The
    verification head is made of plugins or of the graph's own functions; `plugin_library` lies in the engine directory.
    """

    library: TensorRTLibrary
    version: str
    compute_capability: str
    cache_tokens: int = Field(gt=0)
    max_row_tokens: int = Field(gt=0)
    head: Literal["plugins", "functions"]
    plugin_library: FileName | None
    layers: LayerSummary


class ModelEngine(_Record):
    """One decoder graph. `dtype` is the type of the stored weights, `kv_cache_dtype` that of the cache tensors, or of
    what `kv_cache_quantization` rounds. `cpu_kernels` is the library of the operators that its graph has beside those
    of ONNX Runtime (domain fly.cpu), for the CPU. `rollout` is a second graph of a draft model, with the same weights:
    several greedy steps in one call.

    A model that is sharded over several GPUs (tensor parallelism) has a file a rank: `model` is rank 0's, and
    `other_ranks` has those of ranks 1 and up. `num_kv_heads` is the whole model's.
    """

    model: FileName
    other_ranks: list[FileName] = []
    source: Source
    vocab_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    dtype: Dtype
    quantization: Quantization
    kv_cache_dtype: Dtype
    kv_cache_quantization: Literal["none", "fp8"] = "none"
    tensorrt: TensorRTPlan | None = None
    cpu_kernels: FileName | None = None
    rollout: FileName | None = None

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks, a GPU each."""
        return 1 + len(self.other_ranks)

    @property
    def rank_kv_heads(self) -> int:
        """KV heads in the cache of one rank; where there are fewer than ranks, several ranks have the same one."""
        return max(1, self.num_kv_heads // self.tensor_parallel_size)

    def kv_bytes_per_token(self) -> int:
        """Of the cache of one rank."""
        width = 1 if self.kv_cache_quantization == "fp8" else 4 if self.kv_cache_dtype == "float32" else 2
        return 2 * self.num_layers * self.rank_kv_heads * self.head_dim * width


class SelfDraft(_Record):
    """A draft made of some of the target's own blocks, with weights in the target's file, for sequences that begin with
    `min_tokens` tokens or more. kept_attentions, kept_mlps: the layers of the target whose blocks it has. agreement:
    how often its next token was the target's, on calibration text. draft_length, tokens_per_step_time: what was
    expected of it at best, draft tokens a round and tokens in the time of one target step of one token.
    """

    min_tokens: int = Field(ge=0)
    kept_attentions: list[int]
    kept_mlps: list[int]
    agreement: float
    draft_length: int = Field(gt=0)
    tokens_per_step_time: float
    engine: ModelEngine


class Chain(_Record):
    """What was expected of the inner draft's guesses when the engine was built: how often a token of the draft is the
    target's, and one of the inner draft the draft's; how many tokens it guesses at a time; and tokens in the time of
    one target step of one token, with its guesses and without."""

    draft_acceptance: float
    inner_draft_acceptance: float
    num_tokens: int = Field(gt=0)
    tokens_per_step_time: float
    tokens_per_step_time_without: float


class File(_Record):
    size: int
    sha256: str


class Tuning(_Record):
    """Why the engine's defaults are what they are: what fly-tune claims of them, and from what.

    With `confidence`, outputs keep at least `lower_bound` of the target's quality, where `min_retention` was asked for
    and `retention` is the estimate; all four are fractions. judged_by: where quality came from, "checks",
    "references", "command" or "agreement", on `num_prompts` prompts of a file with `prompts_sha256`, in an order that
    `seed` fixed. speedup_over_plain, speedup_over_default: tokens per second over those of plain decoding, and of the
    defaults before, on `machine`. version: of the fly-trt that measured.
    `write_tuning` fills in the rest: `setting`, which the claim is about, everything that `speculative` held then;
    `previous`, what it held as built; `engine_sha256`, the content of the engine's files.
    """

    min_retention: float = Field(ge=0, le=1)
    confidence: float = Field(gt=0, lt=1)
    retention: float = Field(ge=0)
    lower_bound: float = Field(ge=0)
    judged_by: str
    num_prompts: int = Field(gt=0)
    prompts_sha256: str
    seed: int
    speedup_over_plain: float = Field(gt=0)
    speedup_over_default: float = Field(gt=0)
    machine: str
    date: datetime.date
    version: str
    setting: dict[str, Any] = {}
    previous: dict[str, Any] = {}
    engine_sha256: str = ""


class Manifest(_Record):
    """`fly.json`. `backend` is the name of what runs the engines, known or not to who reads it, and `device` what they
    run on (None in directories of older versions, whose backend says it); `speculative` holds the defaults for
    SpeculativeConfig, of the recipe or since fly-tune wrote its own those that `tuning` is the evidence for;
    `self_drafts` are in the order of their min_tokens, which begin at 0; `inner_draft` guesses for the draft, as
    `chain` says; `files` are all that engines are loaded from."""

    schema_version: int
    backend: str
    device: Device | None = None
    name: str
    fly_trt_version: str
    library_versions: dict[str, str]
    limits: Limits
    head: Head
    speculative: dict[str, Any]
    target: ModelEngine
    draft: ModelEngine | None
    self_drafts: list[SelfDraft] = []
    inner_draft: ModelEngine | None = None
    chain: Chain | None = None
    tuning: Tuning | None = None
    files: dict[FileName, File]

    @model_validator(mode="after")
    def _lists_what_it_loads(self) -> Self:
        drafts = (self.draft, self.inner_draft, *(draft.engine for draft in self.self_drafts))
        for engine in filter(None, (self.target, *drafts)):
            plugins = engine.tensorrt.plugin_library if engine.tensorrt else None
            for name in filter(None, (engine.model, *engine.other_ranks, plugins, engine.cpu_kernels, engine.rollout)):
                if name not in self.files:
                    raise ValueError(f"{name!r} is not among the files that it lists")
        return self

    def engine_sha256(self) -> str:
        """One hash for the content of all files that engines are loaded from."""
        lines = sorted(f"{name} {file.size} {file.sha256}\n" for name, file in self.files.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def hash_file(path: Path) -> File:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return File(size=path.stat().st_size, sha256=digest.hexdigest())


def hash_directory(directory: Path) -> dict[str, File]:
    """Size and sha256 of every file below `directory` but the manifest, by relative POSIX path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {path.relative_to(directory).as_posix(): hash_file(path) for path in paths}


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """The one that is there, if any, is replaced as a whole."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2)
    with new_file(directory / MANIFEST_NAME) as path:
        path.write_text(text + "\n", encoding="utf-8")


def write_tuning(engine_dir: Path, settings: Mapping[str, Any], tuning: Tuning) -> Manifest:
    """Makes `settings`, all of them, the engine's defaults for SpeculativeConfig, with `tuning` as the evidence, and
    returns the new manifest. What runs goes on as it was loaded. Raises EngineError for a directory that is no engine,
    with a file of another content than the manifest says."""
    before = read_manifest(engine_dir, verify_hashes=True)
    evidence = {
        "setting": dict(settings),
        "previous": before.speculative if before.tuning is None else before.tuning.previous,
        "engine_sha256": before.engine_sha256(),
    }
    changes = {"speculative": dict(settings), "tuning": tuning.model_copy(update=evidence)}
    write_manifest(before.model_copy(update=changes), engine_dir)
    return read_manifest(engine_dir)


def read_manifest(directory: Path, *, verify_hashes: bool = False) -> Manifest:
    """Reads and checks `directory`/fly.json and the presence and size of every file that it lists.

    Raises EngineError when the directory is missing, not an engine, truncated, of another schema version, or names or
    links to files outside itself; with `verify_hashes` also when the content of a file changed.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise EngineError(f"{directory}: no such engine directory: build one with fly-build -o {directory}")
    if not path.is_file():
        raise EngineError(f"{directory}: not an engine directory, it has no {MANIFEST_NAME}: build one with fly-build")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError(f"{path}: not a readable manifest ({error}): rebuild the engine with fly-build") from None
    if version != SCHEMA_VERSION:
        fix = "upgrade fly-trt" if isinstance(version, int) and version > SCHEMA_VERSION else "rebuild with fly-build"
        raise EngineError(f"{path}: schema version {version}, this fly-trt reads version {SCHEMA_VERSION}: {fix}")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "files"
        if first["type"] == "extra_forbidden":
            raise EngineError(
                f"{path}: field {field}: not known to this fly-trt: upgrade it, or rebuild the engine with fly-build"
            ) from None
        raise EngineError(f"{path}: field {field}: {first['msg']}: rebuild the engine with fly-build") from None
    for name, expected in manifest.files.items():
        _check_file(directory, name, expected, verify_hashes)
    return manifest


def _check_file(directory: Path, name: str, expected: File, verify_hash: bool) -> None:
    path = directory / name
    if not path.is_file():
        raise EngineError(f"{path}: file is missing: copy the whole engine directory or rebuild it with fly-build")
    if not (actual := path.resolve()).is_relative_to(directory.resolve()):
        raise EngineError(f"{path}: a link to {actual}, outside the engine directory: replace it by the file itself")
    size = path.stat().st_size
    if size != expected.size:
        raise EngineError(
            f"{path}: {size} bytes, the manifest says {expected.size}: truncated, copy it again or rebuild"
        )
    if verify_hash and hash_file(path).sha256 != expected.sha256:
        raise EngineError(f"{path}: content differs from the manifest's sha256: copy it again or rebuild")
