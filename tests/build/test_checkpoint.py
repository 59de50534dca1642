"""What cannot be built is refused with its reason from the configuration alone, broken checkpoints are refused with
theirs, and a draft needs the target's tokenizer.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fly_build.checkpoint import Checkpoint, check_same_tokenizer, open_checkpoint, stop_token_ids
from fly_trt.errors import CheckpointError
from tiny_models import PAIR, add_demo_tokenizer, save_tiny, tiny_llama

HQQ = {"quant_method": "hqq"}
REFUSED = {
    "t5": ("T5Config", {}, "encoder-decoder"),
    "bart": ("BartConfig", {}, "encoder-decoder"),
    "bloom": ("BloomConfig", {}, "ALiBi"),
    "mpt": ("MptConfig", {}, "ALiBi"),
    "falcon-alibi": ("FalconConfig", {"alibi": True}, "ALiBi"),
    "mamba": ("MambaConfig", {}, "state-space"),
    "falcon-h1": ("FalconH1Config", {}, "state-space"),
    "jamba": ("JambaConfig", {}, "state-space"),
    "qwen3-next": ("Qwen3NextConfig", {}, "state-space"),
    "gemma3": ("Gemma3Config", {}, "multimodal"),
    "llava": ("LlavaConfig", {}, "multimodal"),
    "gpt2": ("GPT2Config", {}, "'gpt2' is not supported: expected one of gemma2, .*llama"),
    "hqq": (
        "LlamaConfig",
        {"quantization_config": HQQ},
        "quantised by hqq, expected one of awq, gptq, .*: give the orig",
    ),
    "supported-but-empty": ("LlamaConfig", {}, r"no \*\.safetensors file"),
}
UNREADABLE = {
    "corrupt": '{"model_type": "llama",',
    "a-list": "[]",
    "no-model-type": "{}",
    "unknown-model-type": '{"model_type": "nobody-knows"}',
    "wrong-field-type": '{"model_type": "llama", "hidden_size": "wide"}',
    "number-of-layer-types": '{"model_type": "llama", "layer_types": 5}',
    "nested-layer-types": '{"model_type": "llama", "layer_types": [["full_attention"]]}',
    "unknown-dtype": '{"model_type": "llama", "dtype": "wide"}',
    "no-heads": '{"model_type": "llama", "num_attention_heads": 0}',
    "quantised-by-a-word": '{"model_type": "llama", "quantization_config": "gptq"}',
    "number-for-a-map": '{"model_type": "llama", "auto_map": 5}',
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_tiny(tiny_llama(num_hidden_layers=1), folder)
    return folder


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(tiny, tmp_path / "copied"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _tokenizer_only(folder: Path, **changes: Any) -> Checkpoint:
    """A checkpoint of the demo tokenizer with `changes` to the `model` part of tokenizer.json."""
    folder.mkdir()
    add_demo_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"] |= changes
    _write_json(folder / "tokenizer.json", content)
    return Checkpoint(str(folder), None, tiny_llama())


@pytest.mark.parametrize("case", REFUSED)
def test_configuration_is_refused_with_its_reason_and_no_weight_at_hand(case: str, tmp_path: Path) -> None:
    name, fields, reason = REFUSED[case]
    getattr(transformers, name)(**fields).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=reason) as refused:
        open_checkpoint(str(tmp_path))
    assert str(refused.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", UNREADABLE)
def test_unusable_config_json_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(UNREADABLE[case], encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"no usable config\.json: \S+") as refused:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_code_of_the_checkpoint_is_never_run_and_never_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal whether to run it."""
    marker = tmp_path / "was-run"
    (tmp_path / "configuration_own.py").write_text(f"open({str(marker)!r}, 'w')\n", encoding="utf-8")
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "configuration_own.OwnModel"}
    _write_json(tmp_path / "config.json", {"model_type": "nobody-knows", "auto_map": auto_map})
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with pytest.raises(CheckpointError, match="custom code"):
        open_checkpoint(str(tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "missing"])
def test_missing_folder_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{name}: no such folder: give a checkpoint folder or a hub id"):
        open_checkpoint(name)


