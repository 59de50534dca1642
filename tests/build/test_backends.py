"""The table of the build's backends: a module and a line in it are all that a new one takes, and what it says of
itself is known before any library is loaded.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import fly_build.cli
from fly_build.backends import BACKENDS
from fly_trt.manifest import read_manifest
from tiny_models import TinyPair
from toy_backend import STEP_COSTS, ToyBackend

HEAVY = ["torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx"]
HEAVY += ["tensorrt_llm"]
WITHOUT_THE_EXTRA = f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); from fly_build.cli import main; main()"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> click.Command:
    """fly-build with one more line in the table. Its flags are made of the table when it is imported."""
    monkeypatch.setitem(BACKENDS, ("toy", "cpu"), ToyBackend)
    monkeypatch.setattr(fly_build, "cli", fly_build.cli)  # the usual one comes back
    monkeypatch.delitem(sys.modules, "fly_build.cli")
    return importlib.import_module("fly_build.cli").main


def _run(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_a_module_and_a_line_in_the_table_are_a_backend(
    command: click.Command, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    pair = ("--target", tiny_pair.target, "--draft", tiny_pair.draft)
    result = _run(command, *pair, "--backend", "toy", "-o", tmp_path / "engine")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "engine", verify_hashes=True)
    assert (manifest.backend, manifest.library_versions) == ("toy", {"toy": "1"})
    assert manifest.draft is not None
    for folder, model in (("target", manifest.target), ("draft", manifest.draft)):
        assert model.model == f"{folder}/model.toy"
        assert (tmp_path / "engine" / model.model).read_text() == model.source.checkpoint
        assert (model.dtype, model.kv_cache_dtype) == ("float16", "bfloat16")
    costs = [manifest.speculative[name] for name in ("draft_token_cost", "verification_token_cost")]
    assert tuple(costs) == STEP_COSTS


def test_errors_and_help_go_by_the_table(command: click.Command, tmp_path: Path) -> None:
    assert "[onnxruntime|tensorrt|tensorrt-llm|tensorrt-llm-engine|toy]" in _run(command, "--help").stdout
    unknown = _run(command, "--target", "org/a", "--backend", "openvino")
    assert "'openvino' is not one of 'onnxruntime', 'tensorrt', 'tensorrt-llm', 'tensorrt-llm-" in unknown.stderr
    recipe = tmp_path / "own.yaml"
    recipe.write_text("target: org/a\nbackend: openvino", encoding="utf-8")
    known = "'onnxruntime' or 'tensorrt' or 'tensorrt-llm' or 'tensorrt-llm-engine' or 'toy'"
    expected = f"backend: Input should be {known}, got 'openvino'\n"
    assert _run(command, recipe).stderr == f"fly-build: {recipe}: {expected}"


def test_a_backend_refuses_what_it_cannot_do_and_what_belongs_to_another(command: click.Command) -> None:
    toy = ("--target", "org/a", "--backend", "toy")
    assert _run(command, *toy, "--quantization", "int8").stderr == "fly-build: quantization: a toy has none\n"
    assert _run(command, *toy, "--plugin-library", "file").stderr == (
        "fly-build: plugin_library: belongs to backend tensorrt or tensorrt-llm-engine, got backend 'toy': leave it "
        "out\n"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "--backend [onnxruntime|tensorrt|tensorrt-llm|tensorrt-llm-engine]"),
        (["--target", "a", "--timing-cache", "b"], "timing_cache: belongs to backend tensorrt, got backend 'onnx"),
        (["--target", "a", "--quantization", "fp8"], "no CPU computes with it: use --quantization int8, or --backend"),
        (["--target", "a"], "is not installed: pip install 'fly-trt[build]'"),
    ],
)
def test_flags_are_checked_without_the_extra_build(arguments: list[str], expected: str) -> None:
    command = [sys.executable, "-c", WITHOUT_THE_EXTRA, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == (0 if arguments == ["--help"] else 2), finished.stderr
    assert expected in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
