"""Token ids and rounds of the FLy authors' own program, on the demo pair and on a pair with a weak draft.

tests/assets/golden holds what their program emitted (float32, greedy, up to 160 tokens, cut after the first
end-of-sequence). Every sequence must be reproduced, token for token and in as many verification steps.
"""

import json
from pathlib import Path

import pytest

from fly_trt import LLM, SamplingParams, SpeculativeConfig

GOLDEN = Path(__file__).parent / "assets" / "golden"
CONFIGS = ("exact", "fly", "fly_multilevel", "fly_k10_w4")
PAIRS = {"public.jsonl": ("demo_engine", 60), "public_weak.jsonl": ("weak_engine", 40)}


def rows_of(file: str, config: str) -> list[dict]:
    rows = [json.loads(line) for line in (GOLDEN / file).read_text().splitlines()]
    return [row for row in rows if row["config"]["name"] == config]


def speculative_config(config: dict) -> SpeculativeConfig:
    fly = {"fly_window_size": config["window"], "fly_entropy_threshold": config["entropy_threshold"]}
    return SpeculativeConfig(
        method="multi_level" if config["multi_level"] else "draft_model",
        num_speculative_tokens=config["num_speculative_tokens"],
        acceptance="fly" if config["fly"] else "exact",
        **(fly if config["fly"] else {}),
    )


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("file", PAIRS)
def test_every_sequence_is_the_authors(file: str, config: str, request: pytest.FixtureRequest) -> None:
    fixture, num_rows = PAIRS[file]
    rows = rows_of(file, config)
    assert len(rows) == num_rows
    prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
    settings = speculative_config(rows[0]["config"])
    with LLM(request.getfixturevalue(fixture), speculative_config=settings) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=160))
    got = [(output.outputs[0].token_ids, output.metrics.num_spec_steps) for output in outputs]
    want = [(row["token_ids"], row["rounds"]) for row in rows]
    different = [row["id"] for row, a, b in zip(rows, got, want, strict=True) if a != b]
    assert different == []
