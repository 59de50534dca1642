"""`--self-draft`: what a build with it adds to the engine directory, what it is chosen by, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from fly_build.cli import main
from fly_build.knapsack import BlockTimes, prospect
from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe
from fly_build.self_draft import calibration_text
from fly_trt.engines import load_engine
from fly_trt.errors import ConfigError, FlyError
from fly_trt.manifest import MANIFEST_NAME, Manifest, read_manifest
from tiny_models import add_demo_tokenizer, save_tiny, tiny_llama

GRAPH_BYTES = 100_000
TIMES = {"attention": 1.0, "mlp": 2.0}
SETTINGS = {"contexts": [24], "step_times": TIMES}
COSTS = {"draft_token_cost": 0.5, "verification_token_cost": 0.1}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target of 4 layers whose weights are small enough that its layers add little."""
    folder = tmp_path_factory.mktemp("deep") / "target"
    save_tiny(tiny_llama(vocab_size=896, num_hidden_layers=4, initializer_range=0.05, eos_token_id=1), folder)
    add_demo_tokenizer(folder)
    return folder


def build_with(target: Path, output: Path, report: Any = lambda step, fraction: None, **flags: Any) -> Manifest:
    flags = {"self_draft": SETTINGS, "max_seq_len": 64, "max_batch_size": 2, "speculative": COSTS, **flags}
    return build(make_plan(load_recipe(None, {"target": str(target), **flags}), output), report)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_weights_are_there_once(target: Path, tmp_path: Path, quantization: str) -> None:
    steps: list[str] = []
    manifest = build_with(target, tmp_path / "out", lambda step, _: steps.append(step), quantization=quantization)
    (draft,) = manifest.self_drafts
    assert draft.min_tokens == 0
    assert {0, 3} <= set(draft.kept_attentions) & set(draft.kept_mlps), "the first and the last layer stay"
    num_kept = len(draft.kept_attentions) + len(draft.kept_mlps)
    assert num_kept < 8
    assert draft.engine.num_layers == len(draft.kept_attentions)
    assert draft.engine.source.num_parameters < manifest.target.source.num_parameters
    assert (0 < draft.agreement <= 1, draft.draft_length > 0) == (True, True)
    assert draft.engine.model == "target/self_draft_24.onnx"
    assert {path.name for path in (tmp_path / "out" / "target").iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "self_draft_24.onnx",
    }
    assert manifest.files[draft.engine.model].size < GRAPH_BYTES
    graph = onnx.load(tmp_path / "out" / draft.engine.model, load_external_data=False).graph
    external = [weight for weight in graph.initializer if weight.external_data]
    assert len(external) >= num_kept
    assert {entry.value for weight in external for entry in weight.external_data if entry.key == "location"} == {
        "model.onnx.data"
    }
    assert read_manifest(tmp_path / "out", verify_hashes=True) == manifest
    engine = load_engine(tmp_path / "out", manifest, draft.engine, num_slots=1)
    step = engine.step(0, 1, 4)
    step.set_row(0, 0, np.array([3, 4, 5, 6]))
    engine.run(step)
    assert np.isfinite(step.entropy_topk).all()
    engine.close()
    assert {"self-draft 24: choose blocks", "self-draft 24: trace"} <= set(steps)


def test_drafts_of_equal_sets_are_one_engine(self_engine: Path) -> None:
    first, second = read_manifest(self_engine).self_drafts
    assert [first.min_tokens, second.min_tokens] == [0, 100]
    same = (first.kept_attentions, first.kept_mlps) == (second.kept_attentions, second.kept_mlps)
    assert (first.engine == second.engine) == same
    assert len(list((self_engine / "target").glob("self_draft_*.onnx"))) == (1 if same else 2)
    assert min(first.agreement, second.agreement) > 0.5


