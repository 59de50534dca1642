"""`--inner-draft`: a third model in the engine directory, and the choice whether it guesses."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fly_build.backends import BACKENDS
from fly_build.cli import main
from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import CheckpointError, ConfigError
from fly_trt.manifest import Manifest, read_manifest
from fly_trt.service.config import resolve_speculative_config
from tiny_models import TinyPair
from toy_backend import ToyBackend

COSTS = {"draft_token_cost": 0.1, "verification_token_cost": 0.05}


def built(output: Path, pair: TinyPair, **flags: Any) -> Manifest:
    models = {"target": str(pair.target), "draft": str(pair.draft), "inner_draft": str(pair.draft)}
    return build(make_plan(load_recipe(None, models | {"speculative": COSTS} | flags), output), lambda *_: None)


@pytest.fixture(scope="module")
def engine(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engines") / "chain"
    built(output, tiny_pair, max_num_tokens=64)
    return output


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setitem(BACKENDS, ("toy", "cpu"), ToyBackend)
    return {"backend": "toy"}


def test_the_directory_has_three_models(engine: Path, tiny_pair: TinyPair) -> None:
    manifest = read_manifest(engine, verify_hashes=True)
    assert manifest.inner_draft is not None
    assert manifest.inner_draft.source.checkpoint == str(tiny_pair.draft)
    assert manifest.inner_draft.model == "inner_draft/model.onnx"
    with LoadedEngines(engine, max_batch_size=2) as engines:
        assert engines.load_seconds == {}
        assert engines.inner_draft.info.vocab_size == manifest.inner_draft.vocab_size
        assert list(engines.load_seconds) == ["inner_draft"]


def test_a_draft_that_guesses_for_itself_always_agrees(engine: Path) -> None:
    """Whether that pays is nearly even, and so the clock's to say."""
    manifest = read_manifest(engine)
    assert manifest.chain is not None
    assert manifest.chain.inner_draft_acceptance == 1.0
    assert 0 <= manifest.chain.draft_acceptance <= 1
    assert 2 <= manifest.chain.num_tokens <= 15
    method = manifest.speculative["method"]
    assert method in ("chain", "multi_level")
    assert manifest.speculative == COSTS | {"method": method, "inner_num_tokens": manifest.chain.num_tokens}
    assert resolve_speculative_config(manifest, {}).method == method
    assert resolve_speculative_config(manifest, {"method": "chain"}).inner_num_tokens == manifest.chain.num_tokens


def test_a_manifest_of_two_models_has_no_chain(engine: Path, tiny_pair: TinyPair, toy: dict, tmp_path: Path) -> None:
    content = {k: v for k, v in read_manifest(engine).model_dump().items() if k not in ("inner_draft", "chain")}
    assert Manifest.model_validate(content).inner_draft is None
    assert built(tmp_path / "out", tiny_pair, **toy, inner_draft=None).chain is None


def test_given_rates_and_sizes_choose_where_the_engines_do_not_run(
    tiny_pair: TinyPair, toy: dict, tmp_path: Path
) -> None:
    rates = {"draft_acceptance": 0.9, "inner_draft_acceptance": 0.8}
    never = built(tmp_path / "never", tiny_pair, **toy, chain=rates)
    assert never.chain is not None
    assert (never.chain.draft_acceptance, never.chain.inner_draft_acceptance) == (0.9, 0.8)
    assert never.speculative["method"] == "multi_level"
    kept = built(tmp_path / "kept", tiny_pair, **toy, chain=rates, speculative=COSTS | {"method": "chain"})
    assert kept.speculative == COSTS | {"method": "chain", "inner_num_tokens": never.chain.num_tokens}


def test_an_inner_draft_that_pays_is_used_without_being_asked_for(
    tiny_pair: TinyPair, toy: dict, tmp_path: Path
) -> None:
    """The target in the middle, and the tiny draft guesses for it."""
    models = {"draft": str(tiny_pair.target), "inner_draft": str(tiny_pair.draft)}
    rates = {"draft_acceptance": 0.99, "inner_draft_acceptance": 0.99}
    manifest = built(tmp_path / "out", tiny_pair, **toy, **models, chain=rates)
    assert manifest.chain is not None
    assert manifest.chain.tokens_per_step_time > manifest.chain.tokens_per_step_time_without
    config = resolve_speculative_config(manifest, {})
    assert (config.method, config.inner_num_tokens, config.acceptance) == ("chain", manifest.chain.num_tokens, "fly")


def test_nothing_is_chosen_where_nobody_says_how_often_the_models_agree(
    tiny_pair: TinyPair, toy: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        manifest = built(tmp_path / "out", tiny_pair, **toy, chain={"draft_acceptance": 0.9})
    assert manifest.chain is None
    assert manifest.speculative == COSTS
    assert "give draft_acceptance and inner_draft_acceptance in the recipe's chain" in caplog.text


def test_the_command_line_builds_it_and_says_what_was_chosen(tiny_pair: TinyPair, tmp_path: Path) -> None:
    models = ["--target", tiny_pair.target, "--draft", tiny_pair.draft, "--inner-draft", tiny_pair.draft]
    dry = CliRunner().invoke(main, [str(word) for word in [*models, "--dry-run"]], env={"COLUMNS": "240"})
    assert [line.split()[1] for line in dry.stdout.splitlines() if line.startswith("│")] == [
        "target",
        "draft",
        "inner_draft",
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Tell me"}\n', encoding="utf-8")
    output = tmp_path / "out"
    result = CliRunner().invoke(main, [str(word) for word in [*models, "--calibrate", prompts, "-o", output]])
    assert result.exit_code == 0, result.output
    assert "the inner draft with the draft in 100.0%" in " ".join(result.stdout.split())
    assert f"method {read_manifest(output).speculative['method']}" in result.stdout


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"inner_draft": "org/b"}, "inner_draft: guesses for a draft model, and there is none: add --draft"),
        ({"inner_draft_revision": "v2"}, "inner_draft_revision 'v2': no inner_draft checkpoint: give --inner-draft"),
        ({"draft": "org/b", "inner_draft": "org/c", "chain": {"draft_acceptance": 1.5}}, "chain.draft_acceptance"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(flags: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_recipe(None, {"target": "org/a", **flags})


def test_an_inner_draft_with_another_tokenizer_or_without_prompts_is_refused(
    tiny_pair: TinyPair, toy: dict, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_pair.draft, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(CheckpointError, match="have different tokenizers"):
        built(tmp_path / "out", tiny_pair, **toy, inner_draft=str(other))
    with pytest.raises(ConfigError, match=r"calibrate gone\.txt"):
        built(tmp_path / "out", tiny_pair, **toy, calibrate="gone.txt")
