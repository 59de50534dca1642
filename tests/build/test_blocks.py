"""Blocks of a decoder: run one by one they are what transformers computes, and without some of them what it computes
where their last projections are zero.
"""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_architectures import CONFIGS

from fly_build.blocks import BlockDecoder, check_blocks
from fly_build.checkpoint import SUPPORTED_MODEL_TYPES, Checkpoint, open_checkpoint
from fly_build.knapsack import always_kept, candidates
from fly_trt.errors import CheckpointError
from tiny_models import (
    MAX_SEQ_LEN,
    SHAPE,
    Runner,
    count_operators,
    finish_graph,
    reference_logits,
    save_tiny,
    tiny_llama,
)
from traced_once import export_once

NUM_LAYERS = 4
SKIPPED = (2, 5)  # the attention of layer 1 and the MLP of layer 2
LAST_PROJECTIONS = ("o_proj", "down_proj")


def deeper(name: str) -> Any:
    """The configuration of test_architectures with more layers."""
    config = CONFIGS[name]()
    fields = config.to_dict() | {"num_hidden_layers": NUM_LAYERS}
    for by_layer in ("layer_types", "no_rope_layers"):
        if isinstance(fields.get(by_layer), list):
            fields[by_layer] = (fields[by_layer] * NUM_LAYERS)[:NUM_LAYERS]
    return type(config).from_dict(fields)


def without(model: torch.nn.Module, skipped: Collection[int]) -> torch.nn.Module:
    """A copy in which these blocks add nothing."""
    changed = copy.deepcopy(model)
    layers: Any = changed.model.layers
    for block in skipped:
        half = layers[block // 2].mlp if block % 2 else layers[block // 2].self_attn
        with torch.no_grad():
            for name, parameter in half.named_parameters():
                if any(projection in name for projection in LAST_PROJECTIONS):
                    parameter.zero_()
    return changed


def tokens(num_tokens: int, num_rows: int = 2) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (num_rows, num_tokens)))


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: Any = model(input_ids=ids, use_cache=False)
    return output.logits


@pytest.mark.parametrize("name", SUPPORTED_MODEL_TYPES)
def test_every_architecture_can_skip_blocks(name: str, tmp_path: Path) -> None:
    model = save_tiny(deeper(name), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    check_blocks(checkpoint)
    decoder = BlockDecoder(checkpoint, checkpoint.load_weights())
    ids = tokens(30)
    for skipped in ((), SKIPPED):
        decoder.start(30)
        read = torch.cat([decoder.read(ids[:, :20], skipped), decoder.read(ids[:, 20:], skipped)], dim=1)
        expected = logits_of(without(model, skipped), ids)
        assert expected.std() > 0.1
        # The order is enough: a final soft cap or a scale is left out.
        assert torch.equal(decoder.logits(read).argmax(-1), expected.argmax(-1)), skipped
    decoder.rewind(20)
    hidden = decoder.look(ids[:, 20:])
    for block in range(2 * NUM_LAYERS):
        hidden = hidden if block in SKIPPED else decoder.run(block, hidden)
    torch.testing.assert_close(decoder.normed(hidden), decoder.read(ids[:, 20:], SKIPPED), atol=1e-4, rtol=1e-4)


def test_of_a_real_model_every_subset_is_found_where_no_two_weigh_the_same(tmp_path: Path) -> None:
    save_tiny(tiny_llama(num_hidden_layers=3), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    decoder = BlockDecoder(checkpoint, checkpoint.load_weights())
    ids = tokens(24)
    decoder.start(24)
    decoder.read(ids[:, :16])
    found = candidates(decoder, decoder.look(ids[:, 16:]), [2, 1] * 3, always_kept(6), 3)
    assert {one.skipped for one in found} <= {(), (2,), (3,), (2, 3)}
    assert len(found) > 2
    for one in found:
        hidden = decoder.look(ids[:, 16:])
        for block in set(range(6)) - set(one.skipped):
            hidden = decoder.run(block, hidden)
        assert torch.equal(one.hidden, hidden)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_an_exported_draft_computes_what_transformers_computes_without_the_blocks(name: str, tmp_path: Path) -> None:
    model = without(save_tiny(deeper(name), tmp_path), SKIPPED)
    checkpoint = open_checkpoint(str(tmp_path))
    decoder = export_once(checkpoint, MAX_SEQ_LEN, skipped=SKIPPED)
    unread = {parameter for parameter, value in decoder.parameters.items() if not value.uses()}
    assert {parameter.split(".")[2] for parameter in unread} <= {"1", "2"}
    assert all("norm" in parameter for parameter in unread)
    finish_graph(decoder, checkpoint, tmp_path / "draft.onnx", "float32", "none")
    operators = count_operators(decoder.model)
    assert operators["TensorScatter"] == 2 * (NUM_LAYERS - 1)
    assert "Silent" not in operators
    assert set(decoder.model.graph.opset_imports) == {"", "fly"}
    runner = Runner(tmp_path / "draft.onnx", checkpoint)
    ids = tokens(40).numpy()
    first = runner.step(ids[:, :30], [0, 0])["logits"]
    second = runner.step(ids[:, 30:], [30, 30])["logits"]
    expected = reference_logits(model, *ids)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), expected, atol=1e-4, rtol=0)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_that_keeps_all_its_layers_is_refused(tmp_path: Path) -> None:
    save_tiny(tiny_llama(num_hidden_layers=2), tmp_path)
    with pytest.raises(CheckpointError, match="2 layers, of which a self-draft keeps the first and the last"):
        check_blocks(open_checkpoint(str(tmp_path)))


class Parallel(torch.nn.Module):
    """A layer whose MLP reads what its attention reads."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.input_layernorm = layer.self_attn, layer.mlp, layer.input_layernorm

    def forward(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        return hidden_states + self.self_attn(normed, **named)[0] + self.mlp(normed)


class Whole(torch.nn.Module):
    """A layer of one piece."""


@pytest.mark.parametrize("kind", [Parallel, Whole])
def test_layers_of_another_kind_are_refused(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tiny_llama(num_hidden_layers=3), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    tensors = checkpoint.load_weights()
    make = Checkpoint.make_empty_model

    def changed(self: Checkpoint, dtype: torch.dtype) -> Any:
        model = make(self, dtype)
        layers = model.model.layers
        for index, layer in enumerate(layers):
            layers[index] = kind(layer) if kind is Parallel else kind()
        return model

    def read() -> None:
        check_blocks(checkpoint)
        names = checkpoint.empty_model.state_dict().keys()
        decoder = BlockDecoder(checkpoint, {name: tensors[name] for name in names})
        decoder.start(8)
        decoder.look(tokens(8))

    monkeypatch.setattr(Checkpoint, "make_empty_model", changed)
    with pytest.raises(CheckpointError, match="LlamaForCausalLM are not attention and then an MLP"):
        read()
