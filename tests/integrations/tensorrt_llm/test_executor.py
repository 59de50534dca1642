"""LLM over the C++ Executor of TensorRT-LLM 1.2, which is simulated: ONNX Runtime computes the demo pair's engines.

Token ids and rounds are those of the FLy authors' own program (tests/assets/golden), although the loop never sees a
logit: the rule is in the engine, and the runtime accepts what equals the sampled token.
"""

import json
from pathlib import Path
from typing import Any

import pytest

import simulated_executor
from executor_directory import executor_of, of_golden, wait_until_ended, write_directory
from fly_trt import LLM, RequestOutput, RequestOutputKind, SamplingParams

GOLDEN = Path(__file__).parents[2] / "assets" / "golden"
FILES = {"public.jsonl": "demo_engine", "public_weak.jsonl": "weak_engine"}
CONFIGS = ("exact", "fly", "fly_multilevel", "fly_k10_w4")


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
    file: str, config: str, bindings: Any, request: pytest.FixtureRequest, tmp_path: Path, is_long: bool
) -> None:
    rows = rows_of(file, config)[:: 1 if is_long else 8]
    onnx = request.getfixturevalue(FILES[file])
    directory = write_directory(tmp_path / "engine", onnx, **of_golden(rows[0]["config"]))
    with LLM(directory, max_batch_size=4) as llm:
        outputs = llm.generate(prompts_of(rows), SamplingParams(max_tokens=160))
        assert executor_of("target").num_active == executor_of("draft").num_active == 0
    assert different(rows, outputs) == []
    assert sum(output.metrics.num_loosened_tokens for output in outputs) == 0, "nobody can tell"


ROWS = rows_of("public.jsonl", "fly_multilevel")[:6]
FIXED = {"adaptive_draft_length": False, "adaptive_acceptance": False}
"""How the loop over step engines does as this one: every window is opened, and rounds are as long as asked for."""


def said(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    return [(o.text, o.token_ids, o.finish_reason, o.stop_reason) for output in outputs for o in output.outputs]


@pytest.mark.parametrize(
    "settings",
    [
        *({"max_tokens": count} for count in (1, 2, 7, 16, 17)),
        {"max_tokens": 60, "ignore_eos": True},
        {"stop": ["Step", "the"]},
        {"stop": "the", "include_stop_str_in_output": True, "max_tokens": 50},
        {"num_speculative_tokens": 8},
        {"num_speculative_tokens": 1, "max_tokens": 40},
        {"min_tokens": 5, "ignore_eos": True, "stop": ["a", "e", "o"]},
    ],
    ids=str,
)
def test_a_request_is_served_as_by_engines_that_run_step_by_step(
    settings: dict[str, Any], directory: Path, demo_engine: Path
) -> None:
    params = SamplingParams(**({"max_tokens": 160} | settings))
    with LLM(demo_engine, speculative_config=FIXED) as llm:
        expected = llm.generate(prompts_of(ROWS), params)
    with LLM(directory, max_batch_size=4) as llm:
        outputs = llm.generate(prompts_of(ROWS), params)
    assert said(outputs) == said(expected)
    for metrics, others in ((output.metrics, other.metrics) for output, other in zip(outputs, expected, strict=True)):
        assert metrics.num_spec_steps == others.num_spec_steps
        assert metrics.acceptance_histogram == others.acceptance_histogram
        assert metrics.num_draft_tokens >= others.num_draft_tokens  # verified as a whole, whatever comes of them


def test_who_shares_the_batch_changes_nothing(directory: Path) -> None:
    prompts = prompts_of(ROWS)
    greedy = SamplingParams(max_tokens=40)
    sampled = SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, seed=7, n=2)
    mixed = [greedy, sampled] * 3
    with LLM(directory, max_batch_size=1) as llm:
        alone = [llm.generate([prompt], params)[0] for prompt, params in zip(prompts, mixed, strict=True)]
    with LLM(directory) as llm:
        together = llm.generate(prompts, mixed)
        again = llm.generate(prompts, mixed)
    assert said(together) == said(alone) == said(again)


def test_sampling_draws_anew_in_each_round_and_by_the_seed(directory: Path) -> None:
    def sampled(llm: LLM, seed: int | None) -> tuple[int, ...]:
        params = SamplingParams(temperature=1.5, seed=seed, max_tokens=20)
        return tuple(llm.generate(prompts_of(ROWS)[:1], params)[0].outputs[0].token_ids)

    with LLM(directory) as llm:
        assert len({sampled(llm, seed) for seed in (1, 2, 3, 4, 1, -1)}) == 5
        assert len({sampled(llm, None) for _ in range(4)}) > 1


def test_without_drafts_the_text_is_exact(directory: Path, demo_engine: Path) -> None:
    """The rule has nothing to let pass; one request of the target's streams its tokens, and is cancelled at a stop."""
    rows = rows_of("public.jsonl", "exact")[:3]
    params = SamplingParams(max_tokens=160, num_speculative_tokens=0)
    stopped = SamplingParams(max_tokens=160, num_speculative_tokens=0, stop="the", acceptance=None)
    with LLM(demo_engine, speculative_config={"method": None}) as llm:
        expected = llm.generate(prompts_of(rows), SamplingParams(max_tokens=160, stop="the"))
    with LLM(directory) as llm:
        outputs = llm.generate(prompts_of(rows), params)
        assert said(llm.generate(prompts_of(rows), stopped)) == said(expected)
        wait_until_ended(llm)
        assert executor_of("draft").num_requests == 0
        assert llm.metrics()["fly_trt:spec_decode_num_drafts_total"] == 0
    assert [output.outputs[0].token_ids for output in outputs] == [row["token_ids"] for row in rows]
    with LLM(directory, speculative_config={"method": None}) as llm:
        assert said(llm.generate(prompts_of(rows), SamplingParams(max_tokens=160))) == said(outputs)
        assert [executor.role for executor in simulated_executor.Executor.alive] == ["target"]


