"""Every supported architecture, as a tiny random checkpoint: the exported graph computes what transformers computes, in
prefill, continuation and rewind with ragged rows that outgrow the sliding window, and consists of the operators that
the inference libraries fuse.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers

from fly_build.checkpoint import SUPPORTED_MODEL_TYPES, open_checkpoint
from fly_build.export import export_decoder
from fly_trt.errors import CheckpointError
from tiny_models import (
    SHAPE,
    Runner,
    check_against_transformers,
    check_asked_positions,
    count_operators,
    save_tiny,
    tiny_runner,
)

WINDOW = 12
HEAD_DIM = {"head_dim": 16}
SLIDING = {"sliding_window": WINDOW}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.0, 2.5, 3.0],
    "long_factor": [float(factor) for factor in range(4, 12)],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
GRANITE_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
}
# What a norm or a rotation of halves looks like when it is exported as it is written.
LEFTOVERS = {"Pow", "ReduceMean", "ReduceSumSquare", "Sqrt", "Rsqrt", "Reciprocal", "Neg"}
STEP_INPUTS = ["input_ids", "write_indices", "logits_positions", "next_tokens"]
ROW_INPUTS = ["num_context", "num_draft", "entropy_threshold", "use_full_entropy", "window", "lookahead"]
HEAD_OUTPUTS = ["num_accepted", "next_token", "argmax", "entropy", "entropy_topk", "argmax_logprob", "token_logprob"]
HEAD_OUTPUTS += ["top_ids", "top_logprobs"]

Config = Callable[[], Any]


def _config(name: str, **fields: Any) -> Config:
    return lambda: getattr(transformers, name)(**SHAPE, **fields)


CONFIGS: dict[str, Config] = {
    "llama": _config("LlamaConfig", rope_parameters=LLAMA3_ROPE, attention_bias=True, mlp_bias=True),
    "llama-tied": _config("LlamaConfig", tie_word_embeddings=True),
    "qwen2": _config("Qwen2Config", use_sliding_window=True, max_window_layers=1, **SLIDING),
    "qwen3": _config("Qwen3Config", head_dim=24),
    "mistral": _config("MistralConfig", **SLIDING),
    "phi3": _config("Phi3Config", **SLIDING),
    "phi3-partial": _config(
        "Phi3Config", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "phi3-longrope": _config("Phi3Config", rope_parameters=LONGROPE, original_max_position_embeddings=64),
    "gemma2": _config("Gemma2Config", query_pre_attn_scalar=40, **HEAD_DIM, **SLIDING),
    "gemma3_text": _config(
        "Gemma3TextConfig",
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=GEMMA3_ROPE,
        **HEAD_DIM,
        **SLIDING,
    ),
    "olmo2": _config("Olmo2Config"),
    "granite": _config("GraniteConfig", **GRANITE_MULTIPLIERS),
    "smollm3": _config("SmolLM3Config", no_rope_layers=[0, 1]),
    "mixtral": _config("MixtralConfig", num_local_experts=4, **SLIDING),
    "qwen3_moe": _config(
        "Qwen3MoeConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        **HEAD_DIM,
    ),
}


@dataclass
class Exported:
    name: str
    reference: torch.nn.Module
    runner: Runner
    graph: ir.Model


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    return Exported(request.param, *tiny_runner(CONFIGS[request.param](), folder))


def test_every_supported_model_type_is_tested_here() -> None:
    assert {config().model_type for config in CONFIGS.values()} == set(SUPPORTED_MODEL_TYPES)


def test_logits_agree_with_transformers_when_rows_prefill_continue_and_rewind(exported: Exported) -> None:
    check_against_transformers(exported.reference, exported.runner)


def test_cache_norms_and_rotation_are_single_operators(exported: Exported) -> None:
    config = exported.reference.config
    norms = [module for module in exported.reference.modules() if "RMSNorm" in type(module).__name__]
    num_layers = config.num_hidden_layers
    num_rotary = sum(getattr(config, "no_rope_layers", None) or [1] * num_layers)
    operators = count_operators(exported.graph)
    names = ("If", "Attention", "TensorScatter", "RMSNormalization", "RotaryEmbedding")
    found = {name: operators.get(name, 0) for name in names}
    assert found == {
        "If": num_layers,
        "Attention": 2 * num_layers,  # one for steps of one token and one for longer steps
        "TensorScatter": 2 * num_layers,
        "RMSNormalization": len(norms),
        "RotaryEmbedding": 2 * num_rotary,
    }
    assert not LEFTOVERS & operators.keys()


def test_inputs_and_outputs_are_those_of_the_engine_contract(exported: Exported) -> None:
    graph = exported.graph.graph
    cache = [f"{kind}.{i}" for i in range(exported.reference.config.num_hidden_layers) for kind in ("key", "value")]
    past, present = ([f"{when}_{name}" for name in cache] for when in ("past", "present"))
    assert [value.name for value in graph.inputs] == [*STEP_INPUTS, *ROW_INPUTS, *past]
    assert [value.name for value in graph.outputs] == [*HEAD_OUTPUTS, "logits", *present]
    assert {str(value.shape[2]) for value in graph.inputs if value.name in past} == {"S"}


def test_the_vocabulary_is_multiplied_with_the_positions_that_were_asked_for_alone(exported: Exported) -> None:
    """Also where scales and caps follow the product, and with the same bits."""
    check_asked_positions(exported.runner, exported.graph)
    wide = [value for node in exported.graph.graph for value in node.outputs if is_of_vocabulary(value)]
    assert {str(value.shape[1]) for value in wide} == {"L"}


def is_of_vocabulary(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 3 and value.shape[2] == SHAPE["vocab_size"]


def test_every_initializer_is_used(exported: Exported) -> None:
    """ONNX Runtime prints a warning for one that is not, each time the engine is loaded."""
    assert [name for name, value in exported.graph.graph.initializers.items() if not value.uses()] == []


def test_window_that_cannot_be_outgrown_needs_no_mask(tmp_path) -> None:
    """A mask costs a tensor of T x S per step; Mistral's window of 4096 is none at 64 tokens."""
    save_tiny(_config("MistralConfig", sliding_window=64)(), tmp_path)
    graph = export_decoder(open_checkpoint(str(tmp_path)), 64).model.graph
    masks = [node.inputs[3] for node in graph if node.op_type == "Attention"]
    assert masks == [None, None]


def test_longrope_is_refused_beyond_the_length_where_its_factors_switch(tmp_path) -> None:
    save_tiny(CONFIGS["phi3-longrope"](), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.max_seq_len == 64
    with pytest.raises(CheckpointError, match="positions beyond 64 are not supported"):
        export_decoder(checkpoint, 65)