def test_mistyped_path_is_no_question_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, **options: Any) -> None:
        asked.append((name, options["revision"]))
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError, match=r"^models/targt: no such folder: give a checkpoint folder or a rev"):
        open_checkpoint("models/targt")
    assert asked == []
    for name, revision in (("models/targt", "main"), ("org/model", None)):
        expected = f"^{name}: no such folder, and no usable config.json of a hub model of that name: We couldn't"
        with pytest.raises(CheckpointError, match=expected):
            open_checkpoint(name, revision)
    assert asked == [("models/targt", "main"), ("org/model", None)]


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(
    ("content", "base"), [('{"base_model_name_or_path": "org/base"}', "org/base"), ("{", "another model")]
)
def test_adapter_is_refused_with_its_base_model(content: str, base: str, has_config: bool, copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "adapter_model.safetensors")
    if not has_config:
        (copied / "config.json").unlink()
    (copied / "adapter_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"makes it an adapter \(LoRA\) of {base}.*: merge them"):
        open_checkpoint(str(copied))


@pytest.mark.parametrize("has_peft", [False, True])
def test_whole_model_with_an_adapter_config_left_beside_it_is_built_with_a_warning(
    has_peft: bool, copied: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("transformers.models.auto.auto_factory", "transformers.integrations.peft"):
        monkeypatch.setattr(f"{module}.is_peft_available", lambda: has_peft)
    expected = load_file(copied / "model.safetensors")
    _write_json(copied / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    tensors = open_checkpoint(str(copied)).load_weights()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "fly_build.checkpoint"]
    assert warning.startswith(f"{copied}: adapter_config.json (of org/base) is not used: ")


def test_adapter_beside_a_config_is_refused_also_with_weights_of_no_name_of_a_model(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "adapter_model.safetensors")
    _write_json(copied / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    shutil.copy(copied / "adapter_model.safetensors", copied / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"makes it an adapter \(LoRA\) of org/base"):
        open_checkpoint(str(copied))


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no usable config\.json"):
        open_checkpoint(str(tmp_path))


def test_unknown_rope_type_is_refused_before_weights_are_read(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    _write_json(copied / "config.json", config | {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}})
    (copied / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(CheckpointError, match=r"transformers cannot make the model of this config\.json: 'spiral'"):
        _ = open_checkpoint(str(copied)).empty_model


def test_number_of_parameters_needs_no_weights(tiny: Path) -> None:
    stored = load_file(tiny / "model.safetensors")
    assert open_checkpoint(str(tiny)).num_parameters == sum(tensor.numel() for tensor in stored.values())


def test_weights_load_in_the_dtype_they_were_saved_in(tmp_path: Path) -> None:
    save_tiny(tiny_llama(num_hidden_layers=1), tmp_path, dtype=torch.bfloat16)
    tensors = open_checkpoint(str(tmp_path)).load_weights()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_unreadable_weights_are_refused(content: bytes | None, copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20000] if content is None else content)
    with pytest.raises(CheckpointError, match="the weights do not load: "):
        open_checkpoint(str(copied)).load_weights()


def test_missing_tensor_is_refused_and_not_replaced_by_random_values(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 missing tensors, the first is model\.layers\.0\.mlp\.up_proj\.weight"
    ):
        open_checkpoint(str(copied)).load_weights()


def test_checkpoint_without_tokenizer_is_refused_when_the_tokenizer_is_needed(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer: "):
        _ = open_checkpoint(str(tiny)).tokenizer


def test_demo_pair_shares_one_tokenizer() -> None:
    target = open_checkpoint(str(PAIR / "target"))
    for draft in ("draft", "draft_weak"):
        check_same_tokenizer(target, open_checkpoint(str(PAIR / draft)))


def test_embedding_tables_of_different_size_are_fine_when_the_tokenizers_agree(tmp_path: Path) -> None:
    target, draft = _tokenizer_only(tmp_path / "target"), _tokenizer_only(tmp_path / "draft")
    target.config.vocab_size, draft.config.vocab_size = 896, 1024
    check_same_tokenizer(target, draft)


def test_few_added_tokens_on_one_side_are_fine(tmp_path: Path) -> None:
    target, draft = _tokenizer_only(tmp_path / "target"), _tokenizer_only(tmp_path / "draft")
    tokenizer = Checkpoint(draft.name, None, draft.config).tokenizer  # a cached one would stay
    tokenizer.add_tokens(["<|tool|>", "<|image|>"], special_tokens=True)
    tokenizer.save_pretrained(draft.name)
    assert len(draft.tokenizer) == len(target.tokenizer) + 2
    check_same_tokenizer(target, draft)


def test_token_with_another_id_is_refused_by_name(tmp_path: Path) -> None:
    target = _tokenizer_only(tmp_path / "target")
    ids = json.loads((tmp_path / "target" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    draft = _tokenizer_only(tmp_path / "draft", vocab=ids | {"a": ids["b"], "b": ids["a"]})
    with pytest.raises(
        CheckpointError, match=f"different tokenizers .*({ids['a']} and {ids['b']}|{ids['b']} and {ids['a']})"
    ):
        check_same_tokenizer(target, draft)


def test_vocabulary_of_another_family_is_refused(tmp_path: Path) -> None:
    target = _tokenizer_only(tmp_path / "target")
    ids = json.loads((tmp_path / "target" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = dict(list(ids.items())[: len(ids) // 2])
    draft = _tokenizer_only(tmp_path / "draft", vocab=words, merges=[])
    with pytest.raises(CheckpointError, match=r"different tokenizers \(\d+ tokens are not shared\): choose a draft"):
        check_same_tokenizer(target, draft)


def test_equal_vocabularies_that_split_text_differently_are_refused(tmp_path: Path) -> None:
    target, draft = _tokenizer_only(tmp_path / "target"), _tokenizer_only(tmp_path / "draft", merges=[])
    with pytest.raises(CheckpointError, match="split the same text into different tokens"):
        check_same_tokenizer(target, draft)


def test_stop_tokens_are_those_of_generation_config_config_and_tokenizer(tmp_path: Path) -> None:
    add_demo_tokenizer(tmp_path)  # its <|eos|> is 1
    checkpoint = Checkpoint(str(tmp_path), None, tiny_llama(eos_token_id=5))
    assert stop_token_ids(checkpoint) == [1, 5]
    _write_json(tmp_path / "generation_config.json", {"eos_token_id": [9, 7, 5]})
    assert stop_token_ids(checkpoint) == [1, 5, 7, 9]


NO_TOKEN_IDS = [json.dumps({"eos_token_id": value}) for value in ("x", [1, None], 2.5, [[1]], True)]


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "null", *NO_TOKEN_IDS])
def test_unusable_generation_config_is_refused_because_stop_tokens_would_be_lost(content: str, tmp_path: Path) -> None:
    add_demo_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"no usable generation_config\.json: \S") as refused:
        stop_token_ids(Checkpoint(str(tmp_path), None, tiny_llama()))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [5, [], "LlamaForCausalLM", [5], {"a": 1}])
def test_architecture_that_config_json_does_not_say_is_that_of_its_type(value: Any) -> None:
    config = tiny_llama()
    config.architectures = value
    assert Checkpoint("here", None, config).architecture == "LlamaConfig"