def test_copies_alone_may_draft(bindings: Any, demo_engine: Path, tmp_path: Path) -> None:
    settings = {"method": "ngram", "acceptance": "fly", "num_speculative_tokens": 10}
    directory = write_directory(tmp_path / "engine", demo_engine, **settings)
    with LLM(demo_engine, speculative_config=settings | FIXED) as llm:
        expected = llm.generate(prompts_of(ROWS), SamplingParams(max_tokens=40))
    with LLM(directory) as llm:
        outputs = llm.generate(prompts_of(ROWS), SamplingParams(max_tokens=40))
        assert [executor.role for executor in simulated_executor.Executor.alive] == ["target"]
    assert said(outputs) == said(expected)
    assert sum(output.metrics.num_accepted_tokens_by_source.get("lookup", 0) for output in outputs) > 0


def test_requests_that_end_sooner_than_asked_change_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is a beginning, and the rest is asked for."""
    params = [SamplingParams(max_tokens=50), SamplingParams(max_tokens=50, num_speculative_tokens=0)] * 2
    with LLM(directory) as llm:
        expected = llm.generate(prompts_of(ROWS[:4]), params)
    monkeypatch.setattr(simulated_executor.Executor, "ends_each_step", True)
    with LLM(directory) as llm:
        assert said(llm.generate(prompts_of(ROWS[:4]), params)) == said(expected)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_chunks_of_a_stream_add_up(kind: RequestOutputKind, directory: Path) -> None:
    with LLM(directory) as llm:
        whole = llm.generate(prompts_of(ROWS)[:1], SamplingParams(max_tokens=80))[0].outputs[0]
        chunks = [
            o.outputs[0] for o in llm.stream(prompts_of(ROWS)[0], SamplingParams(max_tokens=80, output_kind=kind))
        ]
    if kind is RequestOutputKind.DELTA:
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    else:
        assert (chunks[-1].text, chunks[-1].token_ids) == (whole.text, whole.token_ids)
        assert all(whole.token_ids[: len(chunk.token_ids)] == chunk.token_ids for chunk in chunks)
    assert len(chunks) > 1 or kind is RequestOutputKind.FINAL_ONLY


def test_a_round_reuses_the_blocks_of_those_before_it(directory: Path) -> None:
    """Of a sequence of n tokens each round would read n again."""
    prompt = {"prompt_token_ids": ROWS[0]["prompt_token_ids"] * 8}
    length = len(prompt["prompt_token_ids"])
    with LLM(directory) as llm:
        first = llm.generate([prompt], SamplingParams(max_tokens=60, ignore_eos=True))[0]
        for role in ("target", "draft"):
            executor = executor_of(role)
            assert executor.num_requests > 5
            assert executor.num_computed < length + executor.num_requests * 3 * simulated_executor.TOKENS_PER_BLOCK
            assert executor.num_reused > (executor.num_requests - 1) * (length - simulated_executor.TOKENS_PER_BLOCK)
        second = llm.generate([prompt], SamplingParams(max_tokens=60, ignore_eos=True))[0]
        assert first.metrics.num_cached_tokens == 0
        assert second.metrics.num_cached_tokens >= length - simulated_executor.TOKENS_PER_BLOCK
        assert llm.metrics()["fly_trt:prefix_cache_hits_total"] == second.metrics.num_cached_tokens
    assert said([first]) == said([second])


def test_lookup_spares_the_draft_model_steps(directory: Path) -> None:
    """Its text is the same, whatever guesses (multi-level)."""
    params = SamplingParams(max_tokens=100)
    computed, texts = {}, {}
    for method in ("draft_model", "multi_level"):
        with LLM(directory, speculative_config={"method": method}) as llm:
            texts[method] = said(llm.generate(prompts_of(ROWS), params))
            computed[method] = executor_of("draft").num_steps
            by_source = llm.metrics()
            assert (
                by_source['fly_trt:spec_decode_num_accepted_tokens_by_source_total{acceptance="fly",source="model"}']
                > 0
            )
    assert texts["draft_model"] == texts["multi_level"]
    assert computed["multi_level"] < 0.9 * computed["draft_model"]


def test_metrics_show_what_runs(directory: Path) -> None:
    with LLM(directory) as llm:
        stream = llm.stream(prompts_of(ROWS)[0], SamplingParams(max_tokens=400, ignore_eos=True))
        next(stream)
        assert llm.metrics()["fly_trt:num_requests_running"] == 1
        assert 0 < llm.metrics()["fly_trt:kv_cache_usage_perc"] <= 1
        stream.close()
        wait_until_ended(llm)
        metrics = llm.metrics()
    assert metrics["fly_trt:num_requests_running"] == 0
    assert metrics['fly_trt:request_success_total{finished_reason="abort"}'] == 1
    assert metrics["fly_trt:prompt_tokens_total"] == len(ROWS[0]["prompt_token_ids"])
