"""One benchmark of every mode under two loads, for all tests that look at one."""

import json
from pathlib import Path

import pytest

from eval_prompts import load_eval_prompts
from fly_trt.benchmark.client import Load
from fly_trt.benchmark.measure import Benchmark, BenchmarkConfig, run_benchmark

CHECKS = [{"kind": "regex", "value": "."}, {"kind": "contains", "value": "never said"}, None]


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts: one that any answer is right for, one that none is right for, one without a check."""
    prompts = [record["prompt"] for record in load_eval_prompts()[::100]]
    records = [{"prompt": prompt, "check": check} for prompt, check in zip(prompts, CHECKS, strict=True)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def benchmark(demo_engine: Path, prompts_file: Path) -> Benchmark:
    loads = (Load(concurrency=1), Load(concurrency=2))
    config = BenchmarkConfig(prompts=prompts_file, num_prompts=3, rounds=2, max_tokens=40, loads=loads)
    return run_benchmark(demo_engine, config)
