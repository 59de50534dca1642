"""Plans of all ranks of a sharded model, really built by TensorRT-RTX, which needs no GPU for it: one file a rank, with
native attention and the collectives that the architecture needs.
"""

import filecmp
from pathlib import Path
from typing import Any

import pytest
import transformers

from fly_build.pipeline import Plan, build, make_plan
from fly_build.recipe import load_recipe
from fly_trt.manifest import read_manifest
from tiny_models import SHAPE, add_demo_tokenizer, save_tiny

pytest.importorskip("tensorrt_rtx")

# TensorRT-RTX has no kernel for a rank with fewer than four query heads.
TINY: dict[str, Any] = {**SHAPE, "vocab_size": 896, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 16}
NUM_LAYERS = TINY["num_hidden_layers"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
CONFIGS = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
}
# One behind each attention and each MLP, one behind the embeddings and one behind the logits; and olmo2's two norms.
NUM_COLLECTIVES = dict.fromkeys(CONFIGS, 2 * NUM_LAYERS + 2) | {"olmo2": 4 * NUM_LAYERS + 2}


def _checkpoint(name: str, folder: Path, **changes: Any) -> Path:
    kind, fields = CONFIGS[name]
    save_tiny(getattr(transformers, kind)(**TINY | fields | changes), folder)
    add_demo_tokenizer(folder)
    return folder


def _plan(target: Path, output: Path, **fields: Any) -> Plan:
    flags = {"backend": "tensorrt", "tensorrt_library": "tensorrt_rtx", "target": str(target), "max_seq_len": 64}
    sizes = {"max_num_tokens": 64, "max_draft_len": 8}
    return make_plan(load_recipe(None, flags | sizes | fields), output)


def _silent(step: str, fraction: float) -> None:
    pass


@pytest.mark.parametrize(("name", "num_ranks"), [("llama", 4), ("phi3", 2), ("olmo2", 2), ("qwen3_moe", 2)])
def test_each_rank_has_a_plan_with_native_attention_and_its_collectives(
    name: str, num_ranks: int, tmp_path: Path
) -> None:
    """Of two key-value heads; four ranks have the same one in pairs."""
    steps: list[str] = []
    checkpoint = _checkpoint(name, tmp_path / "checkpoint")
    plan = _plan(checkpoint, tmp_path / "engine", tp_size=num_ranks)
    build(plan, lambda step, fraction: steps.append(step) if fraction == 0.0 else None)
    target = read_manifest(tmp_path / "engine", verify_hashes=True).target
    files = [f"target/model.rank{rank}.plan" for rank in range(num_ranks)]
    assert [target.model, *target.other_ranks] == files
    assert sorted(path.name for path in (tmp_path / "engine" / "target").iterdir()) == [
        Path(file).name for file in files
    ]
    assert (target.tensor_parallel_size, target.num_kv_heads, target.rank_kv_heads) == (num_ranks, 2, 1)
    assert target.tensorrt is not None
    assert target.tensorrt.layers.model_dump(exclude={"total"}) == {
        "native_attention": NUM_LAYERS,
        "decomposed_attention": 0,
        "kv_cache_update": 2 * NUM_LAYERS,
        "plugin": 0,
        "collective": NUM_COLLECTIVES[name],
    }
    sizes = [(tmp_path / "engine" / file).stat().st_size for file in files]
    assert max(sizes) - min(sizes) < 0.02 * max(sizes)
    assert [step for step in steps if "compile" in step] == [
        f"target rank {rank} of {num_ranks}: compile" for rank in range(num_ranks)
    ]
    first, *others = (tmp_path / "engine" / file for file in files)
    assert not any(filecmp.cmp(first, other, shallow=False) for other in others)
