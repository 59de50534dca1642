"""A build from two checkpoints to an engine directory: what the directory holds, what half precision changes, and that
an engine directory is never half written, whatever ends the build.
"""

import hashlib
import importlib.metadata
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fly_trt
from fly_build.checkpoint import open_checkpoint
from fly_build.pipeline import Plan, build, make_plan
from fly_build.recipe import load_recipe
from fly_trt.errors import ConfigError
from fly_trt.manifest import MANIFEST_NAME, Head, Limits, Manifest, Source, read_manifest
from tiny_models import Runner, TinyPair, reference_logits

DATA = "target/model.onnx.data"
BOUNDS = {"float16": 0.003, "bfloat16": 0.04}


def _plan(output: Path, *, overwrite: bool = False, **flags: Any) -> Plan:
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return make_plan(load_recipe(None, flags), output, overwrite=overwrite)


def _silent(step: str, fraction: float) -> None:
    pass


def _raise_at(step: str, fraction: float, error: BaseException) -> Callable[[str, float], None]:
    def report(current_step: str, current_fraction: float) -> None:
        if current_step == step and current_fraction >= fraction:
            raise error

    return report


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _old_engine(output: Path) -> dict[str, bytes]:
    """Stands for an engine directory of an earlier build."""
    output.mkdir()
    (output / MANIFEST_NAME).write_text("{}", encoding="utf-8")
    (output / "old.bin").write_bytes(b"old weights")
    return _contents(output)


