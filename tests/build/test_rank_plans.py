"""Plans of all ranks of a sharded model, really built by TensorRT-RTX, which needs no GPU for it: one file a rank, with
native attention and the collectives that the architecture needs.
"""

import filecmp
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import transformers
from merged_ranks import rank_graph
from safetensors.torch import load_file, save_file

from fly_build.backends.tensorrt import _check_collectives
from fly_build.checkpoint import open_checkpoint
from fly_build.pipeline import Plan, build, make_plan
from fly_build.recipe import load_recipe
from fly_build.sharding import shard
from fly_build.tensorrt_builder import EngineBuilder, Sizes
from fly_build.tensorrt_graph import fix_cache_length
from fly_trt.engines.tensorrt_library import Library, import_library
from fly_trt.errors import CheckpointError, ConfigError
from fly_trt.manifest import Limits, TensorRTLibrary, read_manifest
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


def _plan(target: object, output: Path, **fields: Any) -> Plan:
    flags = {"backend": "tensorrt", "tensorrt_library": "tensorrt_rtx", "target": str(target), "max_seq_len": 64}
    sizes = {"max_num_tokens": 64, "max_draft_len": 8}
    return make_plan(load_recipe(None, flags | sizes | fields), output)


def _silent(step: str, fraction: float) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [("llama", 4), pytest.param("phi3", 2, marks=pytest.mark.long), ("olmo2", 2), ("qwen3_moe", 2)],
)
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


def test_tensorrt_reads_every_collective_as_one_of_all_ranks(tmp_path: Path) -> None:
    folder = _checkpoint("llama", tmp_path / "checkpoint")
    checkpoint = open_checkpoint(str(folder))
    graph = rank_graph(checkpoint, shard("here", checkpoint.config, checkpoint.head_dim, 4), 1)
    limits = Limits(max_batch_size=4, max_seq_len=64, max_draft_len=8, max_num_tokens=64)
    fix_cache_length(graph, Sizes.of(limits).cache_tokens)
    ir.save(graph, tmp_path / "rank.onnx")
    library = import_library("tensorrt_rtx")
    _, network = EngineBuilder(library, Sizes.of(limits), "float32", None, None)._parse(tmp_path / "rank.onnx")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    collectives = [layer for layer in layers if layer.type == library.trt.LayerType.DIST_COLLECTIVE]
    assert len(collectives) == NUM_COLLECTIVES["llama"]
    for layer in collectives:
        assert layer.num_ranks == 4
        assert tuple(layer.get_output(0).shape) == tuple(layer.get_input(0).shape)


def test_the_draft_runs_on_the_first_gpu_or_is_spread_too(tmp_path: Path) -> None:
    checkpoint = str(_checkpoint("llama", tmp_path / "checkpoint"))
    for size, files in ((1, ["draft/model.plan"]), (2, ["draft/model.rank0.plan", "draft/model.rank1.plan"])):
        plan = _plan(
            checkpoint, tmp_path / "engine", draft=checkpoint, inner_draft=checkpoint, tp_size=2, draft_tp_size=size
        )
        target, draft, inner = (model.engine for model in plan.models)
        assert target.tensor_parallel_size == 2
        assert [draft.model, *draft.other_ranks] == files
        assert inner.model == "inner_draft/model.plan"


def test_ctrl_c_in_the_second_rank_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    plan = _plan(_checkpoint("llama", tmp_path / "checkpoint", num_hidden_layers=1), folder / "engine", tp_size=2)
    seen: list[str] = []

    def report(step: str, fraction: float) -> None:
        seen.append(step)
        if step == "target rank 1 of 2: compile" and 0 < fraction < 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(plan, report)
    assert "target rank 1 of 2: compile" in seen
    assert list(folder.iterdir()) == []


def test_values_that_do_not_fit_are_refused_when_their_rank_is_written(tmp_path: Path) -> None:
    """A part of a tensor is read when it is written, and checked then."""
    folder = _checkpoint("llama", tmp_path / "checkpoint", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][0, -1] = float("nan")  # in the columns of the last rank
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    steps: list[str] = []
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} has NaN values") as refused:
        build(_plan(folder, tmp_path / "engines" / "engine", tp_size=2), lambda step, fraction: steps.append(step))
    assert "\n" not in str(refused.value)
    assert steps[-1] == "target rank 1 of 2: write weights"
    assert list((tmp_path / "engines").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "too_old", "new_enough"),
    [
        ("tensorrt", "11.2.0.43", "11.3.0.14"),
        ("tensorrt_rtx", "1.7.0.35", "1.7.1.116"),
        ("tensorrt", "10.16.0.1", "12.0"),
    ],
)
def test_a_library_that_may_leave_out_sums_is_refused(name: TensorRTLibrary, too_old: str, new_enough: str) -> None:
    _check_collectives(_Installed(name, new_enough))
    with pytest.raises(
        ConfigError, match=rf"^tp_size: {name} {too_old} may leave out sums .*: install {name} [\d.]+ or newer$"
    ):
        _check_collectives(_Installed(name, too_old))


class _Installed(Library):
    """A library of which only the version is asked."""

    def __init__(self, name: TensorRTLibrary, version: str) -> None:
        self.name, self.number = name, version

    @property
    def version(self) -> str:
        return self.number


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "three ranks": ({"tp_size": 3}, "tp_size 3: expected 1, or 2, 4, 8 GPUs of one machine"),
    "another backend": (
        {"tp_size": 2, "backend": "onnxruntime", "tensorrt_library": None},
        "tp_size 2: an engine of backend onnxruntime runs on one device: use --backend tensorrt or leave --tp-size out",
    ),
    "some of the ranks": (
        {"tp_size": 4, "draft": "org/draft", "draft_tp_size": 2},
        "draft_tp_size 2: the draft runs on the first of the target's 4 GPUs or on all of them: "
        "use --draft-tp-size 1 or 4",
    ),
    "no draft": (
        {"tp_size": 4, "draft_tp_size": 4},
        "draft_tp_size 4: there is no draft: add --draft, or leave it out",
    ),
    "odd columns": (
        {"tp_size": 4},
        ".*: 98 columns of an MLP .intermediate_size. cannot be divided among 4 ranks: use --tp-size 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_spread_is_refused_before_weights_are_read(case: str, tmp_path: Path) -> None:
    fields, message = REFUSED[case]
    folder = _checkpoint("llama", tmp_path / "checkpoint", intermediate_size=98)
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises((ConfigError, CheckpointError), match=f"^{message}$"):
        _plan(folder, tmp_path / "engine", **fields)
