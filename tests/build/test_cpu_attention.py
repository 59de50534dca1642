"""Attention that CacheAttention does not compute stays ONNX Runtime's, in all layers, and the build says why."""

import logging
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from fly_build.checkpoint import Checkpoint, open_checkpoint
from fly_build.cpu_attention import fuse_attention
from fly_trt.manifest import Manifest
from tiny_models import MAX_SEQ_LEN, SHAPE, TinyPair, count_operators, save_tiny, tiny_llama
from traced_once import build, export_once

HEADS = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
COSTS = {"draft_token_cost": 0.1, "verification_token_cost": 0.1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny(tiny_llama(), folder)
    return open_checkpoint(str(folder))


@pytest.fixture
def traced(checkpoint: Checkpoint) -> ir.Model:
    return export_once(checkpoint, MAX_SEQ_LEN).model


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def normed_after_the_rotation(model: ir.Model) -> None:
    scatter = attentions(model)[1].inputs[1].producer()
    rotated = scatter.inputs[1]
    weight = ir.val("late", const_value=ir.tensor([1.0] * 16, name="late"))
    model.graph.register_initializer(weight)
    norm = ir.node("RMSNormalization", [rotated, weight], {"axis": -1})
    norm.outputs[0].shape, norm.outputs[0].type = rotated.shape, rotated.type
    model.graph.insert_before(scatter, norm)
    scatter.replace_input_with(1, norm.outputs[0])


def not_causal(model: ir.Model) -> None:
    attentions(model)[0].attributes.add(ir.AttrInt64("is_causal", 0))


def rotated_by_neighbours(model: ir.Model) -> None:
    attentions(model)[0].inputs[0].producer().attributes.add(ir.AttrInt64("interleaved", 1))


def rotated_apart(model: ir.Model) -> None:
    rotary = attentions(model)[1].inputs[0].producer()
    rotary.replace_input_with(1, rotary.inputs[2])


def written_elsewhere(model: ir.Model) -> None:
    scatter = attentions(model)[0].inputs[2].producer()
    scatter.replace_input_with(2, model.graph.inputs[0])


def masked(model: ir.Model) -> None:
    attentions(model)[1].replace_input_with(3, model.graph.inputs[0])


def read_by_another(start: int, end: int) -> Callable[[ir.Model], None]:
    """A size of a cache of keys is one of the graph's outputs."""

    def add(model: ir.Model) -> None:
        past = next(value for value in model.graph.inputs if value.name == "past_key.1")
        size = ir.node("Shape", [past], {"start": start, "end": end})
        model.graph.append(size)
        output = size.outputs[0]
        output.name, output.type, output.shape = "size", ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        model.graph.outputs.append(output)

    return add


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (normed_after_the_rotation, "layer 1: keys are normed after the rotation"),
        (not_causal, "layer 0: it is not causal"),
        (rotated_by_neighbours, "layer 0: queries are rotated by neighbouring channels"),
        (rotated_apart, "layer 1: queries and keys are rotated by different angles"),
        (written_elsewhere, "layer 0: keys and values are not written to the cache at the step's positions"),
        (masked, "layer 1: its mask is not that of a sliding window"),
        (read_by_another(2, 3), "Shape reads keys of the cache, which would lie in blocks"),
        (read_by_another(1, 4), "Shape reads keys of the cache, which would lie in blocks"),
    ],
)
def test_what_is_not_cache_attentions_is_said_and_the_graph_stays(
    traced: ir.Model, change: Callable[[ir.Model], None], reason: str
) -> None:
    change(traced)
    before = ir.to_proto(traced).SerializeToString(deterministic=True)
    assert fuse_attention(traced, *HEADS, "none") == reason
    assert ir.to_proto(traced).SerializeToString(deterministic=True) == before


def test_the_sizes_that_both_layouts_of_a_cache_have_may_be_read(traced: ir.Model) -> None:
    read_by_another(0, 2)(traced)
    assert fuse_attention(traced, *HEADS, "none") is None
    assert count_operators(traced)["CacheAttention"] == 2


@pytest.fixture(scope="module")
def pair(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Manifest]:
    def made(**flags: object) -> Manifest:
        models = {"target": str(tiny_pair.target), "draft": str(tiny_pair.draft)}
        return build(tmp_path_factory.mktemp("pair") / "pair", **models, max_seq_len=64, speculative=COSTS, **flags)

    return made


def test_a_build_says_which_model_goes_without_and_why(
    pair: Callable[..., Manifest], cpu_library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads of the tiny draft have 8 channels."""
    with caplog.at_level(logging.INFO, "fly_build"):
        manifest = pair()
    assert manifest.draft is not None
    assert manifest.draft.rollout is None
    assert caplog.messages == [
        "draft: attention stays ONNX Runtime's: layer 0: heads of 8 channels, expected a multiple of 16",
        "draft: drafts token by token, without rollouts: its caches are not CacheAttention's",
    ]


def test_a_build_that_wants_no_operators_says_nothing_of_them(
    pair: Callable[..., Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fly_build"):
        pair(cpu_kernels="off")
    assert caplog.messages == []