@pytest.fixture(scope="module")
def engine(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair in float32, built by a recipe file."""
    folder = tmp_path_factory.mktemp("engines")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: tiny\ntarget: {tiny_pair.target}\ndraft: {{checkpoint: {tiny_pair.draft}}}\n"
        "max_batch_size: 3\nmax_draft_len: 20\nmax_num_tokens: 48\nentropy_top_k: 4\n"
        "speculative: {num_speculative_tokens: 7, preset: paper}\n",
        encoding="utf-8",
    )
    output = folder / "deeper" / "pair"
    build(make_plan(load_recipe(str(recipe), {}), output), _silent)
    return output


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def half_engine(
    request: pytest.FixtureRequest, tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The tiny target alone in half precision, built over an older engine."""
    output = tmp_path_factory.mktemp("engines") / request.param
    _old_engine(output)
    build(_plan(output, overwrite=True, target=tiny_pair.target, dtype=request.param), _silent)
    return request.param, output


def _logits(engine: Path, tiny_pair: TinyPair) -> np.ndarray:
    ids = np.random.default_rng(0).integers(2, 896, (1, 24))
    manifest = read_manifest(engine)
    return Runner(engine / manifest.target.model, open_checkpoint(str(tiny_pair.target)), 1).step(ids, [0])["logits"][0]


def _expected_logits(tiny_pair: TinyPair) -> np.ndarray:
    return reference_logits(tiny_pair.target_model, *np.random.default_rng(0).integers(2, 896, (1, 24)))[0]


def test_manifest_says_what_was_built_from_what_and_with_which_limits(engine: Path, tiny_pair: TinyPair) -> None:
    manifest = read_manifest(engine, verify_hashes=True)
    assert manifest.name == "tiny"
    assert manifest.backend == "onnxruntime"
    assert manifest.fly_trt_version == fly_trt.__version__
    assert manifest.library_versions["torch"] == importlib.metadata.version("torch")
    # 128 is what the draft supports.
    assert manifest.limits == Limits(max_batch_size=3, max_seq_len=128, max_draft_len=20, max_num_tokens=48)
    assert manifest.head == Head(entropy_top_k=4, stop_token_ids=[1, 9], top_tokens=True, positions=True)
    costs = {name: manifest.speculative[name] for name in ("draft_token_cost", "verification_token_cost")}
    assert manifest.speculative == {"num_speculative_tokens": 7, "preset": "paper", **costs}
    assert all(0 <= cost < 100 for cost in costs.values())
    num_parameters = sum(parameter.numel() for parameter in tiny_pair.target_model.parameters())
    expected = Source(checkpoint=str(tiny_pair.target), architecture="LlamaForCausalLM", num_parameters=num_parameters)
    assert manifest.target.source == expected
    assert manifest.draft is not None
    assert manifest.draft.source.checkpoint == str(tiny_pair.draft)
    assert (manifest.target.vocab_size, manifest.draft.vocab_size) == (896, 1024)
    target = manifest.target
    assert (target.num_layers, target.num_kv_heads, target.head_dim, target.kv_cache_dtype) == (1, 2, 16, "float32")


def test_manifest_lists_every_file_with_its_sha256(engine: Path) -> None:
    files = {name: content for name, content in _contents(engine).items() if name != MANIFEST_NAME}
    listed = {name: (file.size, file.sha256) for name, file in read_manifest(engine).files.items()}
    assert listed == {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
    models = {f"{role}/model.onnx{data}" for role in ("target", "draft") for data in ("", ".data")}
    assert models | {"tokenizer/tokenizer.json", "generation_config.json"} <= files.keys()


def test_generation_config_travels_with_the_engine(engine: Path) -> None:
    content = json.loads((engine / "generation_config.json").read_text(encoding="utf-8"))
    assert content["eos_token_id"] == [1, 9]
    assert content["temperature"] == 0.6


def test_engine_directory_is_readable_by_others_and_alone_in_its_folder(engine: Path) -> None:
    assert stat.S_IMODE(engine.stat().st_mode) == 0o755
    assert [path.name for path in engine.parent.iterdir()] == [engine.name]


def test_built_target_computes_what_transformers_computes(engine: Path, tiny_pair: TinyPair) -> None:
    np.testing.assert_allclose(_logits(engine, tiny_pair), _expected_logits(tiny_pair), atol=1e-4, rtol=0)


def test_built_target_gives_a_token_in_a_step_of_its_own_the_bits_it_has_in_a_longer_one(
    engine: Path, tiny_pair: TinyPair
) -> None:
    ids = np.random.default_rng(0).integers(2, 896, (1, 24))
    runner = Runner(engine / read_manifest(engine).target.model, open_checkpoint(str(tiny_pair.target)), 1)
    whole = runner.step(ids, [0])["logits"][0]
    alone = [runner.step(ids[:, at : at + 1], [at])["logits"][0, 0] for at in range(24)]
    np.testing.assert_array_equal(np.stack(alone), whole)


def test_built_head_gives_the_argmax_and_the_entropy_of_the_top_4(engine: Path, tiny_pair: TinyPair) -> None:
    ids = np.random.default_rng(0).integers(2, 896, (1, 24))
    model = engine / read_manifest(engine).target.model
    outputs = Runner(model, open_checkpoint(str(tiny_pair.target)), 1).step(ids, [0], num_context=np.int64(24))
    scores = _expected_logits(tiny_pair).astype(np.float64)
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    largest = np.sort(probs, axis=-1)[:, -4:]
    np.testing.assert_array_equal(outputs["argmax"][0], scores.argmax(-1))
    np.testing.assert_allclose(outputs["entropy_topk"][0], -(largest * np.log(largest)).sum(-1), atol=1e-4)
    assert outputs["next_token"][0] == scores[-1].argmax()


def test_build_without_draft_has_a_target_only(half_engine: tuple[str, Path]) -> None:
    _, output = half_engine
    manifest = read_manifest(output, verify_hashes=True)
    assert manifest.draft is None
    assert not (output / "draft").exists()


def test_overwrite_replaces_the_whole_old_engine(half_engine: tuple[str, Path]) -> None:
    dtype, output = half_engine
    assert read_manifest(output).name == dtype
    assert not (output / "old.bin").exists()
    assert [path.name for path in output.parent.iterdir()] == [dtype]


def test_half_precision_takes_half_the_space_and_changes_logits_little(
    half_engine: tuple[str, Path], engine: Path, tiny_pair: TinyPair
) -> None:
    dtype, output = half_engine
    manifest = read_manifest(output)
    assert (manifest.target.dtype, manifest.target.kv_cache_dtype) == (dtype, "float32")
    assert manifest.files[DATA].size == pytest.approx(read_manifest(engine).files[DATA].size / 2, rel=0.02)
    want = _expected_logits(tiny_pair)
    error = np.abs(_logits(output, tiny_pair) - want).max() / want.std()
    assert 0 < error < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_weight_bytes_are_those_of_the_file(
    dtype: str, engine: Path, half_engine: tuple[str, Path], tiny_pair: TinyPair, tmp_path: Path
) -> None:
    built = engine if dtype == "float32" else half_engine[1]
    (model,) = _plan(tmp_path / "out", target=tiny_pair.target, dtype=dtype).models
    assert model.weight_bytes() == pytest.approx(read_manifest(built).files[DATA].size, rel=0.02)


def test_existing_output_is_refused_unless_overwrite(engine: Path, tiny_pair: TinyPair) -> None:
    with pytest.raises(ConfigError, match="already exists: choose another -o or pass --overwrite"):
        _plan(engine, target=tiny_pair.target)
    assert _plan(engine, target=tiny_pair.target, overwrite=True).output == engine


def test_overwrite_does_not_replace_a_folder_that_is_no_engine(tiny_pair: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match="not an engine directory, so --overwrite does not replace it"):
        _plan(tmp_path, target=tiny_pair.target, overwrite=True)


def test_entropy_of_more_tokens_than_the_vocabulary_has_is_refused(tiny_pair: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="entropy_top_k 897: the vocabulary has 896 tokens"):
        _plan(tmp_path / "out", target=tiny_pair.target, draft=tiny_pair.draft, entropy_top_k=897)


@pytest.mark.parametrize(
    ("step", "fraction", "error"),
    [
        ("target: trace", 0.0, RuntimeError("at the start")),
        ("target: write weights", 0.5, KeyboardInterrupt()),
        ("tokenizer and manifest", 1.0, OSError("at the end")),
    ],
)
def test_build_that_ends_early_leaves_nothing(
    step: str, fraction: float, error: BaseException, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    plan = _plan(tmp_path / "out", target=tiny_pair.target)
    with pytest.raises(type(error)):
        build(plan, _raise_at(step, fraction, error))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("mid-way"), KeyboardInterrupt()])
def test_build_that_ends_early_keeps_the_engine_it_would_have_replaced(
    error: BaseException, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    before = _old_engine(tmp_path / "out")
    plan = _plan(tmp_path / "out", target=tiny_pair.target, overwrite=True)
    with pytest.raises(type(error)):
        build(plan, _raise_at("target: trace", 0.0, error))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert _contents(tmp_path / "out") == before


def test_old_engine_comes_back_when_the_new_one_cannot_be_moved_into_place(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _old_engine(tmp_path / "out")
    plan = _plan(tmp_path / "out", target=tiny_pair.target, overwrite=True)
    rename = os.rename

    def fail_for_the_new_engine(source: Path, destination: Path) -> None:
        if ".building-" in Path(source).name:
            raise OSError("disk gone")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_for_the_new_engine)
    with pytest.raises(OSError, match="disk gone"):
        build(plan, _silent)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert _contents(tmp_path / "out") == before


def test_progress_of_every_step_starts_rises_and_ends_at_one(tiny_pair: TinyPair, tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {}
    manifest = build(
        _plan(tmp_path / "out", target=tiny_pair.target), lambda step, at: seen.setdefault(step, []).append(at)
    )
    assert isinstance(manifest, Manifest)
    assert list(seen) == ["target: trace", "target: load weights", "target: write weights", "tokenizer and manifest"]
    assert all(fractions == sorted(fractions) and fractions[-1] == 1.0 for fractions in seen.values())
