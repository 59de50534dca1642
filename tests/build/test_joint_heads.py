"""Query, key and value of an int8 graph go to attention together, where nothing stands in between."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from fly_build import linear_forms
from fly_build.checkpoint import open_checkpoint
from fly_build.rowwise_forms import RowwiseInt8
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
    }


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
