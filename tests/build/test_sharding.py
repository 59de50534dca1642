"""Tensor parallelism without a GPU: the sharded graphs of all ranks, merged into one, compute what transformers
computes, for every supported architecture; and the arithmetic of what a rank has, for sizes drawn at random.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from merged_ranks import MergedRunner
from test_architectures import CONFIGS

from fly_build.checkpoint import Checkpoint, open_checkpoint
from fly_build.collectives import OPERATOR
from fly_build.export import export_decoder
from fly_build.sharding import HAS_WIDE_NORMS, TP_SIZES, Sharding, shard
from fly_trt.errors import CheckpointError
from tiny_models import MAX_SEQ_LEN, SHAPE, check_against_transformers, save_tiny, tiny_llama

# Those whose parameters are dealt out as another's here: they differ in a window or in rotary frequencies, which each
# rank has as they are.
ALIKE = {"mistral", "phi3-partial", "phi3-longrope", "smollm3"}
EVERYDAY = [(name, 2) for name in CONFIGS if name not in ALIKE] + [("llama", 4), ("olmo2", 4), ("qwen3_moe", 4)]
LONG = [(name, count) for count in (2, 4) for name in CONFIGS if (name, count) not in EVERYDAY]


@pytest.mark.parametrize(
    ("name", "num_ranks"), [*EVERYDAY, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_ranks_together_compute_what_transformers_computes(name: str, num_ranks: int, tmp_path: Path) -> None:
    """Prefill, continuation and rewind of ragged rows. Two key-value heads: of four ranks, two have the same one."""
    model = save_tiny(CONFIGS[name](), tmp_path)
    runner = MergedRunner(open_checkpoint(str(tmp_path)), num_ranks, tmp_path / "merged.onnx")
    check_against_transformers(model, runner)


def test_eight_ranks_share_two_key_value_heads(tmp_path: Path) -> None:
    model = save_tiny(tiny_llama(num_attention_heads=8), tmp_path)
    runner = MergedRunner(open_checkpoint(str(tmp_path)), 8, tmp_path / "merged.onnx")
    check_against_transformers(model, runner)


def test_a_vocabulary_that_does_not_divide_is_whole_on_every_rank(tmp_path: Path) -> None:
    config = tiny_llama(vocab_size=SHAPE["vocab_size"] + 1)
    model = save_tiny(config, tmp_path)
    runner = MergedRunner(open_checkpoint(str(tmp_path)), 2, tmp_path / "merged.onnx")
    assert not runner.sharding.by_vocabulary
    check_against_transformers(model, runner)


@pytest.mark.parametrize("is_even", [True, False])
def test_a_step_has_two_sums_a_layer_and_two_of_the_vocabulary(is_even: bool) -> None:
    checkpoint = Checkpoint("here", None, tiny_llama(vocab_size=160 if is_even else 161))
    sharding = _shard(checkpoint.config, 2)
    graph = export_decoder(checkpoint, MAX_SEQ_LEN, attention="mask", sharding=sharding).model.graph
    collectives = [node for node in graph if node.op_type == OPERATOR]
    assert len(collectives) == 2 * SHAPE["num_hidden_layers"] + 2 * is_even
    for node in collectives:
        assert {name: attribute.value for name, attribute in node.attributes.items()} == {
            "collective_operation": "all_reduce",
            "reduce_op": "sum",
            "root": -1,
            "nb_rank": 2,
            "group_size": 0,
        }


def _shard(config: Any, num_ranks: int) -> Sharding:
    return shard("here", config, Checkpoint("here", None, config).head_dim, num_ranks)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Any, int]:
    """A configuration of any architecture whose sizes can be dealt out, and the number of ranks."""
    num_ranks = draw(st.sampled_from(TP_SIZES))
    kv_heads = draw(st.sampled_from([1, 2, 4, 8, 16, 3 * num_ranks]))
    assume(kv_heads % num_ranks == 0 or num_ranks % kv_heads == 0)
    group = draw(st.integers(1, 4))
    heads = kv_heads * group
    assume(heads % num_ranks == 0)
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 4, 6])),
        "hidden_size": 2 * heads,
        "intermediate_size": num_ranks * draw(st.integers(1, 5)),
        "vocab_size": draw(st.integers(40, 60)),
        "num_hidden_layers": 1,
    }
    config = CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))]()
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "rope_parameters")}
    if getattr(config, "moe_intermediate_size", None):
        sizes["moe_intermediate_size"] = num_ranks * draw(st.integers(1, 5))
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:1]
    return type(config)(**fields | sizes), num_ranks


@given(shapes())
def test_the_ranks_have_every_value_once_and_key_value_heads_as_often_as_they_are_shared(
    drawn: tuple[Any, int],
) -> None:
    config, num_ranks = drawn
    sharding = _shard(config, num_ranks)
    checkpoint = Checkpoint("here", None, config)
    copies = max(1, num_ranks // config.num_key_value_heads)
    for name, shape in checkpoint.parameter_shapes.items():
        values = torch.arange(int(np.prod(shape))).reshape(shape)
        parts = [sharding.part(name, values, rank) for rank in range(num_ranks)]
        assert {tuple(part.shape) for part in parts} == {sharding.rank_shape(name, shape)}
        counts = torch.stack([torch.bincount(part.flatten(), minlength=values.numel()) for part in parts]).sum(0)
        if sharding.cut(name, shape, 0) is None:
            assert set(counts.tolist()) == {num_ranks}
        elif re.search(r"\.[kv]_(proj|norm)\.", name):
            assert set(counts.tolist()) == {copies}
        elif "qkv_proj" in name:
            queries = config.num_attention_heads * sharding.head_dim
            assert set(counts.reshape(shape)[:queries].flatten().tolist()) == {1}
            assert set(counts.reshape(shape)[queries:].flatten().tolist()) == {copies}
        else:
            assert set(counts.tolist()) == {1}, name


@given(shapes())
def test_a_ranks_parts_are_the_parameters_of_a_model_of_its_size(drawn: tuple[Any, int]) -> None:
    """What transformers makes of the rank's configuration has the shapes that are cut, all of them and no other."""
    config, num_ranks = drawn
    sharding = _shard(config, num_ranks)
    whole = Checkpoint("here", None, config).parameter_shapes
    of_rank = Checkpoint("here", None, sharding.rank_config(config)).parameter_shapes
    expected = {name: sharding.rank_shape(name, shape) for name, shape in whole.items()}
    if config.model_type not in HAS_WIDE_NORMS:
        assert of_rank == expected
    assert of_rank.keys() == expected.keys()


