"""A Hugging Face checkpoint: its configuration, whether it can be exported, its tokenizer, and at last its weights.

Everything but `load_weights` works from the configuration alone, so what cannot be built is refused before a weight
is read. Local folders and hub ids are the same to transformers, and so they are here.
"""

import copy
import importlib
import json
import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from fly_build.fields import refused_fields, rope_parameters, warn_of_unread_fields
from fly_build.operators import ATTENTION_NAME
from fly_build.quantized_checkpoint import read_scheme
from fly_build.quantized_layouts import Scheme
from fly_build.tensors import OUTPUT_NAME, Tensors, first_line, load_quantized, load_tensors
from fly_build.tokenizer import load_tokenizer, splits_alike
from fly_trt.errors import CheckpointError

logger = logging.getLogger(__name__)

transformers_logging.set_verbosity_error()  # errors are raised as one line
transformers_logging.disable_progress_bar()  # fly-build shows its own

# Each of these is exported and compared with transformers in tests/build/test_architectures.py.
SUPPORTED_MODEL_TYPES = (
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
ALIBI_MODEL_TYPES = ("bloom", "mpt")
STATE_SPACE_WORDS = ("mamba", "rwkv", "ssm", "recurrent", "linear_attention", "conv", "jamba", "zamba")
ADAPTER_CONFIG = "adapter_config.json"
NO_FILE = "does not appear to have a file named"  # what transformers says of a repository that it could read
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Checkpoint:
    """`name` is a folder or a hub id; `config` is the transformers configuration, as of the model before it was
    quantised; `scheme` says how its linear layers are."""

    name: str
    revision: str | None
    config: Any
    scheme: Scheme | None = None

    @property
    def architecture(self) -> str:
        named = self.config.architectures
        is_named = isinstance(named, list) and named and isinstance(named[0], str)
        return named[0] if is_named else type(self.config).__name__

    @property
    def head_dim(self) -> int:
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads

    @property
    def is_mixture_of_experts(self) -> bool:
        return any(getattr(self.config, name, None) for name in ("num_local_experts", "num_experts"))

    @property
    def has_known_sizes(self) -> bool:
        """Whether the parts of its parameters that ranks have are known, by name (sharding.py), in every transformers
        that this runs with."""
        return self.config.model_type in SUPPORTED_MODEL_TYPES and not self.is_mixture_of_experts

    @property
    def max_seq_len(self) -> int:
        """The longest sequence whose positions the graph computes as transformers does."""
        rope = rope_parameters(self.config)
        if any(parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE for parameters in rope):
            originals = [parameters.get("original_max_position_embeddings") for parameters in rope]
            original = getattr(self.config, "original_max_position_embeddings", None) or next(
                filter(None, originals), None
            )
            if original:
                return int(original)
        return int(self.config.max_position_embeddings)

    @cached_property
    def empty_model(self) -> Any:
        return self.make_empty_model(torch.float32)

    @cached_property
    def outline(self) -> Any:
        """The model's names and shapes alone: even the address space of a machine is smaller than some models."""
        with torch.device("meta"):
            return self.make_empty_model(torch.float32, is_traced=False)

    @cached_property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters, by name, as if none were tied."""
        return {name: tuple(parameter.shape) for name, parameter in self.outline.named_parameters()}

    def make_empty_model(self, dtype: torch.dtype, *, is_traced: bool = True) -> Any:
        """The model with its structure but no values: parameters are allocated and never touched, so they cost
        address space and no memory. Buffers such as rotary frequencies are real, and float32 in any dtype. No
        parameters are tied: whether they are, the weights say."""
        # Of transformers' ways to run a mixture of experts, the one that has an ONNX form.
        experts = {"experts_implementation": "batched_mm"} if self.is_mixture_of_experts and is_traced else {}
        config = copy.deepcopy(self.config)
        config.tie_word_embeddings = config.output_hidden_states = config.output_router_logits = False
        config.return_dict = True
        try:
            with _no_init_weights():
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=ATTENTION_NAME, **experts
                )
        except Exception as error:  # whatever a wrong field causes, such as an unknown rope type or activation
            raise CheckpointError(
                f"{self.name}: transformers cannot make the model of this config.json: {first_line(error)}"
            ) from None
        return model.eval().requires_grad_(False)

    @cached_property
    def num_parameters(self) -> int:
        """As the configuration ties them."""
        shapes = self.parameter_shapes
        tied = math.prod(shapes[OUTPUT_NAME]) if self.config.tie_word_embeddings else 0
        return sum(math.prod(shape) for shape in shapes.values()) - tied

    def load_weights(self) -> Tensors:
        """All parameters, see `tensors.load_tensors` and `tensors.load_quantized`."""
        if self.scheme is None:
            return load_tensors(self.name, self.revision)
        is_tied = self.config.tie_word_embeddings
        return load_quantized(self.name, self.revision, self.scheme, self.outline, is_tied=is_tied)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """See `tokenizer.load_tokenizer`."""
        return load_tokenizer(self.name, self.revision)

    def load_generation_config(self) -> GenerationConfig:
        try:
            config = GenerationConfig.from_pretrained(self.name, revision=self.revision or "main")
            _ids(config.eos_token_id)
        except Exception as error:  # whatever a wrong file causes
            if isinstance(error, OSError) and not (Path(self.name) / "generation_config.json").is_file():
                return GenerationConfig.from_model_config(self.config)
            raise CheckpointError(f"{self.name}: no usable generation_config.json: {first_line(error)}") from None
        return config


def _no_init_weights() -> Any:
    try:
        module = importlib.import_module("transformers.initialization")
    except ImportError:  # transformers 4, which TensorRT-LLM's own environment has
        module = importlib.import_module("transformers.modeling_utils")
    return module.no_init_weights()


def open_checkpoint(
    name: str, revision: str | None = None, *, needs_weights: bool = True, is_exported: bool = True
) -> Checkpoint:
    """Reads the configuration and refuses, with the reason, what cannot be exported, unless another library reads the
    model itself (`is_exported`). Raises CheckpointError. Weights are not read; `needs_weights`: that a folder has some
    is checked."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (base := _adapted_model(str(folder), None)) is not None:
            if not _is_whole_model(folder):
                raise CheckpointError(f"{name}: {_merge(base)}")
            logger.warning(
                "%s: %s (of %s) is not used: the folder has a whole model",
                name,
                ADAPTER_CONFIG,
                base or "another model",
            )
    else:
        _check_hub_id(name, revision)
    source = str(folder) if folder.is_dir() else name
    try:
        # Without trust_remote_code=False transformers asks on the terminal whether to run a repository's own code.
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever a wrong field causes
        if folder.is_dir():
            raise CheckpointError(f"{name}: no usable config.json: {first_line(error)}") from None
        if NO_FILE in str(error) and (base := _adapted_model(name, revision)) is not None:
            raise CheckpointError(f"{name}: {_merge(base)}") from None
        raise CheckpointError(
            f"{name}: no such folder, and no usable config.json of a hub model of that name: {first_line(error)}"
        ) from None
    if is_exported and (reason := refusal(config)):
        raise CheckpointError(f"{name}: {reason}")
    if (scheme := read_scheme(source, revision, config, is_exported=is_exported)) is not None:
        # transformers would ask for the library that quantised it.
        vars(config).pop("quantization_config", None)
    if is_exported:
        warn_of_unread_fields(name, config)
    if needs_weights and folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{name}: no *.safetensors file: save the checkpoint with safe_serialization=True")
    checkpoint = Checkpoint(source, revision, config, scheme)
    if is_exported and scheme is not None and checkpoint.is_mixture_of_experts:
        raise CheckpointError(
            f"{name}: quantised by {scheme.method}: experts of a mixture are not read quantised: give the original"
        )
    return checkpoint


def _check_hub_id(name: str, revision: str | None) -> None:
    """A path that is no folder must look like org/model. Where `org` is a folder here, it is a mistyped path, unless a
    revision says that the hub is meant: asking the hub for it would end in an error of the network."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local or (revision is None and Path(name).parent.is_dir()):
        hub = "a hub id such as org/model" if looks_local else "a revision too if the hub's model of that name is meant"
        raise CheckpointError(f"{name}: no such folder: give a checkpoint folder or {hub}")


def _is_whole_model(folder: Path) -> bool:
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*")]
    return (folder / "config.json").is_file() and bool(weights)


def _adapted_model(source: str, revision: str | None) -> str | None:
    """The base model of a LoRA (or other) adapter, "" where it is not named, or None where `source` is no adapter."""
    try:
        path = cached_file(source, ADAPTER_CONFIG, revision=revision)
        content = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return ""
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return str(base or "")


def _merge(base: str) -> str:
    return (
        f"{ADAPTER_CONFIG} makes it an adapter (LoRA) of {base or 'another model'}, which is not applied here: merge "
        "them (merge_and_unload of peft), save the result and build that"
    )


def refusal(config: Any) -> str | None:
    """Why a model of this configuration cannot be exported, or None."""
    model_type = config.model_type
    words = " ".join([model_type, *(getattr(config, "layer_types", None) or [])]).lower()
    if getattr(config, "is_encoder_decoder", False):
        return f"{model_type} is an encoder-decoder model, only decoders can be built"
    if config.get_text_config() is not config or getattr(config, "vision_config", None) is not None:
        return f"{model_type} is a multimodal model: build its text decoder, saved as a checkpoint of its own"
    has_state_fields = any(name == "state_size" or name.startswith("mamba_") for name in config.to_dict())
    if has_state_fields or any(word in words for word in STATE_SPACE_WORDS):
        return f"{model_type} keeps a recurrent (state-space) state that cannot be rewound after a rejected draft"
    if model_type in ALIBI_MODEL_TYPES or getattr(config, "alibi", False):
        return f"{model_type} biases attention by distance (ALiBi), which ONNX Attention has no input for"
    if model_type not in SUPPORTED_MODEL_TYPES:
        return f"model type {model_type!r} is not supported: expected one of {', '.join(SUPPORTED_MODEL_TYPES)}"
    return refused_fields(config)


def check_same_tokenizer(target: Checkpoint, draft: Checkpoint) -> None:
    """Raises CheckpointError unless both tokenizers give every token the same id. Embedding tables may be padded to
    different sizes; a few added tokens that only one side knows are fine."""
    ours, theirs = target.tokenizer, draft.tokenizer
    ids, draft_ids = ours.get_vocab(), theirs.get_vocab()
    shared = ids.keys() & draft_ids.keys()
    moved = [token for token in shared if ids[token] != draft_ids[token]]
    missing = len(ids.keys() ^ draft_ids.keys())
    fix = "choose a draft of the target's model family"
    if moved or missing > len(ids) // 100:
        detail = (
            f"{moved[0]!r} is {ids[moved[0]]} and {draft_ids[moved[0]]}"
            if moved
            else f"{missing} tokens are not shared"
        )
        raise CheckpointError(f"{target.name} and {draft.name} have different tokenizers ({detail}): {fix}")
    if not splits_alike(ours, theirs):
        raise CheckpointError(f"{target.name} and {draft.name} split the same text into different tokens: {fix}")


def stop_token_ids(checkpoint: Checkpoint) -> list[int]:
    """Every token that ends a sequence: from the generation config, the model config and the tokenizer."""
    found: set[int] = set()
    sources = (checkpoint.load_generation_config(), checkpoint.config, checkpoint.tokenizer)
    for source in sources:
        found.update(_ids(source.eos_token_id))
    return sorted(found)


def _ids(value: Any) -> list[int]:
    """An eos_token_id as a list. Raises ValueError for what is none."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token) is not int for token in ids):
        raise ValueError(f"eos_token_id {value!r}: expected a token id or a list of them")
    return ids
