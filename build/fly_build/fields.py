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
    "max_position_embeddings rms_norm_eps rope_parameters rope_theta rope_scaling partial_rotary_factor",
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
    "phi3": _names("hidden_act sliding_window original_max_position_embeddings"),
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
# Values, besides None, False and what is empty, with which a field changes nothing.
NEUTRAL: dict[str, Any] = {
    "is_causal": True,
    "attention_multiplier": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
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
    values = config.to_dict()
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


def _is_neutral(name: str, value: Any, values: dict[str, Any]) -> bool:
    """Of a field that is not read: whether it would change anything if it were."""
    if name in NEUTRAL:
        return value is None or value == NEUTRAL[name]
    if value is None or value is False or value in ("", [], {}):
        return True
    if name in ("sliding_window", "use_sliding_window", "max_window_layers"):  # as conversions leave them behind
        window = values.get("sliding_window")
        is_used = values.get("use_sliding_window", True) and window is not None
        return not is_used or window >= values["max_position_embeddings"]
    if name == "layer_types":
        return set(value) == {"full_attention"}
    if name in ("hidden_act", "hidden_activation"):  # an architecture reads one of the two names
        return value == values["hidden_activation" if name == "hidden_act" else "hidden_act"]
    return False
