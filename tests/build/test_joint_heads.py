"""Query, key and value of an int8 graph go to attention together, where nothing stands in between."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import transformers

from fly_build import linear_forms
from fly_build.checkpoint import open_checkpoint
from fly_build.graph_edits import GraphEdits
from fly_build.joint_heads import join_heads
from fly_build.rowwise_forms import RowwiseInt8
from fly_trt.engines.onnxruntime import session_options
from tiny_models import MAX_SEQ_LEN, SHAPE, Runner, count_operators, finish_graph, save_tiny, tiny_llama
from traced_once import export_once

NUM_LAYERS = SHAPE["num_hidden_layers"]
INT8 = ("cpu", "int8")


def graphs(config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], dict[str, int]]:
    """Operators of the graph as it is built, and of one in which query, key and value stay apart. Both have said the
    same of the same tokens: a prompt, single tokens behind it, and rows at different positions."""
    save_tiny(config, folder)
    checkpoint = open_checkpoint(str(folder))
    form = linear_forms.FORMS[INT8]
    assert isinstance(form, RowwiseInt8)
    counts, said = [], []
    for name, joins_heads in (("joined", True), ("apart", False)):
        monkeypatch.setitem(linear_forms.FORMS, INT8, replace(form, joins_heads=joins_heads))
        path = folder / f"{name}.onnx"
        counts.append(
            count_operators(finish_graph(export_once(checkpoint, MAX_SEQ_LEN), checkpoint, path, "float32", "int8"))
        )
        runner, tokens = Runner(path, checkpoint), np.random.default_rng(0)
        steps = [(16, [0, 3]), (1, [16, 19]), (1, [17, 5]), (7, [12, 20])]
        ids = [tokens.integers(3, SHAPE["vocab_size"], (2, length)) for length, _ in steps]
        outputs = [runner.step(step_ids, at)["logits"] for step_ids, (_, at) in zip(ids, steps, strict=True)]
        said.append(outputs + list(runner.cache.values()))
    for one, other in zip(*said, strict=True):
        np.testing.assert_array_equal(one, other)
    return counts[0], counts[1]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(tiny_llama, id="llama"),
        pytest.param(
            lambda: transformers.MistralConfig(**SHAPE, sliding_window=12), id="sliding", marks=pytest.mark.long
        ),
    ],
)
def test_a_layer_has_one_rotation_and_one_way_to_heads_with_the_same_bits(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined, apart = graphs(config(), tmp_path, monkeypatch)
    assert (joined["RotaryEmbedding"], apart["RotaryEmbedding"]) == (NUM_LAYERS, 2 * NUM_LAYERS)
    fewer = {name: apart[name] - count for name, count in joined.items() if apart[name] != count}
    assert fewer == {
        "RotaryEmbedding": NUM_LAYERS,
        "Transpose": 2 * NUM_LAYERS,
        "Reshape": 2 * NUM_LAYERS,
        "Split": -NUM_LAYERS,
        "Concat": 1,  # the form of one projection's heads
    }


QUERIES, KEYS, DIM = 2, 1, 4


def hand_made(num_heads: tuple[int, ...], sizes: list[int], axis: int) -> ir.Model:
    """x [B, T, W] is split into three, each is brought to so many heads, and the first two are rotated."""
    width = sum(heads * DIM for heads in num_heads) if axis == 2 else num_heads[0] * DIM

    def value(name: str, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    x, cos, sin = value("x", "B", "T", width), value("cos", "B", "T", DIM // 2), value("sin", "B", "T", DIM // 2)
    graph = ir.Graph([x, cos, sin], [], nodes=[], opset_imports={"": 24}, name="hand made")

    def constant(name: str, numbers: list[int]) -> ir.Value:
        made = ir.val(name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
        graph.register_initializer(made)
        return made

    split = ir.node("Split", [x, constant("sizes", sizes)], {"axis": axis}, num_outputs=3)
    graph.append(split)
    forms: dict[int, ir.Value] = {}
    for part, (name, heads) in zip(split.outputs, zip("qkv", num_heads, strict=True), strict=True):
        part.name, part.type, part.shape = f"{name}.part", x.type, ir.Shape(["B", "T", heads * DIM])
        forms[heads] = forms.get(heads) or constant(f"{heads}.form", [0, 0, heads, DIM])
        reshape = ir.node("Reshape", [part, forms[heads]])
        transpose = ir.node("Transpose", [reshape.outputs[0]], {"perm": [0, 2, 1, 3]})
        graph.extend([reshape, transpose])
        result = transpose.outputs[0]
        result.type, result.shape = x.type, ir.Shape(["B", heads, "T", DIM])
        if name != "v":
            rotary = ir.node("RotaryEmbedding", [result, cos, sin])
            graph.append(rotary)
            result = rotary.outputs[0]
        result.type, result.shape = x.type, ir.Shape(["B", heads, "T", DIM])
        attended = ir.node("Identity", [result])
        graph.append(attended)
        output = attended.outputs[0]
        output.name, output.type, output.shape = name, result.type, result.shape
        graph.outputs.append(output)
    return ir.Model(graph, ir_version=11)


def said_by(model: ir.Model, tokens: int) -> list[np.ndarray]:
    options = session_options()
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    rng, feeds = np.random.default_rng(0), {}
    for given in session.get_inputs():
        feeds[given.name] = rng.standard_normal((2, tokens, given.shape[2]), np.float32)
    return session.run(["q", "k", "v"], feeds)


@pytest.mark.parametrize("num_heads", [(QUERIES, KEYS, KEYS), (QUERIES, QUERIES, QUERIES)])
def test_each_way_to_heads_may_say_how_many_it_has(num_heads: tuple[int, ...]) -> None:
    sizes = [heads * DIM for heads in num_heads]
    before = said_by(hand_made(num_heads, sizes, 2), 5)
    model = hand_made(num_heads, sizes, 2)
    join_heads(GraphEdits(model.graph, "float32"))
    assert (count_operators(model)["RotaryEmbedding"], count_operators(model)["Reshape"]) == (1, 1)
    assert not [name for name, value in model.graph.initializers.items() if not value.uses() and ".form" in name]
    for one, other in zip(before, said_by(model, 5), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_split_of_the_tokens_is_not_one_of_query_key_and_value() -> None:
    model = hand_made((QUERIES, QUERIES, QUERIES), [1, 2, 2], 1)
    join_heads(GraphEdits(model.graph, "float32"))
    assert count_operators(model)["RotaryEmbedding"] == 2


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: transformers.Qwen2Config(**SHAPE), id="biases"),
        pytest.param(lambda: transformers.Qwen3Config(**SHAPE, head_dim=16), id="norms", marks=pytest.mark.long),
        pytest.param(
            lambda: transformers.SmolLM3Config(**SHAPE, no_rope_layer_interval=1),
            id="no positions",
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_has_something_in_between_stays_as_it_is(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, apart = graphs(config(), tmp_path, monkeypatch)
    assert built == apart