def test_times_are_given_or_measured(target: Path, tmp_path: Path) -> None:
    manifest = build_with(target, tmp_path / "measured", self_draft={"contexts": [24]}, speculative={})
    assert manifest.self_drafts[0].tokens_per_step_time > 0
    assert manifest.speculative["draft_token_cost"] > 0
    times = {"attention": 1.0, "attention_per_1000_tokens": 1000 / 24, "mlp": 8.0, "head": 3.0, "further_token": 0.02}
    settings = {"contexts": [24], "step_times": times}
    (draft,) = build_with(target, tmp_path / "given", self_draft=settings).self_drafts
    attentions = [2 * layer for layer in range(4) if layer not in draft.kept_attentions]
    mlps = [2 * layer + 1 for layer in range(4) if layer not in draft.kept_mlps]
    expected = prospect(draft.agreement, attentions + mlps, 8, BlockTimes(2.0, 8.0, 3.0, 0.02))
    assert draft.draft_length == expected.draft_length
    assert draft.tokens_per_step_time == pytest.approx(expected.tokens_per_step_time, abs=1e-3)


def test_a_manifest_from_before_there_were_self_drafts_is_read(target_only_engine: Path, tmp_path: Path) -> None:
    content = json.loads((target_only_engine / MANIFEST_NAME).read_text())
    assert content.pop("self_drafts") == []
    content["files"] = {}
    assert Manifest.model_validate(content | {"files": read_manifest(target_only_engine).files}).self_drafts == []


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(target: Path, tmp_path: Path, **flags: Any) -> str:
    with pytest.raises(FlyError) as error:
        build_with(target, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_what_a_self_draft_cannot_go_with_is_refused(target: Path, tmp_path: Path) -> None:
    assert "leave out one of the two" in refused(target, tmp_path, draft=str(target))
    assert "hold their own weights" in refused(target, tmp_path, backend="tensorrt")
    assert "contexts 64: sequences have 64" in refused(target, tmp_path, self_draft={"contexts": [24, 64]})
    assert "self_draft.contexts.0" in refused(target, tmp_path, self_draft={"contexts": [0]})
    assert "drafts one token at least" in refused(target, tmp_path, max_draft_len=0)


def test_a_calibration_file_is_text_or_prompts(tmp_path: Path) -> None:
    assert len(calibration_text(None).split()) > 500
    text, lines, broken = (tmp_path / name for name in ("a.txt", "a.jsonl", "b.jsonl"))
    text.write_text("One.\n\nTwo.", encoding="utf-8")
    lines.write_text('{"prompt": "One."}\n\n{"prompt": "Two.", "check": null}\n', encoding="utf-8")
    assert calibration_text(str(text)) == calibration_text(str(lines)) == "One.\n\nTwo."
    broken.write_text('{"text": "One."}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="expected an object such as"):
        calibration_text(str(broken))
    with pytest.raises(ConfigError, match=r"gone\.txt: No such file or directory: give a text"):
        calibration_text("gone.txt")
    text.write_text(" \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no text: give some hundred words"):
        calibration_text(str(text))


# --- the command line -------------------------------------------------------------------------------------------------


def fly_build(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], standalone_mode=True)


def test_the_dry_run_says_what_would_be_made(target: Path) -> None:
    flags = ("--target", target, "--self-draft", "-o", "here", "--dry-run")
    assert (
        "self-draft at contexts of 100, 200 tokens, calibrated on the built-in text"
        in fly_build(*flags, "--contexts", "200,100").stdout
    )
    assert "self-draft at contexts of 128 tokens" in fly_build(*flags).stdout, "half of what a sequence has"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--contexts", "9"), "contexts: belongs to a self-draft: add --self-draft"),
        (("--self-draft", "--contexts", "many"), "'many': expected numbers of tokens such as 512,4096"),
        (("--self-draft", "--calibrate", "gone.txt"), "calibrate gone.txt"),
    ],
)
def test_flags_that_say_nothing_are_refused(target: Path, flags: tuple[str, ...], reason: str) -> None:
    result = fly_build("--target", target, *flags, "--dry-run")
    assert result.exit_code != 0
    assert reason in result.output
