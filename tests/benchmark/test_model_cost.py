"""What a step has to do at least, from its rows and the graph of the model."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest

from fly_trt.benchmark.model_cost import Layers, Machine, ModelCost, Row, count_cost
from fly_trt.errors import ConfigError
from fly_trt.manifest import ModelEngine, read_manifest

MACHINE = Machine(memory_bandwidth=20e9, product_rates={"float32": 50e9, "int8": 100e9}, kernels={})
COST = ModelCost(
    layers=Layers(200_000_000, {"float32": 10_000_000, "int8": 100_000_000}),
    experts=Layers(),
    num_experts=0,
    experts_per_token=0,
    vocabulary=Layers(40_000_000, {"int8": 40_000_000}),
    vocab_size=50_000,
    windows=(None, None, 100),
    attention_macs=2000,
    cache_bytes=4000,
)


def test_limits_are_bytes_over_bandwidth_and_macs_over_rate() -> None:
    verification = [Row(128, 16, 16)]
    assert COST.weights_ms(MACHINE, verification) == pytest.approx(12)
    head = 16 * 50_000 / 50e6
    assert COST.products_ms(MACHINE, verification) == pytest.approx(16 * (0.2 + 1.0 + 0.4) + head)
    assert COST.limit_ms(MACHINE, verification) == COST.arithmetic_ms(MACHINE, verification)
    assert COST.limit_ms(MACHINE, [Row(128, 1)]) == COST.memory_ms(MACHINE, [Row(128, 1)])


def test_the_vocabulary_counts_where_logits_are_read() -> None:
    prompt, verification = [Row(0, 64, 1)], [Row(0, 64, 64)]
    difference = COST.products_ms(MACHINE, verification) - COST.products_ms(MACHINE, prompt)
    assert difference == pytest.approx(63 * (0.4 + 0.001))
    assert COST.weights_ms(MACHINE, [Row(0, 64, 0)]) == pytest.approx(10)


@pytest.mark.parametrize("row", [Row(0, 1), Row(0, 5), Row(98, 1), Row(98, 7), Row(99, 3), Row(100, 3), Row(3000, 64)])
def test_attention_counts_the_keys_that_each_query_sees(row: Row) -> None:
    """Written out, query by query."""
    pairs, keys = 0, 0
    for window in COST.windows:
        seen = [
            range(max(0, position + 1 - (window or 1 << 30)), position + 1)
            for position in range(row.num_cached, row.num_cached + row.num_tokens)
        ]
        pairs += sum(map(len, seen))
        keys += len(set(itertools.chain(*seen)))
    assert COST.attention_ms(MACHINE, [row]) == pytest.approx(pairs * 2000 / 50e6)
    assert COST.cache_ms(MACHINE, [row]) == pytest.approx(keys * 4000 / 20e6)


def test_rows_share_the_weights_and_nothing_else() -> None:
    one, three = [Row(50, 4, 4)], [Row(50, 4, 4)] * 3
    assert COST.weights_ms(MACHINE, one) == COST.weights_ms(MACHINE, three)
    for part in (COST.cache_ms, COST.products_ms, COST.attention_ms):
        assert part(MACHINE, three) == pytest.approx(3 * part(MACHINE, one))


def test_of_experts_a_step_has_those_that_its_tokens_choose() -> None:
    experts = Layers(80_000_000, {"float32": 20_000_000})
    cost = dataclasses.replace(COST, experts=experts, num_experts=8, experts_per_token=2)
    for num_tokens in (1, 3, 40):
        added = cost.weights_ms(MACHINE, [Row(0, num_tokens)]) - COST.weights_ms(MACHINE, [Row(0, num_tokens)])
        rng = np.random.default_rng(0)
        draws = rng.random((4000, num_tokens, 8)).argsort(-1)[..., :2]
        distinct = np.mean([len(np.unique(draw)) for draw in draws])
        assert added == pytest.approx(4 * distinct / 8, rel=0.02)
    added = cost.products_ms(MACHINE, [Row(0, 8)]) - COST.products_ms(MACHINE, [Row(0, 8)])
    assert added == pytest.approx(8 * 2 / 8 * 0.4)
    assert cost.macs_per_token["float32"] == 10_000_000 + 5_000_000


def _graph(weights: dict[str, tuple[int, ...]], nodes: list[onnx.NodeProto], folder: Path) -> Path:
    initializers = [
        onnx.numpy_helper.from_array(np.zeros(dims, np.uint8 if len(dims) == 4 else np.float32), name)
        for name, dims in weights.items()
    ]
    initializers += [onnx.numpy_helper.from_array(np.array(number), f"is.{number}") for number in (2, 30)]
    graph = onnx.helper.make_graph(nodes, "tiny", [], [], initializers)
    path = folder / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    return path


@pytest.fixture
def model(demo_engine: Path) -> ModelEngine:
    """One layer of two heads of 8, sharing keys and values, and 60 tokens."""
    sizes = {"vocab_size": 60, "num_layers": 1, "num_kv_heads": 1, "head_dim": 8}
    return read_manifest(demo_engine).target.model_copy(update=sizes)


def test_experts_windows_and_packed_weights_are_read_from_the_graph(model: ModelEngine, tmp_path: Path) -> None:
    make = onnx.helper.make_node
    attention = [make("Attention", ["q", "k", "v", "mask"], [f"{name}.attended"]) for name in ("one", "many")]
    branches = [onnx.helper.make_graph([node], node.output[0], [], []) for node in attention]
    nodes = [
        make("MatMul", ["x", "qkv"], ["q"]),
        make("Less", ["distance", "is.30"], ["near"]),
        make("Unsqueeze", ["near", "axes"], ["mask"]),
        make("If", ["is_one"], ["attended"], then_branch=branches[0], else_branch=branches[1]),
        make("Int8Linear", ["attended", "o", "o.scales"], ["y"], domain="fly.cpu"),
        make("Gemm", ["y", "router"], ["scores"], transB=1),
        make("TopK", ["scores", "is.2"], ["best", "chosen"]),
        make("Reshape", ["chosen", "shape"], ["indices"]),
        make("GatherND", ["experts", "indices"], ["gathered"]),
        make("MatMul", ["gathered", "y"], ["z"]),
        make("Int8Linear", ["z", "vocabulary", "vocabulary.scales"], ["logits"], domain="fly.cpu"),
    ]
    weights = {"qkv": (12, 32), "o": (1, 4, 16, 4), "o.scales": (12,), "router": (6, 12), "experts": (6, 20, 12)}
    weights |= {"vocabulary": (4, 3, 16, 4), "vocabulary.scales": (60,)}
    cost = count_cost(onnx, _graph(weights, nodes, tmp_path), model)
    assert cost.windows == (30,)
    assert cost.attention_macs == 2 * 16
    assert cost.cache_bytes == 2 * 8 * 4
    assert (cost.num_experts, cost.experts_per_token) == (6, 2)
    assert cost.experts == Layers(6 * 20 * 12 * 4, {"float32": 6 * 20 * 12})
    assert cost.vocabulary == Layers(64 * 12 + 60 * 4, {"int8": 64 * 12})
    assert cost.layers.macs == {"float32": 12 * 32 + 6 * 12, "int8": 16 * 16}


def test_a_graph_without_known_attention_is_refused(model: ModelEngine, tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("MatMul", ["x", "vocabulary"], ["logits"])]
    with pytest.raises(ConfigError, match="0 of 1 layers have an operator that is known as attention"):
        count_cost(onnx, _graph({"vocabulary": (12, 60)}, nodes, tmp_path), model)


def test_a_branch_for_each_case_counts_its_product_once(model: ModelEngine, tmp_path: Path) -> None:
    make = onnx.helper.make_node
    branches = [
        onnx.helper.make_graph([make("MatMul", [name, "vocabulary"], [f"{name}.logits"])], name, [], [])
        for name in ("all", "last")
    ]
    nodes = [
        make("Attention", ["q", "k", "v"], ["attended"]),
        make("MatMul", ["attended", "o"], ["y"]),
        make("If", ["is_prompt"], ["logits"], then_branch=branches[0], else_branch=branches[1]),
    ]
    cost = count_cost(onnx, _graph({"o": (16, 12), "vocabulary": (12, 60)}, nodes, tmp_path), model)
    assert cost.vocabulary.macs == {"float32": 12 * 60}
    assert cost.layers.macs == {"float32": 16 * 12}


def test_attention_of_plugins_is_known_with_its_window(model: ModelEngine, tmp_path: Path) -> None:
    make = onnx.helper.make_node
    nodes = [
        make("CacheAttention", ["q", "", "", "at", "keys", "values"], ["attended"], domain="fly.cpu", window=12),
        make("MatMul", ["attended", "o"], ["y"]),
        make("MatMul", ["y", "vocabulary"], ["logits"]),
    ]
    cost = count_cost(onnx, _graph({"o": (16, 12), "vocabulary": (12, 60)}, nodes, tmp_path), model)
    assert cost.windows == (12,)
    assert cost.attention_macs == 2 * 16
