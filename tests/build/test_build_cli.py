"""`fly-build` as a user meets it: a dry run that writes nothing, errors of one line with exit code 2, and a build that
ends with where the engine is.
"""

import errno
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import fly_build.model_build
from fly_build.checkpoint import open_checkpoint
from fly_build.cli import main
from fly_build.tokenizer import save_tokenizer
from fly_trt.manifest import read_manifest
from tiny_models import TinyPair

FEW_BYTES = 20_000
WAITS_WHILE_TRACING = """
import signal
import fly_build.cli, fly_build.model_build
def wait(*arguments, **keywords):
    print("tracing", flush=True)
    while True:
        signal.pause()
fly_build.model_build.export_decoder = wait
fly_build.cli.main()
"""
KV_BYTES_PER_TOKEN = 2 * 1 * 2 * 16 * 4  # key and value, 1 layer, 2 heads, 16 channels, float32


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _fly_build(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "240"})


def _error(result: Result) -> str:
    """The only line of a refused command."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("fly-build: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("fly-build: ")


def test_dry_run_prints_the_memory_of_a_slot_and_writes_nothing(tiny_pair: TinyPair, working_directory: Path) -> None:
    flags = ("--max-seq-len", 128, "--max-batch-size", 4)
    result = _fly_build("--target", tiny_pair.target, "--draft", tiny_pair.draft, *flags, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "nothing is built" in result.stdout
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("│ target")]
    assert tiny_pair.target.name in row
    assert f"{KV_BYTES_PER_TOKEN} B" in row
    assert f"{KV_BYTES_PER_TOKEN * 128 / 1024:.1f} KiB" in row
    assert f"{KV_BYTES_PER_TOKEN * 128 * 4 / 1024:.1f} KiB" in row
    assert tiny_pair.draft.name in result.stdout
    assert list(working_directory.iterdir()) == []


def test_dry_run_as_json_gives_the_numbers_in_bytes(tiny_pair: TinyPair, working_directory: Path) -> None:
    result = _fly_build("--target", tiny_pair.target, "--dtype", "float16", "-o", "here", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    (target,) = plan["models"]
    assert plan["output"] == "here"
    assert plan["max_seq_len"] == 256
    assert target["kv_bytes_per_slot"] == KV_BYTES_PER_TOKEN * 256
    assert target["weight_bytes"] == 2 * target["source"]["num_parameters"]
    assert list(working_directory.iterdir()) == []


def test_dry_run_needs_no_readable_weights(tiny_pair: TinyPair, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pair.target, tmp_path / "copied"))
    (folder / "model.safetensors").write_bytes(b"not read")
    assert _fly_build("--target", folder, "--dry-run").exit_code == 0


def test_flags_override_the_recipe(tiny_pair: TinyPair, working_directory: Path) -> None:
    recipe = working_directory / "own.yaml"
    recipe.write_text(f"target: {tiny_pair.target}\nmax_batch_size: 4\nmax_draft_len: 16\n", encoding="utf-8")
    result = _fly_build(recipe, "--max-batch-size", 2, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert (plan["max_batch_size"], plan["max_draft_len"]) == (2, 16)


def test_no_target_is_an_error() -> None:
    assert "no target checkpoint: give --target CHECKPOINT or a recipe file" in _error(_fly_build("-o", "here"))


def test_missing_target_is_an_error() -> None:
    assert "./gone: no such folder" in _error(_fly_build("--target", "./gone", "-o", "here"))


def test_unknown_recipe_is_an_error() -> None:
    assert "nowhere: no such recipe" in _error(_fly_build("nowhere"))


def test_bad_recipe_field_is_an_error(working_directory: Path) -> None:
    (working_directory / "own.yaml").write_text("target: org/a\nmax_seqlen: 5\n", encoding="utf-8")
    assert "own.yaml: max_seqlen: Extra inputs are not permitted, got 5" in _error(_fly_build("own.yaml"))


def test_draft_with_another_tokenizer_is_an_error(tiny_pair: TinyPair, tmp_path: Path) -> None:
    draft = Path(shutil.copytree(tiny_pair.draft, tmp_path / "draft"))
    tokenizer = json.loads((draft / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    error = _error(_fly_build("--target", tiny_pair.target, "--draft", draft, "-o", "here"))
    assert "have different tokenizers" in error
    assert "choose a draft of the target's model family" in error


def test_sequence_longer_than_the_checkpoints_support_is_an_error(tiny_pair: TinyPair) -> None:
    pair = ("--target", tiny_pair.target, "--draft", tiny_pair.draft)
    error = _error(_fly_build(*pair, "--max-seq-len", 129, "-o", "here"))
    assert error == "max_seq_len 129: the checkpoints support 128: use --max-seq-len 128\n"


def test_backend_that_cannot_be_built_is_an_error(tiny_pair: TinyPair) -> None:
    result = _fly_build("--target", tiny_pair.target, "--backend", "openvino")
    assert result.exit_code == 2
    assert "'openvino' is not one of 'onnxruntime', 'tensorrt'" in result.stderr
    assert "[onnxruntime|tensorrt|tensorrt-llm|tensorrt-llm-engine]" in _fly_build("--help").stdout


def test_existing_output_is_an_error_and_stays_as_it_is(tiny_pair: TinyPair, working_directory: Path) -> None:
    (working_directory / "here").mkdir()
    (working_directory / "here" / "thesis.txt").write_text("years of work", encoding="utf-8")
    for flags in ((), ("--overwrite",)):
        assert "here: " in _error(_fly_build("--target", tiny_pair.target, "-o", "here", *flags))
    assert (working_directory / "here" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_interrupted_build_says_so_and_leaves_nothing(
    tiny_pair: TinyPair, working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_control_c(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fly_build.model_build, "export_decoder", press_control_c)
    result = _fly_build("--target", tiny_pair.target, "-o", "here")
    assert result.exit_code == 130
    assert result.stderr == "fly-build: interrupted, nothing was written\n"
    assert list(working_directory.iterdir()) == []


@pytest.mark.parametrize("output", ["file/engine", "file/deeper/engine", "/proc/engine"])
def test_place_where_nothing_can_be_written_is_an_error_before_anything_is_built(
    output: str, tiny_pair: TinyPair, working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fly_build.model_build, "export_decoder", lambda *arguments, **keywords: pytest.fail("built"))
    (working_directory / "file").write_text("a file", encoding="utf-8")
    error = _error(_fly_build("--target", tiny_pair.target, "-o", output))
    assert error.startswith(str(working_directory / output))
    assert error.endswith(": write elsewhere\n")
    assert [path.name for path in working_directory.iterdir()] == ["file"]


def _limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FEW_BYTES, FEW_BYTES))


def test_file_that_cannot_be_written_to_its_end_is_an_error_and_leaves_nothing(
    tiny_pair: TinyPair, working_directory: Path
) -> None:
    """As on a full disk: the weights' file does not fit. numpy writes it, and says only how far it came."""
    command = [sys.executable, "-m", "fly_build.cli", "--target", tiny_pair.target, "-o", "here"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=_limit_file_size)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"fly-build: {working_directory / 'here'}: No space for all bytes (")
    assert result.stderr.endswith(": free some space, or write elsewhere\n")
    assert result.stderr.count("\n") == 1
    assert list(working_directory.iterdir()) == []


