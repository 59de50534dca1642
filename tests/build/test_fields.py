"""No field of config.json that changes the computation is left out in silence."""

import dataclasses
import inspect
import logging
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import masking_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fly_build.checkpoint import SUPPORTED_MODEL_TYPES, open_checkpoint, refusal
from fly_build.fields import HARMLESS, HONOURED, HONOURED_BY, REFUSED, warn_of_unread_fields
from fly_trt.errors import CheckpointError
from tiny_models import save_tiny, tiny_llama

QK_NORM = ("use_qk_norm", "qk_layernorm")
ROPE = {"rope_theta": 5e5, "rope_scaling": None}
WINDOW_OFF = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
# What published checkpoints say beside the names that transformers declares, or with values that change nothing.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "rope_theta": 1e4},
    "gemma3_text": {
        "use_bidirectional_attention": False,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 1e4,
        "cache_implementation": "hybrid",
    },
    "granite": {"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, **ROPE},
    "llama": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "unsloth_fixed": True,
        "torch_dtype": "bfloat16",
        **WINDOW_OFF,
        "sliding_window": 1024,  # left behind by a conversion from qwen2
        **ROPE,
    },
    "mistral": {"sliding_window": None, "attention_bias": False, **ROPE},
    "mixtral": {"sliding_window": None, "router_aux_loss_coef": 0.02, "output_router_logits": True, **ROPE},
    "olmo2": ROPE,
    "phi3": {
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "attention_bias": False,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "sliding_window": 262144,
    },
    "qwen2": {**WINDOW_OFF, "sliding_window": 131072, "use_mrope": False, **ROPE},
    "qwen3": {**WINDOW_OFF, "attention_bias": False, **ROPE},
    "qwen3_moe": {**WINDOW_OFF, "mlp_only_layers": [], **ROPE},
    "smollm3": {**WINDOW_OFF, "pretraining_tp": 2, **ROPE},
}
LEFT_OUT = [
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("llama", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("qwen3", {"is_causal": False}, "is_causal = False"),
    ("llama", {"attention_chunk_size": 8192}, "attention_chunk_size = 8192"),
    ("olmo2", {"clip_qkv": 8.0}, r"clip_qkv = 8\.0"),
    ("llama", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50\.0"),
    ("qwen2", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30\.0"),
    ("llama", {"embedding_multiplier": 12.0, "logits_scaling": 8.0}, "embedding_multiplier = .*, logits_scaling = "),
    ("llama", {"sliding_window": 512}, "sliding_window = 512"),
    ("qwen3_moe", {"layer_types": ["sliding_attention"] * 24}, r"layer_types = \["),
    ("llama", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    ("gemma2", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
    ("qwen2", {"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\]"),
    ("llama", {"use_qk_norm": True}, "use_qk_norm = True"),
    ("phi3", {"qk_layernorm": True}, "qk_layernorm = True"),
    ("qwen3", {"use_qk_norm": False}, "use_qk_norm = False"),
    ("llama", {"num_experts": 8, "num_experts_per_tok": 2}, "num_experts = 8, num_experts_per_tok = 2"),
    ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("granite", {"embedding_multiplier": 12.0, "num_local_experts": 4}, "num_local_experts = 4"),
    ("llama", {"sliding_window": "4096"}, "sliding_window = '4096'"),
]
CHANGES_NOTHING = [
    *((name, {field: True}) for name in ("qwen3_moe", "qwen3", "olmo2", "gemma3_text") for field in QK_NORM),
    *((name, {"original_max_position_embeddings": 4096}) for name in SUPPORTED_MODEL_TYPES),
    ("llama", {"num_experts": 0}),
    ("llama", {"final_logit_softcapping": 0.0, "attn_logit_softcapping": 0}),
    ("granite", {"num_local_experts": 0, "num_experts_per_tok": 0}),
    ("llama", {"num_experts_per_tok": 2, "norm_topk_prob": True, "num_experts": None}),
    ("qwen2", {"attention_bias": True}),
    ("gemma2", {"hidden_act": "gelu"}),
    ("gemma3_text", {"hidden_act": "gelu", "hidden_activation": "relu"}),
    ("mixtral", {"norm_topk_prob": True}),
    ("qwen3_moe", {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}),
    *((name, {"partial_rotary_factor": 1.0}) for name in SUPPORTED_MODEL_TYPES),
    ("phi3", {"partial_rotary_factor": 0.75}),
    ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
]
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
FULL = {"partial_rotary_factor": 1.0}
PARTIAL = [
    *((name, {"partial_rotary_factor": 0.5}) for name in SUPPORTED_MODEL_TYPES if name != "phi3"),
    ("llama", {"rope_parameters": ROTARY}),
    ("llama", {"partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": ROTARY}}),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": ROTARY, "full_attention": ROTARY | FULL}}),
]


# Read in gemma3's module by the classes of the multimodal model.
MULTIMODAL = {"get_text_config", "text_config", "vision_config", "image_token_id", "mm_tokens_per_image"}


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("fly_build")]


def _known(model_type: str) -> frozenset[str]:
    return HONOURED | HONOURED_BY[model_type] | HARMLESS | REFUSED


@pytest.mark.parametrize(("model_type", "fields", "named"), LEFT_OUT)
def test_field_that_would_be_left_out_is_refused_by_name(model_type: str, fields: dict[str, Any], named: str) -> None:
    reason = refusal(CONFIG_MAPPING[model_type](**fields))
    assert reason is not None
    assert re.search(rf"config\.json says {named}.*, and {model_type} is built without", reason)


@pytest.mark.parametrize(("model_type", "fields"), PARTIAL)
def test_rotation_of_a_part_of_each_head_is_refused_where_it_is_not_read(
    model_type: str, fields: dict[str, Any]
) -> None:
    reason = refusal(CONFIG_MAPPING[model_type](**fields))
    assert reason is not None
    assert f"config.json says partial_rotary_factor = 0.5, and {model_type} is built without" in reason


@pytest.mark.parametrize(("model_type", "fields"), CHANGES_NOTHING)
def test_value_that_changes_nothing_is_neither_refused_nor_warned_of(
    model_type: str, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG_MAPPING[model_type](**fields)
    assert refusal(config) is None
    warn_of_unread_fields("here", config)
    assert _warnings(caplog) == []


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_fields_of_published_checkpoints_are_neither_refused_nor_warned_of(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CONFIG_MAPPING[model_type](**PUBLISHED[model_type]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    open_checkpoint(str(tmp_path))
    assert _warnings(caplog) == []


def test_field_that_nobody_reads_is_named_and_built_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny(tiny_llama(num_hidden_layers=1, my_gate=0.5, my_other=None), tmp_path)
    open_checkpoint(str(tmp_path))
    (warning,) = _warnings(caplog)
    assert warning.endswith("config.json has fields that nobody reads: my_gate = 0.5")


def test_embedding_model_of_gemma3_is_refused_and_not_built_as_causal(tmp_path: Path) -> None:
    transformers.Gemma3TextConfig(use_bidirectional_attention=True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use_bidirectional_attention = True, and gemma3_text is built without"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "fields", [{"pad_token_id": 160}, {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}]
)
def test_field_that_transformers_fails_at_is_an_error_of_the_checkpoint(fields: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tiny_llama(num_hidden_layers=1), tmp_path)
    tiny_llama(num_hidden_layers=1, **fields).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"transformers cannot make the model of this config\.json: \S"):
        _ = open_checkpoint(str(tmp_path)).empty_model


def test_outputs_that_the_config_asks_for_do_not_change_the_graph(tmp_path: Path) -> None:
    wanted = {"return_dict": False, "output_hidden_states": True}
    save_tiny(tiny_llama(num_hidden_layers=1), tmp_path)
    tiny_llama(num_hidden_layers=1, **wanted).save_pretrained(tmp_path)
    config = open_checkpoint(str(tmp_path)).empty_model.config
    assert (config.return_dict, config.output_hidden_states) == (True, False)


def test_every_supported_type_has_its_fields() -> None:
    assert HONOURED_BY.keys() == PUBLISHED.keys() == set(SUPPORTED_MODEL_TYPES)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_every_field_that_transformers_declares_or_reads_is_known(model_type: str) -> None:
    """Fails where another release of transformers reads a field that nobody looked at yet."""
    config_class = CONFIG_MAPPING[model_type]
    assert {field.name for field in dataclasses.fields(config_class)} <= _known(model_type)
    package = config_class.__module__.rpartition(".")[0]
    source = inspect.getsource(import_module(f"{package}.modeling_{package.rpartition('.')[2]}"))
    read = set(re.findall(r"config\.([a-z_]+)|getattr\((?:self\.)?config, \"([a-z_]+)\"", source))
    names = {name for pair in read for name in pair if name and not name.startswith("_")}
    assert names - MULTIMODAL <= _known(model_type)


def test_every_field_that_masks_are_made_of_is_known() -> None:
    read = set(re.findall(r"getattr\(config, \"([a-z_]+)\"", inspect.getsource(masking_utils)))
    assert {"is_causal", "sliding_window"} <= read
    assert read <= REFUSED | frozenset().union(*HONOURED_BY.values())
