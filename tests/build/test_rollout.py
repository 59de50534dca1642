"""The graph of several greedy steps, made of a decoder; tests/engines/test_rollouts.py runs it."""

from pathlib import Path

import onnx_ir as ir
import pytest

from fly_build.rollout import make_rollout
from fly_trt.engines.rollouts import NUM_STEPS, ROLLOUT_OUTPUTS
from key_block_engine import LAYERS, key_block_engine


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, cpu_library: Path) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    key_block_engine(folder, cpu_library, num_slots=1).close()
    return folder / "model.onnx"


def names(values: list[ir.Value]) -> list[str | None]:
    return [value.name for value in values]


def test_a_rollout_has_the_decoders_weights_and_what_its_gate_needs(decoder: Path) -> None:
    model, whole = ir.load(decoder), ir.load(decoder)
    assert make_rollout(model)
    pasts = [f"past_{name}.{layer}" for layer in range(LAYERS) for name in ("key", "value")]
    assert names(model.graph.inputs) == [
        NUM_STEPS,
        "input_ids",
        "write_indices",
        "logits_positions",
        "next_tokens",
        *pasts,
    ]
    assert names(model.graph.outputs) == list(ROLLOUT_OUTPUTS)
    added = set(model.graph.initializers) - set(whole.graph.initializers)
    assert len(added) == 1
    for name, value in model.graph.initializers.items():
        if name not in added:
            assert value.const_value.numpy().tobytes() == whole.graph.initializers[name].const_value.numpy().tobytes()
    assert "fly.stop_token_ids" in set(whole.graph.initializers) - set(model.graph.initializers), "no draft is judged"


def test_where_a_cache_is_not_cache_attentions_there_is_none_and_the_graph_stays(decoder: Path) -> None:
    """A loop would copy such a cache in every step."""
    model = ir.load(decoder)
    attention = next(node for node in model.graph if node.op_type == "CacheAttention")
    other = ir.node("Identity", [attention.inputs[4]])
    model.graph.insert_before(attention, other)
    attention.replace_input_with(4, other.outputs[0])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not make_rollout(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
