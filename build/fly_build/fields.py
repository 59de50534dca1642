"""The fields of config.json that change what a model computes, held against what the exported graph computes.

The graph is transformers' own code, traced with attention and masks of ours, so what that code reads is honoured, but
for masks of another kind. A field is honoured, or harmless (of training, generation, bookkeeping), or neutral (its
value changes nothing), or refused by name: one that belongs to this or another architecture would be left out in
silence. A name that is none of these is read by nobody, and named in a warning.
"""

import dataclasses
import logging
from typing import Any

from fly_build.tensors import some

logger = logging.getLogger(__name__)


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


HONOURED = _names(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim",
    "max_position_embeddings original_max_position_embeddings rms_norm_eps rope_parameters rope_theta rope_scaling",
    "tie_word_embeddings eos_token_id dtype torch_dtype",
)
GEMMA = "attention_bias attn_logit_softcapping final_logit_softcapping hidden_activation query_pre_attn_scalar"
WINDOWED = "layer_types sliding_window use_sliding_window max_window_layers"
# What transformers' modeling code of each architecture reads besides (5.20 to 5.24).
HONOURED_BY = {
    "gemma2": _names(GEMMA, "layer_types sliding_window"),
    "gemma3_text": _names(GEMMA, "layer_types sliding_window sliding_window_pattern rope_local_base_freq"),
    "granite": _names(
        "hidden_act attention_bias mlp_bias attention_multiplier embedding_multiplier residual_multiplier",
        "logits_scaling",
    ),
    "llama": _names("hidden_act attention_bias mlp_bias"),
    "mistral": _names("hidden_act sliding_window"),
    "mixtral": _names("hidden_act sliding_window num_experts_per_tok num_local_experts"),
    "olmo2": _names("hidden_act attention_bias"),
    "phi3": _names("hidden_act sliding_window partial_rotary_factor"),
    "qwen2": _names("hidden_act", WINDOWED),
    "qwen3": _names("hidden_act attention_bias", WINDOWED),
    "qwen3_moe": _names(
        "hidden_act attention_bias sliding_window use_sliding_window decoder_sparse_step mlp_only_layers",
        "moe_intermediate_size norm_topk_prob num_experts num_experts_per_tok num_local_experts",
    ),
    "smollm3": _names("hidden_act attention_bias mlp_bias no_rope_layer_interval no_rope_layers", WINDOWED),
}
# Attention that is not causal, or another one than that of every supported architecture.
REFUSED = _names("is_causal use_bidirectional_attention attention_chunk_size clip_qkv use_qk_norm qk_layernorm alibi")
HARMLESS = _names(
    # training
    "attention_dropout embd_pdrop hidden_dropout resid_pdrop initializer_range output_router_logits pretraining_tp",
    "router_aux_loss_coef router_jitter_noise",
    # generation, outputs and the cache: ours are used
    "bos_token_id pad_token_id use_cache cache_implementation return_dict output_attentions output_hidden_states",
    "chunk_size_feed_forward is_encoder_decoder problem_type id2label label2id",
    # bookkeeping
    "model_type architectures transformers_version auto_map tokenizer_class task_specific_params model_name",
    "unsloth_version unsloth_fixed is_llama_config transformers.js_config",
)
QK_NORM = {"use_qk_norm": True, "qk_layernorm": True}
# What an architecture does without asking: with these values a field changes nothing there, and any other is left out.
FIXED: dict[str, dict[str, Any]] = {
    "gemma3_text": QK_NORM,
    "mixtral": {"norm_topk_prob": True, "decoder_sparse_step": 1},
    "olmo2": QK_NORM,
    "qwen3": QK_NORM,
    "qwen3_moe": QK_NORM,
}
OF_EXPERTS = _names("decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts_per_tok")
# Values, besides None, False, 0 and what is empty, with which a field changes nothing.
NEUTRAL: dict[str, Any] = {
    "is_causal": True,
    "attention_multiplier": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "partial_rotary_factor": 1,
}
KNOWN = REFUSED.union(*HONOURED_BY.values())


def refused_fields(config: Any) -> str | None:
    """Why a configuration of a supported type cannot be built as it says, or None."""
    left_out, _ = _not_honoured(config)
    if not left_out:
        return None
    return (
        f"config.json says {some(left_out)}, and {config.model_type} is built without: it would compute something "
        "else. Remove what does not belong to the model, or choose another model"
    )


def warn_of_unread_fields(name: str, config: Any) -> None:
    _, unread = _not_honoured(config)
    if unread:
        logger.warning("%s: config.json has fields that nobody reads: %s", name, some(unread))


def _not_honoured(config: Any) -> tuple[list[str], list[str]]:
    """`field = value` of what changes the computation and is left out, and of what no architecture knows."""
    values = _fields(config)
    passed = HONOURED | HONOURED_BY[config.model_type] | HARMLESS
    declared = {field.name: field.default for field in dataclasses.fields(config)}
    left_out: list[str] = []
    unread: list[str] = []
    for name, value in values.items():
        if name.startswith("_") or name in passed or _is_neutral(name, value, values):
            continue
        if name not in declared and name not in KNOWN:
            unread.append(f"{name} = {value!r}")
        elif name in REFUSED or name not in declared or value != declared[name]:
            left_out.append(f"{name} = {value!r}")
    return left_out, unread


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """transformers 5 keeps one dict, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _fields(config: Any) -> dict[str, Any]:
    """By name, with the one of those that transformers 5 moves into rope_parameters which most architectures ignore."""
    # All architectures have "proportional": it turns the rest of a head by 0.
    ropes = [rope for rope in rope_parameters(config) if rope.get("rope_type") != "proportional"]
    factors = [factor for rope in ropes if (factor := rope.get("partial_rotary_factor")) not in (None, 1)]
    moved = {"partial_rotary_factor": factors[0]} if factors else {}
    return config.to_dict() | moved


def _is_neutral(name: str, value: Any, values: dict[str, Any]) -> bool:
    """Of a field that is not read: that it would change nothing if it were."""
    always = NEUTRAL | FIXED.get(values["model_type"], {})
    if name in always:
        return value is None or value == always[name]
    if value in (None, False, 0, "", [], {}):
        return True
    if name in OF_EXPERTS and not (values.get("num_experts") or values.get("num_local_experts")):
        return True
    if name == "attention_bias" and values["model_type"] == "qwen2":  # always has those of q, k and v: its tensors say
        return True
    if name in ("sliding_window", "use_sliding_window", "max_window_layers"):  # as conversions leave them behind
        window = values.get("sliding_window")
        is_used = values.get("use_sliding_window", True) and window is not None
        return not is_used or (isinstance(window, int | float) and window >= values["max_position_embeddings"])
    if name == "layer_types":
        return all(kind == "full_attention" for kind in value)
    if name == "hidden_activation":
        return bool(value == values["hidden_act"])
    if name == "hidden_act":  # of Gemma, which reads hidden_activation: the older name says gelu for gelu_pytorch_tanh
        return value in ("gelu", values["hidden_activation"])
    return False
