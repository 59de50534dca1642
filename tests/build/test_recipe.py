"""Recipes: the tracked ones are valid, flags override what the file says, and a field that is wrong is named."""

from pathlib import Path

import pytest

from fly_build.recipe import RECIPES, load_recipe
from fly_trt.errors import ConfigError

RECIPE = """
name: both
target: {checkpoint: org/target, revision: main}
draft: ./draft
dtype: float16
max_batch_size: 4
max_seq_len: 1000
speculative: {num_speculative_tokens: 5}
"""
REFUSED = {
    "unknown-field": ("target: org/a\nmax_batchsize: 3", "max_batchsize: Extra inputs are not permitted, got 3"),
    "unknown-field-of-a-model": ("target: {checkpoint: org/a, rev: x}", "target.rev: Extra inputs"),
    "wrong-choice": ("target: org/a\ndtype: float8", "dtype: Input should be 'float32'.*got 'float8'"),
    "unknown-backend": (
        "target: org/a\nbackend: openvino",
        "backend: Input should be 'onnxruntime' or 'tensorrt' or 'tensorrt-llm' or 'tensorrt-llm-engine', got 'openv",
    ),
    "wrong-type": ("target: org/a\nmax_seq_len: long", "max_seq_len: .*got 'long'"),
    "out-of-range": ("target: org/a\nmax_batch_size: 0", "max_batch_size: .*greater than 0, got 0"),
    "no-target": ("draft: org/a", "no target checkpoint: give --target"),
    "no-mapping": ("- target", "a recipe is a mapping with at least `target`"),
    "no-yaml": ("target: [org/a", "not valid YAML: "),
    "unknown-speculative-field": (
        "target: org/a\nspeculative: {num_tokens: 3}",
        "speculative: unknown field 'num_tokens': expected one of method, num_speculative_tokens",
    ),
    "wrong-speculative-value": ("target: org/a\nspeculative: {preset: bold}", "preset 'bold': expected one of"),
    "more-drafts-than-fit": (
        "target: org/a\nmax_draft_len: 8\nspeculative: {num_speculative_tokens: 9}",
        "num_speculative_tokens 9 is more than max_draft_len 8: raise --max-draft-len",
    ),
    "no-room-for-drafts": (
        "target: org/a\nmax_num_tokens: 32",
        "max_num_tokens 32: a step holds max_draft_len .32. draft tokens and at least one more: raise --max-num-tokens",
    ),
    "another-top-k": (
        "target: org/a\nspeculative: {fly_entropy_top_k: 5}",
        "fly_entropy_top_k 5: the engine was built for 3: rebuild with --entropy-top-k 5",
    ),
}


def test_a_small_draft_limit_needs_no_other_setting() -> None:
    assert load_recipe(None, {"target": "org/a", "max_draft_len": 8}).max_draft_len == 8


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "both.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_tracked_recipe_is_valid_and_named_like_its_file(name: str) -> None:
    recipe = load_recipe(name, {})
    assert recipe.name == name
    assert recipe.target.checkpoint


def test_demo_recipe_finds_its_checkpoints_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("demo", {})
    assert recipe.draft is not None
    assert (Path(recipe.target.checkpoint) / "config.json").is_file()
    assert (Path(recipe.draft.checkpoint) / "config.json").is_file()


def test_file_is_read_and_its_relative_paths_start_at_the_file(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file), {})
    assert (recipe.target.checkpoint, recipe.target.revision) == ("org/target", "main")
    assert recipe.draft is not None
    assert recipe.draft.checkpoint == str(recipe_file.parent / "draft")
    assert (recipe.dtype, recipe.max_batch_size, recipe.max_seq_len) == ("float16", 4, 1000)
    assert recipe.speculative == {"num_speculative_tokens": 5}
    assert (recipe.quantization, recipe.max_draft_len) == ("none", 32)


def test_flags_override_the_file_and_absent_flags_do_not(recipe_file: Path) -> None:
    flags = {"dtype": "bfloat16", "max_seq_len": 64, "draft": "org/other", "max_batch_size": None, "backend": None}
    recipe = load_recipe(str(recipe_file), flags)
    assert (recipe.dtype, recipe.max_seq_len, recipe.max_batch_size) == ("bfloat16", 64, 4)
    assert recipe.draft is not None
    assert recipe.draft.checkpoint == "org/other"
    assert recipe.target.checkpoint == "org/target"


def test_another_target_does_not_keep_the_revision_of_the_old_one(recipe_file: Path) -> None:
    assert load_recipe(str(recipe_file), {"target": "org/new"}).target.revision is None
    assert load_recipe(str(recipe_file), {"target": "org/new", "target_revision": "v2"}).target.revision == "v2"


def test_revision_flag_alone_changes_the_revision_of_the_recipes_checkpoint(recipe_file: Path) -> None:
    target = load_recipe(str(recipe_file), {"target_revision": "v2"}).target
    assert (target.checkpoint, target.revision) == ("org/target", "v2")


def test_revision_without_its_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="draft_revision 'v2': no draft checkpoint: give --draft"):
        load_recipe(None, {"target": "org/target", "draft_revision": "v2"})


@pytest.mark.parametrize("case", REFUSED)
def test_recipe_is_refused_in_one_line_that_names_the_field(case: str, tmp_path: Path) -> None:
    content, reason = REFUSED[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=reason) as refused:
        load_recipe(str(path), {})
    assert "\n" not in str(refused.value)


def test_unknown_recipe_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere: no such recipe: give a YAML file or one of .*demo"):
        load_recipe("nowhere", {})