@given(shapes())
def test_a_rank_has_the_key_value_head_of_each_of_its_query_heads(drawn: tuple[Any, int]) -> None:
    config, num_ranks = drawn
    sharding = _shard(config, num_ranks)
    group = config.num_attention_heads // config.num_key_value_heads
    dim = sharding.head_dim
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for rank in range(num_ranks):
        had: dict[str, list[int]] = {}
        for module, count in heads.items():
            numbers = torch.arange(count).repeat_interleave(dim)
            had[module] = sharding.part(f"model.layers.0.self_attn.{module}.bias", numbers, rank)[::dim].tolist()
        rank_group = len(had["q_proj"]) // len(had["k_proj"])
        assert [query // group for query in had["q_proj"]] == np.repeat(had["k_proj"], rank_group).tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_views_stay_views(name: str) -> None:
    """What lies in one piece is not copied: a rank's part is read when it is written. Only fused projections are joined
    of their parts, one tensor at a time."""
    checkpoint = Checkpoint("here", None, CONFIGS[name]())
    sharding = _shard(checkpoint.config, 2)
    for parameter, shape in checkpoint.parameter_shapes.items():
        tensor = torch.empty(shape)
        part = sharding.part(parameter, tensor, 1)
        is_view = part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert is_view == (not parameter.endswith(("qkv_proj.weight", "gate_up_proj", "gate_up_proj.weight")))


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "heads": ({"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}, 4, "6 attention heads"),
    "odd heads": ({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}, 2, "9 attention heads"),
    "groups": ({"num_attention_heads": 24, "num_key_value_heads": 6, "hidden_size": 48}, 4, "6 key-value heads"),
    "columns": ({"intermediate_size": 98}, 4, "98 columns of an MLP .intermediate_size."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_that_do_not_divide_are_refused_with_what_would(case: str) -> None:
    fields, num_ranks, reason = REFUSED[case]
    config = tiny_llama(**fields)
    fix = "build it for one GPU" if case == "odd heads" else "use --tp-size 2"
    with pytest.raises(CheckpointError, match=rf"^here: {reason}.* among {num_ranks} ranks: {fix}$"):
        _shard(config, num_ranks)


def test_columns_of_experts_are_asked_about_too() -> None:
    config = CONFIGS["qwen3_moe"]()
    config.moe_intermediate_size = 33
    with pytest.raises(CheckpointError, match=r"33 columns of an MLP \(moe_intermediate_size\) cannot be divided"):
        _shard(config, 2)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), st.sampled_from(TP_SIZES))
def test_what_is_not_refused_divides(kv_heads: int, group: int, columns: int, num_ranks: int) -> None:
    heads = kv_heads * group
    config = transformers.LlamaConfig(
        num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=2 * heads, intermediate_size=columns
    )
    divides = heads % num_ranks == 0 and columns % num_ranks == 0
    divides &= kv_heads % num_ranks == 0 or num_ranks % kv_heads == 0
    if not divides:
        with pytest.raises(CheckpointError, match=r"^here: [^\n]* among . ranks: [^\n]*$"):
            _shard(config, num_ranks)
    else:
        assert _shard(config, num_ranks).rank_kv_heads * num_ranks == max(kv_heads, num_ranks)
