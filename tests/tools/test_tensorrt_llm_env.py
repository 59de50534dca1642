"""tools/tensorrt_llm_env.sh with a docker that only says how it was called: what the image is made of, and how commands
reach it."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "tensorrt_llm_env.sh"
DOCKER = """#!/bin/sh
for argument in "$@"; do echo "$argument"; done >"$SEEN/arguments"
[ "$1" != build ] || cat >"$SEEN/context.tar"
"""


def _call(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "bin").mkdir()
    docker = folder / "bin" / "docker"
    docker.write_text(DOCKER, encoding="utf-8")
    docker.chmod(0o755)
    variables = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SEEN": str(folder), "HOME": str(folder)}
    command = [str(SCRIPT), *arguments]
    return subprocess.run(
        command, env={**os.environ, **variables, **environment}, cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_image_is_made_of_nvidias_and_of_this_tree(tmp_path: Path) -> None:
    finished = _call(tmp_path, "make")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "arguments").read_text().split() == ["build", "--tag", "fly-trt-tensorrt-llm:1.2.1", "-"]
    with tarfile.open(tmp_path / "context.tar") as context:
        names = set(context.getnames())
        member = context.extractfile("Dockerfile")
        assert member is not None
        dockerfile = member.read().decode()
    assert {"pyproject.toml", "README.md", "LICENSE", "fly_trt/__init__.py", "build/fly_build/cli.py"} <= names
    assert "plugins/CMakeLists.txt" in names
    assert dockerfile.startswith("FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.1\n")
    assert "pip install --no-cache-dir --no-deps /opt/fly-trt" in dockerfile
    # What TensorRT-LLM pins stays as it is.
    pinned = ("torch", "transformers", "tokenizers", "numpy", "tensorrt", "onnx")
    assert not any(f"'{name}" in dockerfile for name in pinned)
    assert "ENV FLY_PLUGINS=/opt/fly-plugins/libfly_plugins.so" in dockerfile


def test_a_command_runs_in_the_current_folder(tmp_path: Path) -> None:
    finished = _call(tmp_path, "run", "fly-build demo -o 'an engine'", FLY_DOCKER_OPTIONS="-v /a:/b --name x")
    assert finished.returncode == 0, finished.stderr
    arguments = (tmp_path / "arguments").read_text().splitlines()
    folder = str(tmp_path.resolve())
    assert arguments[:2] == ["run", "--rm"]
    assert f"{folder}:{folder}" in arguments
    assert arguments[-8:] == [
        "-v", "/a:/b", "--name", "x", "fly-trt-tensorrt-llm:1.2.1", "bash", "-c", "fly-build demo -o 'an engine'"
    ]  # fmt: skip


def test_another_word_is_an_error_of_one_line(tmp_path: Path) -> None:
    finished = _call(tmp_path, "start")
    assert finished.returncode == 2
    assert finished.stderr == "tensorrt_llm_env.sh: expected 'make' or 'run COMMAND', got 'start'\n"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing() -> None:
    finished = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert finished.stdout == ""
