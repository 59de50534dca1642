"""fly-triton as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from fly_trt.cli.triton import main
from fly_trt.manifest import MANIFEST_NAME, read_manifest, write_manifest


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def error(*arguments: object) -> str:
    """The only line of a refused command."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("fly-triton: ")
    return line.removeprefix("fly-triton: ")


def _changed(built: Path, directory: Path, **changes: Any) -> Path:
    """A built engine with another manifest."""
    shutil.copytree(built, directory, copy_function=os.link)
    (directory / MANIFEST_NAME).unlink()
    write_manifest(read_manifest(built).model_copy(update=changes), directory)
    return directory


def config(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig())


def parameters(text: str) -> dict[str, str]:
    return {name: value.string_value for name, value in config(text).parameters.items()}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def gpu_engine(demo_engine: Path, tmp_path: Path) -> Path:
    return _changed(demo_engine, tmp_path / "gpu", backend="tensorrt", device="cuda")


def test_it_writes_a_model_and_sums_up_with_the_command_to_serve_it(demo_engine: Path, repository: Path) -> None:
    result = run(demo_engine, "-o", repository)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # no progress bar without a terminal
    assert {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()} == {
        "fly/config.pbtxt",
        "fly/1/model.py",
    }
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert rows == [
        ["engines", f"{demo_engine} (referenced)"],
        ["backend", "onnxruntime"],
        ["instances", "1"],
        ["requests in flight", "8"],
        ["method", "multi_level"],
        ["acceptance", "fly"],
        ["num_speculative_tokens", "15"],
    ]
    assert "".join(f"{repository}/fly".split()) in "".join(result.stdout.split())  # the title, which may be wrapped
    assert result.stdout.splitlines()[-1] == f"tritonserver --model-repository {repository}"


def test_json_is_one_object_with_the_same_facts(demo_engine: Path, repository: Path) -> None:
    result = run(demo_engine, "-o", repository, "--name", "exact", "--acceptance", "exact", "--copy-engines", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "model": "exact",
        "model_dir": str(repository / "exact"),
        "engines": f"{demo_engine} (copied)",
        "backend": "onnxruntime",
        "instances": 1,
        "requests in flight": 8,
        "method": "multi_level",
        "acceptance": "exact",
        "num_speculative_tokens": 15,
    }
    assert read_manifest(repository / "exact" / "1" / "engine", verify_hashes=True) == read_manifest(demo_engine)


def test_a_dry_run_prints_what_would_be_written_and_writes_nothing(demo_engine: Path, repository: Path) -> None:
    flags = (demo_engine, "-o", repository, "--copy-engines", "--instances", 2)
    dry = run(*flags, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not repository.exists()
    assert json.loads(run(*flags, "--dry-run", "--json").stdout)["config"] == dry.stdout
    assert run(*flags).exit_code == 0
    assert dry.stdout == (repository / "fly" / "config.pbtxt").read_text(encoding="utf-8")
    assert (
        "# As written: fly (reference: threshold 0.3, window 6), model + lookup drafts of 15; not tuned\n" in dry.stdout
    )
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    assert run(*flags, "--dry-run").stdout == dry.stdout  # also where there is a model already
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--include-input-in-output"], {"exclude_input_in_output": "false"}),
        (["--exclude-input-in-output"], {}),
        (["--max-batch-size", "4"], {"max_batch_size": "4"}),
        (["--max-seq-len", "512"], {"max_seq_len": "512"}),
        (["--num-threads", "3"], {"num_threads": "3"}),
        (["--method", "none"], {"method": "none"}),
        (["--method", "ngram"], {"method": "ngram", "acceptance": "exact"}),
        (["--num-speculative-tokens", "5"], {"num_speculative_tokens": "5"}),
        (["--acceptance", "exact"], {"acceptance": "exact"}),
        (["--preset", "paper"], {"preset": "paper"}),
        (["--fly-entropy-threshold", "0.25"], {"fly_entropy_threshold": "0.25"}),
        (["--fly-window-size", "0"], {"fly_window_size": "0"}),
        (
            ["--audit-fraction", "0.5", "--audit-log", "a.jsonl", "--audit-log-text", "--breaker-reset-seconds", "60"],
            {
                "audit_fraction": "0.5",
                "audit_log": "a.jsonl",
                "audit_log_text": "true",
                "breaker_reset_seconds": "60.0",
            },
        ),
    ],
)
def test_each_flag_is_one_parameter(
    demo_engine: Path, repository: Path, flags: list[str], changes: dict[str, str]
) -> None:
    plain = parameters(run(demo_engine, "-o", repository, "--dry-run").stdout)
    assert parameters(run(demo_engine, "-o", repository, "--dry-run", *flags).stdout) == plain | changes


def test_instances_and_queue_are_tritons_settings(demo_engine: Path, repository: Path) -> None:
    def dry(*flags: object) -> ModelConfig:
        return config(run(demo_engine, "-o", repository, "--dry-run", *flags).stdout)

    policy = dry().dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (1024, 60_000_000)
    policy = dry("--max-queue-size", 5, "--queue-timeout", 0.5).dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (5, 500_000)
    assert dry("--queue-timeout", 0).dynamic_batching.default_queue_policy.default_timeout_microseconds == 0
    assert dry("--instances", 3).instance_group[0].count == 3
    assert dry("--name", "other").name == "other"