def test_tokenizer_that_cannot_be_written_is_an_error_of_the_system(tiny_pair: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as full:
        save_tokenizer(open_checkpoint(str(tiny_pair.target)).tokenizer, tmp_path)
    assert full.value.errno == errno.ENOSPC


def test_sigterm_in_the_middle_of_a_build_leaves_nothing(tiny_pair: TinyPair, working_directory: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS_WHILE_TRACING, "--target", str(tiny_pair.target), "-o", "here"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "tracing\n"
    assert [path.name.partition("-")[0] for path in working_directory.iterdir()] == [".here.building"]
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (143, "fly-build: terminated, nothing was written\n")
    assert list(working_directory.iterdir()) == []


def test_warnings_follow_the_summary_on_stderr(tiny_pair: TinyPair, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pair.target, tmp_path / "copied"))
    tensors = load_file(folder / "model.safetensors") | {"score.weight": torch.ones(2, 64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = open_checkpoint(str(folder)).tokenizer
    tokenizer.add_tokens([f"[PAD{n}]" for n in range(5)])
    tokenizer.save_pretrained(folder)
    unembedded = f"warning: {folder}: the tokenizer has tokens that the model has no embedding for (896 rows)"
    dry = _fly_build("--target", folder, "-o", "here", "--dry-run", "--json")
    assert json.loads(dry.stdout)["output"] == "here"
    assert dry.stderr.startswith(unembedded)
    result = _fly_build("--target", folder, "-o", "here", "--max-seq-len", 64)
    assert result.exit_code == 0, result.output
    first, second = result.stderr.splitlines()
    assert first.startswith(unembedded)
    assert second.endswith("config.json does not announce them: score.weight")
    assert _fly_build("--target", tiny_pair.target, "--dry-run").stderr == ""


def test_build_writes_the_engine_where_it_says(tiny_pair: TinyPair, working_directory: Path) -> None:
    result = _fly_build("--target", tiny_pair.target, "--quantization", "int8", "--max-seq-len", 64)
    assert result.exit_code == 0, result.output
    assert "engines/target is ready after" in result.stdout
    manifest = read_manifest(working_directory / "engines" / "target", verify_hashes=True)
    assert (manifest.limits.max_seq_len, manifest.target.quantization) == (64, "int8")
