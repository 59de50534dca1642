"""The engine's tokenizer is the checkpoint's tokenizer.json, whatever class transformers would make of it; chat
templates and settings that are not in that file travel with it.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from fly_build.checkpoint import Checkpoint, check_same_tokenizer
from fly_build.cli import main
from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe
from fly_build.tokenizer import load_tokenizer, tokens_without_embedding
from fly_trt.errors import CheckpointError
from fly_trt.text.tokenizer import load_tokenizer as load_engine_tokenizer
from tiny_models import PAIR, add_demo_tokenizer, save_tiny, tiny_llama

TEXTS = [
    "In 1234567 days, don't!  I'LL be naïve\n\n  x",
    "<|bos|>Привет мир <|eos|> 你好 🙂 ١٢٣",
    " e\u0301\t\r\n12 345",
]


def _splitter(digits: str) -> PreTokenizer:
    parts = Split(Regex(rf"\p{{N}}{digits}|[^\s\p{{N}}]+|\s+"), "isolated")
    return Sequence([parts, ByteLevel(add_prefix_space=False, use_regex=False)])


THREE_DIGITS, LONG_NUMBERS = _splitter("{1,3}"), _splitter("+")  # as Llama 3 splits digits, and as nobody does


def _checkpoint(
    folder: Path, model_type: str = "llama", splitter: PreTokenizer | None = None, **tokenizer_config: Any
) -> Checkpoint:
    """A checkpoint of the demo tokenizer without weights; with a `splitter`, also of one that has tokens of several
    digits."""
    folder.mkdir(exist_ok=True)
    add_demo_tokenizer(folder)
    if splitter is not None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.pre_tokenizer = splitter
        content = json.loads(tokenizer.to_str())
        content["model"]["vocab"] |= {"12": 892, "123": 893, "1234": 894}
        content["model"]["merges"] = [["1", "2"], ["12", "3"], ["123", "4"], *content["model"]["merges"]]
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    _edit(folder / "tokenizer_config.json", **({"tokenizer_class": None} | tokenizer_config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return Checkpoint(str(folder), None, tiny_llama(vocab_size=896))


def _edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}), encoding="utf-8")


def _saved(checkpoint: Checkpoint, folder: Path) -> Tokenizer:
    """What the runtime loads of it."""
    checkpoint.tokenizer.save_pretrained(folder / "tokenizer")
    return load_engine_tokenizer(folder)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("fly_build")]


@pytest.mark.parametrize("splitter", [None, THREE_DIGITS, LONG_NUMBERS])
@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [
        ("llama", None),
        ("qwen2", None),
        ("gemma2", None),
        ("llama", "GPT2Tokenizer"),
        ("llama", "LlamaTokenizerFast"),
        ("qwen3", "PreTrainedTokenizerFast"),
    ],
)
def test_engine_reads_text_as_the_file_that_the_model_was_trained_with(
    model_type: str, tokenizer_class: str | None, splitter: PreTokenizer | None, tmp_path: Path
) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint", model_type, splitter, tokenizer_class=tokenizer_class)
    file = Tokenizer.from_file(str(tmp_path / "checkpoint" / "tokenizer.json"))
    saved = _saved(checkpoint, tmp_path / "engine")
    for text in TEXTS:
        assert saved.encode(text).ids == file.encode(text).ids
        ids = file.encode(text).ids
        for skips in (True, False):
            assert saved.decode(ids, skip_special_tokens=skips) == file.decode(ids, skip_special_tokens=skips)
    assert saved.get_vocab() == file.get_vocab(), "a class's own tokens are not the model's"


def test_a_file_that_transformers_would_not_follow_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint", "qwen2", LONG_NUMBERS)
    for _ in range(2):
        _ = checkpoint.tokenizer
    (warning,) = _warnings(caplog)
    assert "splits text otherwise than the Qwen2Tokenizer that transformers makes of it" in warning


def test_a_file_that_transformers_follows_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _ = _checkpoint(tmp_path / "checkpoint", splitter=THREE_DIGITS).tokenizer
    assert _warnings(caplog) == []


def test_tokens_that_only_the_tokenizer_config_adds_come_with_it(tmp_path: Path) -> None:
    token = {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    checkpoint = _checkpoint(tmp_path / "checkpoint", added_tokens_decoder={"892": token}, eos_token="<|im_end|>")
    assert _saved(checkpoint, tmp_path / "engine").encode("a<|im_end|>").ids[-1] == 892
    assert checkpoint.tokenizer.eos_token_id == 892


def test_special_tokens_in_a_text_are_split_where_the_checkpoint_splits_them(tmp_path: Path) -> None:
    text = "a<|eos|>b"
    whole = _saved(_checkpoint(tmp_path / "whole"), tmp_path / "engine-whole").encode(text)
    assert "<|eos|>" in whole.tokens
    checkpoint = _checkpoint(tmp_path / "split", split_special_tokens=True)
    split = _saved(checkpoint, tmp_path / "engine-split").encode(text)
    assert split.ids == checkpoint.tokenizer(text)["input_ids"]
    assert "<|eos|>" not in split.tokens


def test_draft_that_only_splits_long_numbers_otherwise_is_refused(tmp_path: Path) -> None:
    target = _checkpoint(tmp_path / "target", splitter=THREE_DIGITS)
    draft = _checkpoint(tmp_path / "draft", splitter=LONG_NUMBERS)
    with pytest.raises(CheckpointError, match="split the same text into different tokens"):
        check_same_tokenizer(target, draft)


def test_broken_tokenizer_file_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer.json").write_text('{"version": "1.0"', encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokenizer") as refused:
        _ = checkpoint.tokenizer
    assert "\n" not in str(refused.value)


UNUSABLE: dict[str, tuple[str, Any]] = {
    "empty": ("tokenizer.json", {}),
    "no model": ("tokenizer.json", {"version": "1.0", "added_tokens": []}),
    "a list": ("tokenizer_config.json", []),
    "class is a number": ("tokenizer_config.json", {"tokenizer_class": 5}),
    "template without a text": ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
    "template is a number": ("tokenizer_config.json", {"chat_template": 5}),
    "template of numbers": ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 5}]}),
    "token of no kind": ("tokenizer_config.json", {"eos_token": {"content": "<|eos|>"}}),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_files_that_make_no_tokenizer_end_the_build_in_one_line(case: str, tmp_path: Path) -> None:
    name, content = UNUSABLE[case]
    folder = tmp_path / "checkpoint"
    save_tiny(tiny_llama(vocab_size=896, num_hidden_layers=1), folder)
    _checkpoint(folder)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    result = CliRunner().invoke(main, ["--target", str(folder), "-o", str(tmp_path / "engine"), "--dry-run"])
    assert result.exit_code == 2, result.exception
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"fly-build: {folder}: no usable tokenizer files: ")


NAMED = [{"name": "default", "template": "plain {{ messages }}"}, {"name": "tool_use", "template": "tools {{ tools }}"}]


@pytest.mark.parametrize("form", ["list", "folder", "list without default"])
def test_named_chat_templates_lie_where_the_runtime_looks_for_them(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    named = NAMED[1:] if form == "list without default" else NAMED
    if form == "folder":
        checkpoint = _checkpoint(folder, chat_template=None)
        (folder / "additional_chat_templates").mkdir()
        (folder / "chat_template.jinja").write_text(NAMED[0]["template"], encoding="utf-8")
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(NAMED[1]["template"], encoding="utf-8")
    else:
        checkpoint = _checkpoint(folder, chat_template=named)
    _saved(checkpoint, tmp_path / "engine")
    saved = tmp_path / "engine" / "tokenizer"
    found = {path.relative_to(saved).as_posix(): path.read_text(encoding="utf-8") for path in saved.rglob("*.jinja")}
    paths = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
    assert found == {paths[template["name"]]: template["template"] for template in named}


def test_tokens_beyond_the_embedding_table_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "checkpoint"
    save_tiny(tiny_llama(vocab_size=892, num_hidden_layers=1), folder)
    add_demo_tokenizer(folder)
    extra = [f"[PAD{n}]" for n in range(5)]
    tokenizer = load_tokenizer(str(folder), None)
    tokenizer.add_tokens(extra)
    tokenizer.save_pretrained(folder)
    assert tokens_without_embedding(tokenizer, 892) == extra
    assert tokens_without_embedding(tokenizer, 896) == extra[4:]
    make_plan(load_recipe(None, {"target": str(folder)}), tmp_path / "engine")
    (warning,) = _warnings(caplog)
    assert "no embedding for (892 rows)" in warning
    assert warning.endswith("'[PAD0]', '[PAD1]', '[PAD2]' and 2 more")


def test_demo_pair_has_an_embedding_for_every_token() -> None:
    assert tokens_without_embedding(load_tokenizer(str(PAIR / "target"), None), 896) == []


def test_engine_directory_holds_the_file_and_all_templates(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    _checkpoint(folder, "llama", LONG_NUMBERS, chat_template=NAMED, tokenizer_class="GPT2Tokenizer")
    save_tiny(tiny_llama(vocab_size=896, num_hidden_layers=1), folder)
    engine = tmp_path / "engine"
    build(make_plan(load_recipe(None, {"target": str(folder), "max_seq_len": 64}), engine), lambda *_: None)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved = load_engine_tokenizer(engine)
    assert [saved.encode(text).ids for text in TEXTS] == [file.encode(text).ids for text in TEXTS]
    assert (engine / "tokenizer" / "additional_chat_templates" / "tool_use.jinja").is_file()