def test_gpus_are_ids_with_commas(gpu_engine: Path, repository: Path) -> None:
    def group(*flags: object) -> Any:
        return config(run(gpu_engine, "-o", repository, "--dry-run", *flags).stdout).instance_group[0]

    assert group().kind == ModelInstanceGroup.Kind.KIND_GPU
    assert list(group().gpus) == []
    assert list(group("--gpus", "0,2, 3").gpus) == [0, 2, 3]
    assert run(gpu_engine, "-o", repository, "--gpus", "0,2").stdout.count("1 on GPUs 0, 2 each") == 1


def test_a_model_is_replaced_only_with_overwrite(demo_engine: Path, repository: Path) -> None:
    assert run(demo_engine, "-o", repository).exit_code == 0
    assert "fly: already exists" in error(demo_engine, "-o", repository, "--method", "ngram")
    written = repository / "fly" / "config.pbtxt"
    assert parameters(written.read_text(encoding="utf-8"))["method"] == "multi_level"
    assert run(demo_engine, "-o", repository, "--method", "ngram", "--overwrite").exit_code == 0
    assert parameters(written.read_text(encoding="utf-8"))["method"] == "ngram"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "was built for onnxruntime, which runs on the CPU: leave --gpus out"),
        (["--gpus", "one"], "gpus 'one': expected ids with commas, such as 0,1"),
        (["--gpus", ""], "gpus '': expected ids with commas"),
        (["--gpus", "0,,1"], "gpus '0,,1': expected ids with commas"),
        (["--instances", "0"], "instances 0: expected at least 1"),
        (["--num-speculative-tokens", "33"], "num_speculative_tokens 33: built for max_draft_len 32: rebuild with"),
        (["--num-speculative-tokens", "0"], "num_speculative_tokens 0: expected a whole number, at least 1"),
        (["--acceptance", "exact", "--fly-window-size", "4"], "fly_window_size 4: has no effect with acceptance"),
        (["--acceptance", "exact", "--preset", "paper"], "preset 'paper': has no effect with acceptance 'exact'"),
        (["--fly-entropy-threshold", "nan"], "fly_entropy_threshold nan: expected a number >= 0"),
        (["--name", "a/b"], "name 'a/b': expected letters, digits"),
        (["--name", ""], "name '': expected letters, digits"),
        (["--max-batch-size", "9"], "max_batch_size 9: demo was built for 8: rebuild with --max-batch-size 9"),
        (["--max-seq-len", "4096"], "max_seq_len 4096"),
        (["--num-threads", "0"], "num_threads 0: expected a whole number, at least 1"),
        (["--max-queue-size", "0"], "max_queue_size 0: expected a whole number, at least 1"),
        (["--queue-timeout", "-1"], "queue_timeout -1.0: expected 0 to"),
        (["--queue-timeout", "nan"], "queue_timeout nan: expected 0 to"),
        (["--queue-timeout", "inf"], "queue_timeout inf: expected 0 to"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_code_2(
    demo_engine: Path, repository: Path, flags: list[str], message: str
) -> None:
    assert message in error(demo_engine, "-o", repository, *flags)
    assert not repository.exists()


def test_gpus_of_a_gpu_engine_are_checked_too(gpu_engine: Path, repository: Path) -> None:
    assert "expected different ids" in error(gpu_engine, "-o", repository, "--gpus", "1,1")
    assert "expected different ids" in error(gpu_engine, "-o", repository, "--gpus=-1")


def test_drafts_of_an_engine_without_a_draft_are_ngrams(demo_engine: Path, tmp_path: Path, repository: Path) -> None:
    engine = _changed(demo_engine, tmp_path / "target_only", draft=None)
    assert parameters(run(engine, "-o", repository, "--dry-run").stdout)["method"] == "ngram"
    assert "needs a draft model" in error(engine, "-o", repository, "--method", "multi_level")


def test_a_missing_engine_is_named(demo_engine: Path, repository: Path, tmp_path: Path) -> None:
    assert f"{tmp_path}/gone: no such engine directory" in error(tmp_path / "gone", "-o", repository)
    assert "target: not an engine directory" in error(demo_engine / "target", "-o", repository)


def test_an_output_that_cannot_be_written_is_named(demo_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    for output in (file, file / "models"):
        message = error(demo_engine, "-o", output)
        assert message.startswith(str(file))
        assert message.split(": ")[1] in ("File exists", "Not a directory")
    assert file.read_bytes() == b"content"
    message = error(demo_engine, "-o", tmp_path / "models", "--name", "a" * 300)
    assert message == f"{tmp_path}/models/{'a' * 300}: File name too long: write elsewhere"


def test_a_flag_that_is_missing_or_unknown_is_exit_code_2(demo_engine: Path, repository: Path) -> None:
    for arguments in ((demo_engine,), (demo_engine, "-o", repository, "--preset", "strict"), ("-o", repository)):
        assert run(*arguments).exit_code == 2
    assert not repository.exists()


def test_help_has_examples_and_every_flag() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "\n  Examples:\n    fly-triton engines/demo -o model_repository\n" in result.stdout
    flags = {name for option in main.params for name in option.opts if name.startswith("--")}
    assert {"--gpus", "--copy-engines", "--queue-timeout", "--fly-window-size", "--dry-run", "--json"} < flags
    for flag in (*flags, "--include-input-in-output"):
        assert flag in result.stdout
    assert run("-h").stdout == result.stdout


def test_it_needs_neither_torch_nor_a_server_nor_a_client(demo_engine: Path, repository: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnx', 'fly_build', 'tritonclient',"
        "'triton_python_backend_utils'])); from fly_trt.cli.triton import main; main()"
    )
    command = [sys.executable, "-c", code, demo_engine, "-o", repository, "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["model"] == "fly"
