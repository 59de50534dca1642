"""What a checkpoint's files hold against what its config.json announces: followed as transformers follows it, or
refused; and float values are neither rounded on the way nor stored where they do not fit.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fly_build.checkpoint import open_checkpoint
from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe
from fly_build.tensors import check_values
from fly_trt.errors import CheckpointError
from fly_trt.manifest import read_manifest
from tiny_models import SHAPE, Runner, add_demo_tokenizer, reference_logits, save_tiny, tiny_llama

Tensors = dict[str, torch.Tensor]
IDS = np.random.default_rng(0).integers(2, SHAPE["vocab_size"], (1, 24))
Q_PROJ = "model.layers.0.self_attn.q_proj"
SMALL = {"num_hidden_layers": 1}


def _rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key not in remove}
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def _built_logits(folder: Path, **flags: Any) -> np.ndarray:
    """[T, V] of the engine that fly-build makes of a checkpoint."""
    engine = folder.with_name(f"{folder.name}-engine")
    add_demo_tokenizer(folder)
    recipe = load_recipe(None, {"target": str(folder), "max_seq_len": 64, **flags})
    build(make_plan(recipe, engine), lambda step, fraction: None)
    return Runner(engine / "target" / "model.onnx", open_checkpoint(str(folder)), 1).step(IDS, [0])["logits"][0]


def _transformers_logits(folder: Path) -> np.ndarray:
    """In float32, as transformers itself reads the checkpoint."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return reference_logits(model.eval(), IDS[0])[0]


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said of tensors: the tokenizer of these checkpoints has more tokens than they have embeddings."""
    records = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("fly_build")]
    return [message for r in records if "the tokenizer has tokens" not in (message := r.getMessage())]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensors") / "tiny"
    save_tiny(tiny_llama(**SMALL), folder)
    return folder


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(tiny, tmp_path / "copied"))


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3Config", "Gemma2Config"])
def test_output_weights_that_differ_from_tied_embeddings_are_used_as_transformers_uses_them(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoint"
    save_tiny(getattr(transformers, name)(**(SHAPE | SMALL), head_dim=16, tie_word_embeddings=True), folder)
    tied = _transformers_logits(folder)
    other = 0.2 * torch.randn(SHAPE["vocab_size"], SHAPE["hidden_size"])
    _rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": other}))
    expected = _transformers_logits(folder)
    assert np.abs(expected - tied).max() > 0.1, "the other weights must show"
    np.testing.assert_allclose(_built_logits(folder), expected, atol=1e-4, rtol=0)
    (warning,) = _warnings(caplog)
    assert "lm_head.weight differs from the embeddings" in warning
    source = read_manifest(folder.with_name("checkpoint-engine")).target.source
    assert source.num_parameters == sum(t.numel() for t in load_file(folder / "model.safetensors").values())


def test_output_weights_equal_to_tied_embeddings_are_stored_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoint"
    save_tiny(tiny_llama(**SMALL, tie_word_embeddings=True), folder)
    _rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    np.testing.assert_allclose(_built_logits(folder), _transformers_logits(folder), atol=1e-4, rtol=0)
    engine = folder.with_name("checkpoint-engine")
    tensors = load_file(folder / "model.safetensors")
    distinct = sum(tensor.numel() for name, tensor in tensors.items() if name != "lm_head.weight")
    assert read_manifest(engine).target.source.num_parameters == distinct
    assert (engine / "target" / "model.onnx.data").stat().st_size < 4 * distinct * 1.1
    assert _warnings(caplog) == []


@pytest.mark.parametrize("name", [f"{Q_PROJ}.bias", "model.layers.0.self_attn.q_norm.weight", "lm_head.bias"])
def test_tensor_inside_of_the_computation_that_the_config_does_not_announce_is_refused(name: str, copied: Path) -> None:
    _rewrite(copied, lambda tensors: tensors.update({name: torch.randn(16)}))
    with pytest.raises(CheckpointError, match=rf"announces no {name}: the model would compute something else") as error:
        open_checkpoint(str(copied)).load_weights()
    assert ("attention_bias" in str(error.value)) == name.endswith("bias")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [("model.layers.0.mlp.up_proj.weight", (7, 64), (96, 64)), ("model.embed_tokens.weight", (170, 64), (160, 64))],
)
def test_tensor_of_another_shape_is_named_with_both_shapes(
    name: str, shape: tuple[int, int], expected: tuple[int, int], copied: Path
) -> None:
    _rewrite(copied, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(str(copied)).load_weights()
    start = f"{copied}: {name} has shape {list(shape)}, config.json makes it {list(expected)}: "
    assert str(refused.value) == f"{start}correct config.json, or download it again"


def test_all_tensors_of_another_shape_are_counted(copied: Path) -> None:
    _edit_config(copied, vocab_size=150, intermediate_size=90)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[160, 64\], .*\[150, 64\]; .* and 2 more: "):
        open_checkpoint(str(copied)).load_weights()


def test_output_weights_of_another_shape_than_tied_embeddings_are_named(tmp_path: Path) -> None:
    save_tiny(tiny_llama(**SMALL, tie_word_embeddings=True), tmp_path)
    _rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(170, 64)}))
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight has shape \[170, 64\], config\.json makes it \[160, 64\]"
    ):
        open_checkpoint(str(tmp_path)).load_weights()


def test_bias_of_zeros_and_rotary_buffers_are_left_out_and_named(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = load_file(copied / "model.safetensors")
    extra = {f"{Q_PROJ}.bias": torch.zeros(64), "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(8)}
    _rewrite(copied, lambda tensors: tensors.update(extra))
    tensors = open_checkpoint(str(copied)).load_weights()
    assert tensors.keys() == stored.keys()
    (warning,) = _warnings(caplog)
    assert warning.endswith(f"not announce them: {', '.join(sorted(extra))}")


def test_bias_of_zeros_does_not_let_one_of_other_values_pass(copied: Path) -> None:
    values = torch.zeros(64)
    values[63] = 1e-3
    extra = {f"{Q_PROJ}.bias": torch.zeros(64), "model.layers.0.self_attn.k_proj.bias": values[-32:]}
    _rewrite(copied, lambda tensors: tensors.update(extra))
    with pytest.raises(
        CheckpointError, match=r"announces no model\.layers\.0\.self_attn\.k_proj\.bias: the model would"
    ):
        open_checkpoint(str(copied)).load_weights()


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight", f"{Q_PROJ}.bias"]
)
def test_unused_float32_tensor_does_not_make_the_others_float32(name: str, tmp_path: Path) -> None:
    save_tiny(tiny_llama(**SMALL, tie_word_embeddings=True), tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    _rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(64)}))
    tensors = open_checkpoint(str(tmp_path)).load_weights()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()


def test_bias_of_a_layer_of_experts_is_refused(tmp_path: Path) -> None:
    save_tiny(transformers.MixtralConfig(**(SHAPE | SMALL), num_local_experts=2), tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.bias"
    _rewrite(tmp_path, lambda tensors: tensors.update({name: torch.randn(96)}))
    with pytest.raises(CheckpointError, match=r"announces no model\.layers\.0\.\S*experts\.0\.w1\.bias"):
        open_checkpoint(str(tmp_path)).load_weights()


def test_tensors_beside_the_model_are_left_out_and_named(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {f"model.layers.{layer}.mlp.{kind}_proj.weight": torch.ones(3, 3) for layer in (1, 2) for kind in "ab"}
    _rewrite(copied, lambda tensors: tensors.update(extra | {"score.weight": torch.ones(2, 64)}))
    tensors = open_checkpoint(str(copied)).load_weights()
    assert not extra.keys() & tensors.keys()
    (warning,) = _warnings(caplog)
    assert warning.endswith("config.json does not announce them: model.layers.1.*, model.layers.2.*, score.weight")


def test_rotary_frequencies_of_old_checkpoints_are_no_surprise(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _rewrite(copied, lambda tensors: tensors.update({name: torch.ones(8)}))
    open_checkpoint(str(copied)).load_weights()
    assert _warnings(caplog) == []


def _rename(folder: Path, old: str, new: str) -> None:
    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    _rewrite(folder, rename)


@pytest.mark.parametrize(
    ("old", "new"), [("", "language_model."), ("model.", "model.language_model."), ("model.", "model.text_model.")]
)
def test_tensors_of_a_larger_model_are_recognised_by_their_prefix(old: str, new: str, copied: Path) -> None:
    _rename(copied, old, new)
    prefix = f"{new}{'model.' if not old else ''}"
    with pytest.raises(CheckpointError, match=f"its tensors begin with '{prefix}'.*multimodal.*: save its text deco"):
        open_checkpoint(str(copied)).load_weights()


@pytest.mark.parametrize(
    ("old", "new", "prefix"),
    [
        ("", "_orig_mod.", "_orig_mod."),
        ("", "module.", "module."),
        ("", "module._orig_mod.", "module._orig_mod."),
        ("model.", "transformer.", "transformer."),
    ],
)
def test_names_that_a_wrapper_left_are_named_and_not_called_multimodal(
    old: str, new: str, prefix: str, copied: Path
) -> None:
    _rename(copied, old, new)
    with pytest.raises(CheckpointError, match=f"its tensors begin with '{prefix}'.*: save it without") as refused:
        open_checkpoint(str(copied)).load_weights()
    assert "multimodal" not in str(refused.value)


@pytest.mark.parametrize("named", ["bfloat16", "float16", None])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_float32_weights_stay_what_they_are_whatever_the_config_calls_them(
    key: str, named: str | None, copied: Path
) -> None:
    stored = load_file(copied / "model.safetensors")
    _edit_config(copied, ("dtype", "torch_dtype"), **({key: named} if named else {}))
    tensors = open_checkpoint(str(copied)).load_weights()
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys(stored, torch.float32)
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)


def test_built_float32_engine_computes_with_all_the_bits_of_a_float32_fine_tune(copied: Path) -> None:
    _edit_config(copied, dtype="bfloat16")
    np.testing.assert_allclose(_built_logits(copied, dtype="float32"), _transformers_logits(copied), atol=1e-4, rtol=0)


def test_float32_norms_in_a_bfloat16_file_stay_what_they_are(tmp_path: Path) -> None:
    save_tiny(tiny_llama(**SMALL), tmp_path, dtype=torch.bfloat16)
    norm = torch.randn(64)
    _rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": norm}))
    stored = load_file(tmp_path / "model.safetensors")
    tensors = open_checkpoint(str(tmp_path)).load_weights()
    assert torch.equal(tensors["model.norm.weight"], norm)
    assert all(torch.equal(tensors[name].float(), stored[name].float()) for name in stored)


def test_shards_of_different_dtypes_are_all_looked_at(tmp_path: Path) -> None:
    save_tiny(tiny_llama(**SMALL), tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {"first.safetensors": tensors, "second.safetensors": {"model.norm.weight": torch.randn(64)}}
    del tensors["model.norm.weight"]
    for name, content in shards.items():
        save_file(content, tmp_path / name, metadata={"format": "pt"})
    places = {key: name for name, content in shards.items() for key in content}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    loaded = open_checkpoint(str(tmp_path)).load_weights()
    assert torch.equal(loaded["model.norm.weight"], shards["second.safetensors"]["model.norm.weight"])


@pytest.mark.parametrize("index", [[], {}, 5, {"weight_map": []}, {"weight_map": {"x": 5}}, {"weight_map": {}}])
def test_wrong_index_of_shards_is_refused_in_one_line(index: Any, copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "shard.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"^{copied}: the weights do not load: [A-Za-z]+Error: ") as refused:
        open_checkpoint(str(copied)).load_weights()
    assert "\n" not in str(refused.value)


def test_quantised_tensors_without_a_quantization_config_are_refused(copied: Path) -> None:
    _rewrite(copied, lambda tensors: tensors.update({f"{Q_PROJ}.weight": tensors[f"{Q_PROJ}.weight"].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is stored as I8, which looks quantised"):
        open_checkpoint(str(copied)).load_weights()


@pytest.mark.parametrize(
    ("value", "dtype", "advice"),
    [
        (70000.0, "float16", r"values up to 70000, float16 ends at 65504: use --dtype bfloat16 or float32"),
        (-70000.0, "float16", r"values up to 70000, float16 ends at 65504: use --dtype bfloat16 or float32"),
        (3.4e38, "bfloat16", r"bfloat16 ends at 3\.38953e\+38: use --dtype float32"),
        (float("nan"), "float16", r"has NaN values, in any dtype: the checkpoint is broken"),
        (float("nan"), "float32", r"has NaN values, in any dtype: the checkpoint is broken"),
        (float("-inf"), "float32", r"has infinite values, in any dtype: the checkpoint is broken"),
    ],
)
def test_values_that_cannot_be_stored_are_refused_with_the_advice_that_helps(
    value: float, dtype: str, advice: str, copied: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{Q_PROJ}.weight"][3, 5] = value

    _rewrite(copied, spoil)
    tensors = open_checkpoint(str(copied)).load_weights()
    with pytest.raises(CheckpointError, match=advice) as error:
        check_values("here", tensors, getattr(torch, dtype))
    assert f"{Q_PROJ}.weight" in str(error.value)


def test_build_refuses_values_that_do_not_fit_and_leaves_nothing(copied: Path) -> None:
    _rewrite(copied, lambda tensors: tensors[f"{Q_PROJ}.weight"].mul_(1e6))
    with pytest.raises(CheckpointError, match="float16 ends at 65504: use --dtype bfloat16 or float32"):
        _built_logits(copied, dtype="float16")
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_round_to_the_largest_of_a_dtype_fit(stored: torch.dtype) -> None:
    tensors = {"w": torch.tensor([-65504.0, 1.0]).to(stored), "few": torch.zeros(0, dtype=stored)}
    if stored == torch.bfloat16:  # rounds to 65536
        with pytest.raises(CheckpointError, match="float16 ends at 65504"):
            check_values("here", tensors, torch.float16)
    else:
        check_values("here", tensors, torch.float16)
    check_values("here", {"w": torch.tensor([65519.0])}, torch.float16)
