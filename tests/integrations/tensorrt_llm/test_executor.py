"""LLM over the C++ Executor of TensorRT-LLM 1.2, which is simulated: ONNX Runtime computes the demo pair's engines.

Token ids and rounds are those of the FLy authors' own program (tests/assets/golden), although the loop never sees a
logit: the rule is in the engine, and the runtime accepts what equals the sampled token.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import simulated_executor
from executor_directory import of_golden, write_directory

from fly_trt import LLM, RequestOutput, SamplingParams

GOLDEN = Path(__file__).parents[2] / "assets" / "golden"
FILES = {"public.jsonl": "demo_engine", "public_weak.jsonl": "weak_engine"}
CONFIGS = ("exact", "fly", "fly_multilevel", "fly_k10_w4")


@pytest.fixture(autouse=True)
def bindings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    yield simulated_executor.install(monkeypatch, tmp_path / "tensorrt_llm")
    left = [executor.role for executor in simulated_executor.Executor.alive]
    for executor in list(simulated_executor.Executor.alive):
        executor.shutdown()
    assert left == [], "executors that nobody shut down"


def executor_of(role: str) -> simulated_executor.Executor:
    return next(executor for executor in simulated_executor.Executor.alive if executor.role == role)


def rows_of(file: str, config: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (GOLDEN / file).read_text().splitlines()]
    return [row for row in rows if row["config"]["name"] == config]


def prompts_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]


def different(rows: list[dict[str, Any]], outputs: list[RequestOutput]) -> list[int]:
    return [
        row["id"]
        for row, output in zip(rows, outputs, strict=True)
        if (output.outputs[0].token_ids, output.metrics.num_spec_steps) != (row["token_ids"], row["rounds"])
    ]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("file", FILES)
def test_token_ids_and_rounds_are_the_authors(
    file: str, config: str, request: pytest.FixtureRequest, tmp_path: Path, is_long: bool
) -> None:
    rows = rows_of(file, config)[:: 1 if is_long else 8]
    onnx = request.getfixturevalue(FILES[file])
    directory = write_directory(tmp_path / "engine", onnx, **of_golden(rows[0]["config"]))
    with LLM(directory, max_batch_size=4) as llm:
        outputs = llm.generate(prompts_of(rows), SamplingParams(max_tokens=160))
        assert executor_of("target").num_active == executor_of("draft").num_active == 0
    assert different(rows, outputs) == []
    assert sum(output.metrics.num_loosened_tokens for output in outputs) == 0, "nobody can tell"
