"""The engine directory: what is wrong with it is said in one line that names the fix."""

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fly_trt import EngineError
from fly_trt.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Head,
    Limits,
    Manifest,
    ModelEngine,
    Source,
    TensorRTPlan,
    Tuning,
    hash_directory,
    read_manifest,
    write_manifest,
    write_tuning,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete engine directory as far as the manifest is concerned."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "model.onnx").write_bytes(b"graph")
    (tmp_path / "target" / "model.onnx.data").write_bytes(b"weights" * 100)
    target = ModelEngine(
        model="target/model.onnx",
        source=Source(checkpoint="org/model", architecture="LlamaForCausalLM", num_parameters=700),
        vocab_size=32,
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        backend="onnxruntime",
        name="tiny",
        fly_trt_version="0",
        library_versions={},
        limits=Limits(max_batch_size=1, max_seq_len=64, max_draft_len=15, max_num_tokens=32),
        head=Head(entropy_top_k=3, stop_token_ids=[1]),
        speculative={},
        target=target,
        draft=None,
        files=hash_directory(tmp_path),
    )
    write_manifest(manifest, tmp_path)
    return tmp_path


def edit(directory: Path, **fields: object) -> None:
    path = directory / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def message_of(directory: Path, **options: bool) -> str:
    with pytest.raises(EngineError) as raised:
        read_manifest(directory, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_was_written_is_read(directory: Path) -> None:
    manifest = read_manifest(directory, verify_hashes=True)
    assert set(manifest.files) == {"target/model.onnx", "target/model.onnx.data"}
    assert manifest.target.kv_bytes_per_token() == 2 * 2 * 2 * 8 * 4


def test_a_missing_directory(tmp_path: Path) -> None:
    assert "nowhere: no such engine directory: build one with fly-build" in message_of(tmp_path / "nowhere")


def test_a_directory_that_is_no_engine(tmp_path: Path) -> None:
    assert "not an engine directory, it has no fly.json" in message_of(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"name": "x"}'])
def test_a_truncated_manifest(directory: Path, content: str) -> None:
    (directory / MANIFEST_NAME).write_text(content)
    assert "fly.json: not a readable manifest" in message_of(directory)


def test_a_newer_schema(directory: Path) -> None:
    edit(directory, schema_version=SCHEMA_VERSION + 1)
    assert f"schema version 2, this fly-trt reads version {SCHEMA_VERSION}: upgrade fly-trt" in message_of(directory)


def test_an_older_schema(directory: Path) -> None:
    edit(directory, schema_version=0)
    assert "schema version 0, this fly-trt reads version 1: rebuild" in message_of(directory)


def test_a_field_that_makes_no_sense(directory: Path) -> None:
    edit(directory, limits={"max_batch_size": 0, "max_seq_len": 64, "max_draft_len": 15, "max_num_tokens": 32})
    assert "field limits.max_batch_size" in message_of(directory)


def test_limits_that_leave_no_room_beside_the_drafts(directory: Path) -> None:
    edit(directory, limits={"max_batch_size": 1, "max_seq_len": 64, "max_draft_len": 32, "max_num_tokens": 32})
    assert "max_num_tokens 32 must be more than max_draft_len 32" in message_of(directory)


def test_an_unknown_field(directory: Path) -> None:
    edit(directory, surprise=1)
    assert "field surprise: not known to this fly-trt: upgrade it, or rebuild" in message_of(directory)


def test_a_missing_file(directory: Path) -> None:
    (directory / "target" / "model.onnx.data").unlink()
    assert "model.onnx.data: file is missing" in message_of(directory)


def test_a_truncated_file(directory: Path) -> None:
    (directory / "target" / "model.onnx.data").write_bytes(b"weights" * 99)
    assert "693 bytes, the manifest says 700: truncated" in message_of(directory)


def test_a_changed_file_is_found_when_hashes_are_asked_for(directory: Path) -> None:
    (directory / "target" / "model.onnx.data").write_bytes(b"weighty" * 100)
    read_manifest(directory)
    assert "content differs from the manifest's sha256" in message_of(directory, verify_hashes=True)


OUTSIDE = (
    "/etc/passwd",
    "../other/model.onnx",
    "target/../../model.onnx",
    "target/..",
    "..",
    ".",
    "",
    "target//model.onnx",
    "target/",
    "C:/model.onnx",
    "C:model.onnx",
    "C:\\model.onnx",
    "\\\\server\\share\\model.onnx",
    "..\\model.onnx",
    "target\\model.onnx",
    "target/model.onnx\0",
)


def change(directory: Path, field: str, name: str) -> None:
    """Has the manifest name the file in that field; it is listed too."""
    content: dict[str, Any] = json.loads((directory / MANIFEST_NAME).read_text())
    listed = content["files"]["target/model.onnx"]
    if field == "files":
        content["files"] |= {name: listed}
    elif field == "target.model":
        content["target"]["model"] = name
    else:
        layers = dict.fromkeys(("total", "native_attention", "decomposed_attention", "kv_cache_update", "plugin"), 0)
        plan = {"library": "tensorrt", "version": "11", "compute_capability": "9.0", "cache_tokens": 64}
        plan |= {"max_row_tokens": 32, "head": "plugins", "layers": layers, "plugin_library": name}
        assert TensorRTPlan.model_validate(plan | {"plugin_library": "libfly_plugins.so"})
        content["target"]["tensorrt"] = plan
    (directory / MANIFEST_NAME).write_text(json.dumps(content))


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("field", ["files", "target.model", "target.tensorrt.plugin_library"])
def test_a_name_that_leaves_the_directory(directory: Path, field: str, name: str) -> None:
    change(directory, field, name)
    message = message_of(directory)
    assert f"fly.json: field {field}" in message
    assert f"{name!r} may lie outside the engine directory, expected a path such as target/model.onnx" in message


@pytest.mark.parametrize("field", ["target.model", "target.tensorrt.plugin_library"])
def test_a_file_that_is_loaded_and_not_listed(directory: Path, field: str) -> None:
    (directory / "other").write_bytes(b"graph")
    change(directory, field, "other")
    assert "'other' is not among the files that it lists" in message_of(directory)
    change(directory, "files", "other")
    read_manifest(directory)


@pytest.mark.parametrize("link", ["target/model.onnx", "target"])
def test_a_link_that_leaves_the_directory(directory: Path, tmp_path_factory: pytest.TempPathFactory, link: str) -> None:
    outside = tmp_path_factory.mktemp("outside") / "moved"
    (directory / link).rename(outside)
    (directory / link).symlink_to(outside)
    assert f"a link to {outside}" in message_of(directory)
    assert "outside the engine directory: replace it by the file itself" in message_of(directory)


def test_a_directory_from_before_the_most_probable_tokens_says_that_it_has_none(directory: Path) -> None:
    edit(directory, head={"entropy_top_k": 3, "stop_token_ids": [1]})
    assert not read_manifest(directory).head.top_tokens


def test_links_within_the_directory_and_to_it_are_fine(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (directory / "target" / "model.onnx").rename(directory / "graph")
    (directory / "target" / "model.onnx").symlink_to("../graph")
    link = tmp_path_factory.mktemp("links") / "engine"
    link.symlink_to(directory)
    assert read_manifest(link, verify_hashes=True) == read_manifest(directory)


def test_the_directory_can_be_moved(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = tmp_path_factory.mktemp("moved") / "engine"
    shutil.copytree(directory, moved)
    assert read_manifest(moved, verify_hashes=True).name == "tiny"


TUNING = Tuning(
    min_retention=0.99,
    confidence=0.95,
    retention=0.998,
    lower_bound=0.991,
    judged_by="checks",
    num_prompts=160,
    prompts_sha256="0" * 64,
    seed=0,
    speedup_over_plain=2.3,
    speedup_over_default=1.1,
    machine="2 cores",
    date=datetime.date(2026, 11, 27),
    version="0.1.0",
)
SETTING = {"acceptance": "fly", "fly_entropy_threshold": 0.3}


def test_what_was_tuned_becomes_the_default_beside_its_evidence(directory: Path) -> None:
    edit(directory, speculative={"num_speculative_tokens": 8})
    before = read_manifest(directory)
    written = write_tuning(directory, SETTING, TUNING)
    assert written == read_manifest(directory, verify_hashes=True)
    assert written.speculative == SETTING
    evidence = {"setting": SETTING, "previous": {"num_speculative_tokens": 8}, "engine_sha256": before.engine_sha256()}
    assert written.tuning == TUNING.model_copy(update=evidence)
    assert written.model_copy(update={"speculative": before.speculative, "tuning": None}) == before


def test_an_engine_that_is_tuned_again_remembers_what_it_was_built_with(directory: Path) -> None:
    edit(directory, speculative={"num_speculative_tokens": 8})
    write_tuning(directory, {"acceptance": "exact"}, TUNING)
    again = write_tuning(directory, SETTING, TUNING).tuning
    assert again is not None
    assert again.setting == SETTING
    assert again.previous == {"num_speculative_tokens": 8}


def test_the_manifest_is_replaced_as_a_whole_or_not_at_all(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (directory / MANIFEST_NAME).read_bytes()
    names = sorted(path.name for path in directory.iterdir())

    def write_half(path: Path, text: str, **_: object) -> int:
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        write_tuning(directory, SETTING, TUNING)
    assert (directory / MANIFEST_NAME).read_bytes() == before
    assert sorted(path.name for path in directory.iterdir()) == names


def test_a_changed_engine_takes_no_tuning(directory: Path) -> None:
    (directory / "target" / "model.onnx.data").write_bytes(b"weighty" * 100)
    with pytest.raises(EngineError, match="content differs from the manifest's sha256"):
        write_tuning(directory, SETTING, TUNING)


def test_the_hash_of_an_engine_is_that_of_its_files(directory: Path) -> None:
    before = read_manifest(directory)
    assert write_tuning(directory, SETTING, TUNING).engine_sha256() == before.engine_sha256()
    (directory / "target" / "model.onnx.data").write_bytes(b"weighty" * 100)
    other = before.model_copy(update={"files": hash_directory(directory)})
    assert other.engine_sha256() != before.engine_sha256()


def test_a_manifest_from_before_fly_tune_has_no_tuning(directory: Path) -> None:
    content = json.loads((directory / MANIFEST_NAME).read_text())
    del content["tuning"]
    (directory / MANIFEST_NAME).write_text(json.dumps(content))
    assert read_manifest(directory).tuning is None


def test_a_tuning_that_makes_no_sense(directory: Path) -> None:
    edit(directory, tuning=TUNING.model_dump(mode="json") | {"confidence": 95})
    assert "fly.json: field tuning.confidence" in message_of(directory)
