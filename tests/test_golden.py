"""Token ids and rounds of the FLy authors' own program, on the demo pair and on a pair with a weak draft.

tests/assets/golden holds what their program emitted (float32, greedy, up to 160 tokens, cut after the first
end-of-sequence). Every sequence must be reproduced token for token, in batches and with draft lengths that follow the
load. Loose rounds are then also as many as theirs. Exact ones are cut where the load asks for it, and in a batch the
first token comes without a draft, so that they are counted with a fixed length, one request at a time. A fixed length
is tried on every third sequence. The rounds of 10 are also asked of engines that are configured for 15.

The demo pair's requests open every window although they might pause them; with the weak draft some would pause, so that
windows are always opened there, as the authors do.
"""

import json
from pathlib import Path

import pytest

from fly_trt import LLM, AcceptanceParams, RequestOutput, SamplingParams, SpeculativeConfig

GOLDEN = Path(__file__).parent / "assets" / "golden"
CONFIGS = ("exact", "fly", "fly_multilevel", "fly_k10_w4")
PAIRS = {"public.jsonl": ("demo_engine", 60), "public_weak.jsonl": ("weak_engine", 40)}


def rows_of(file: str, config: str) -> list[dict]:
    rows = [json.loads(line) for line in (GOLDEN / file).read_text().splitlines()]
    return [row for row in rows if row["config"]["name"] == config]


def speculative_config(config: dict, *, adaptive: bool, may_pause: bool) -> SpeculativeConfig:
    fly = {"fly_window_size": config["window"], "fly_entropy_threshold": config["entropy_threshold"]}
    return SpeculativeConfig(
        method="multi_level" if config["multi_level"] else "draft_model",
        num_speculative_tokens=config["num_speculative_tokens"],
        adaptive_draft_length=adaptive,
        adaptive_acceptance=may_pause,
        acceptance="fly" if config["fly"] else "exact",
        **(fly if config["fly"] else {}),
    )


def different(rows: list[dict], outputs: list[RequestOutput], *, with_rounds: bool) -> list[int]:
    """The ids of the rows whose tokens, or rounds, are not the authors'."""
    return [
        row["id"]
        for row, output in zip(rows, outputs, strict=True)
        if output.outputs[0].token_ids != row["token_ids"]
        or (with_rounds and output.metrics.num_spec_steps != row["rounds"])
    ]


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("file", PAIRS)
def test_every_sequence_is_the_authors(file: str, config: str, adaptive: bool, request: pytest.FixtureRequest) -> None:
    fixture, num_rows = PAIRS[file]
    rows = rows_of(file, config)
    assert len(rows) == num_rows
    if not adaptive:
        rows = rows[::3]
    counts_rounds = rows[0]["config"]["fly"] or not adaptive
    batch_size = 8 if rows[0]["config"]["fly"] or adaptive else 1
    prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
    settings = speculative_config(rows[0]["config"], adaptive=adaptive, may_pause=fixture == "demo_engine")
    with LLM(request.getfixturevalue(fixture), speculative_config=settings, max_batch_size=batch_size) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=160))
    assert different(rows, outputs, with_rounds=counts_rounds) == []


def test_every_sequence_is_the_authors_without_operators_of_this_project(plain_operators_engine: Path) -> None:
    rows = rows_of("public.jsonl", "fly_multilevel")[::3]
    prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
    settings = speculative_config(rows[0]["config"], adaptive=False, may_pause=True)
    with LLM(plain_operators_engine, speculative_config=settings) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=160))
    assert different(rows, outputs, with_rounds=True) == []


@pytest.mark.parametrize("file", PAIRS)
def test_rounds_that_a_request_asks_for_are_the_authors(file: str, request: pytest.FixtureRequest) -> None:
    rows = rows_of(file, "fly_k10_w4")
    config = rows[0]["config"]
    assert config["num_speculative_tokens"] == 10
    window = AcceptanceParams(fly_window_size=config["window"], fly_entropy_threshold=config["entropy_threshold"])
    params = SamplingParams(max_tokens=160, num_speculative_tokens=10, acceptance=window)
    prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
    method = "multi_level" if config["multi_level"] else "draft_model"
    may_pause = PAIRS[file][0] == "demo_engine"
    settings = SpeculativeConfig(method=method, num_speculative_tokens=15, adaptive_acceptance=may_pause)
    with LLM(request.getfixturevalue(PAIRS[file][0]), speculative_config=settings) as llm:
        outputs = llm.generate(prompts, params)
    assert different(rows, outputs, with_rounds=True) == []
    assert max(len(output.metrics.acceptance_histogram) for output in outputs) == 11
