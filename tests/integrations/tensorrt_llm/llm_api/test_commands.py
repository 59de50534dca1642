"""What the command lines say of a directory for TensorRT-LLM: they serve it, or refuse it in one line."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import fly_trt.cli.bench
import fly_trt.cli.generate
import fly_trt.cli.triton
from fly_trt import LLM, SamplingParams
from served_by_tensorrt_llm import PROMPTS


def run(command: click.Command, *arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def test_fly_generate_streams_it(directory: Path, own: LLM, stand_in: Any) -> None:
    result = run(fly_trt.cli.generate.main, str(directory), PROMPTS[0], "--max-tokens", "40")
    assert result.exit_code == 0, result.stderr
    (expected,) = own.generate(PROMPTS[0], SamplingParams(max_tokens=40))
    assert result.stdout.rstrip("\n") == expected.outputs[0].text.rstrip("\n")
    summary = result.stderr.strip().splitlines()[-1]
    assert "finish reason" in summary
    assert "mean acceptance length" in summary


def test_fly_generate_has_plain_decoding_to_compare_with(directory: Path, stand_in: Any) -> None:
    result = run(fly_trt.cli.generate.main, str(directory), PROMPTS[0], "--method", "none", "--json")
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["metrics"]["num_spec_steps"] == 0
    assert record["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--repetition-penalty", "1.2"], "repetition_penalty 1.2: is not read by its one-model modes (TensorRT-LLM)"),
        (["--temperature", "0.5"], "temperature 0.5: TensorRT-LLM 1.2 takes the most probable tokens"),
    ],
)
def test_fly_generate_says_what_a_request_cannot_have(
    flags: list[str], said: str, directory: Path, stand_in: Any
) -> None:
    result = run(fly_trt.cli.generate.main, str(directory), "Hello", *flags)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-speculative-tokens", "4"], "num_speculative_tokens 4: pair was built for 10"),
        (["--exact-first", "2"], "exact_first 2: guards are the host's"),
        (["--num-threads", "2"], "num_threads 2: pair was built for tensorrt-llm, which places its models by itself"),
        (["--devices", "0"], "devices [0]: pair was built for tensorrt-llm, which places its models by itself"),
    ],
)
def test_fly_generate_says_what_the_directory_cannot_have(flags: list[str], said: str, directory: Path) -> None:
    result = run(fly_trt.cli.generate.main, str(directory), "Hello", *flags)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "tensorrt-llm loads its models by itself, and modes here share what is loaded once"),
        (["--roofline"], "roofline: pair was built for tensorrt-llm on cuda: the limits of a GPU are not measured"),
    ],
)
def test_fly_bench_refuses_it_in_one_line(flags: list[str], said: str, directory: Path) -> None:
    result = run(fly_trt.cli.bench.main, str(directory), *flags)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_fly_triton_refuses_it_in_one_line(make_directory: Any, tmp_path: Path) -> None:
    directory = make_directory()
    for way in ("serve it with AsyncLLM", f"run {directory}/triton.sh"):
        result = run(fly_trt.cli.triton.main, str(directory), "-o", str(tmp_path / "models"))
        assert result.exit_code == 2
        assert f"fly-trt's Triton model does not serve tensorrt-llm: {way}" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        (directory / "triton.sh").write_text("#!/bin/sh")
    assert not (tmp_path / "models").exists()
