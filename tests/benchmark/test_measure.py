"""A benchmark of the demo pair: what it measures is what the modes really do."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

import fly_trt.engines.directory
from fly_trt import ConfigError, RequestError
from fly_trt.benchmark.client import Load
from fly_trt.benchmark.measure import Benchmark, BenchmarkConfig, run_benchmark
from fly_trt.benchmark.results import Spread
from fly_trt.engines import load_engine

SHORT = {"rounds": 1, "num_prompts": 2, "max_tokens": 6}


def test_there_is_a_row_for_each_mode_under_each_load(benchmark: Benchmark) -> None:
    assert [row.mode for row in benchmark.rows] == 2 * ["autoregressive", "exact", "fly-draft", "fly", "ngram"]
    assert [row.load.concurrency for row in benchmark.rows] == [1] * 5 + [2] * 5


def test_exact_modes_emit_the_tokens_of_autoregressive_decoding_in_every_round(benchmark: Benchmark) -> None:
    for row in benchmark.rows:
        if row.mode in ("autoregressive", "exact", "ngram"):
            assert row.same_as_autoregressive == Spread(1, 1, 1, [1, 1])
            assert row.loosened_tokens.max == 0


def test_fly_loosens_and_autoregressive_decoding_does_not_speculate(benchmark: Benchmark) -> None:
    for row in benchmark.rows:
        if row.mode.startswith("fly"):
            assert row.loosened_tokens.min > 0
        if row.mode == "autoregressive":
            assert row.mean_acceptance_length is None
            assert row.acceptance_histogram == []
        else:
            assert row.mean_acceptance_length.min > 1
            assert sum(row.acceptance_histogram) > 0


def test_right_answers_are_those_that_the_checks_take(benchmark: Benchmark) -> None:
    for row in benchmark.rows:
        assert (row.num_checks, row.right_answers, row.accuracy_retention) == (
            2,
            Spread(1, 1, 1, [1, 1]),
            Spread(1, 1, 1, [1, 1]),
        )


def test_every_figure_is_over_all_rounds(benchmark: Benchmark) -> None:
    spreads = [
        value
        for row in benchmark.rows
        for field in dataclasses.fields(row)
        if isinstance(value := getattr(row, field.name), Spread)
    ]
    assert len(spreads) > 100
    for spread in spreads:
        assert len(spread.rounds) == 2
        assert spread.min == min(spread.rounds) <= spread.median <= spread.max == max(spread.rounds)


def test_the_target_finds_exact_modes_as_probable_as_plain_decoding(benchmark: Benchmark) -> None:
    for row in benchmark.rows:
        assert row.nll_per_token.min >= 0
        assert row.nll_deviation.min >= 0
        if row.mode in ("autoregressive", "exact", "ngram"):
            assert row.perplexity_over_autoregressive == Spread(1, 1, 1, [1, 1])
            assert row.common_prefix_with_autoregressive == Spread(1, 1, 1, [1, 1])
        else:
            assert row.perplexity_over_autoregressive.median != 1
            assert row.common_prefix_with_autoregressive.median < 1


def test_engines_are_loaded_once_for_all_modes_and_loads(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def counting(*arguments: Any, **settings: Any) -> Any:
        loaded.append(settings["num_slots"])
        return load_engine(*arguments, **settings)

    monkeypatch.setattr(fly_trt.engines.directory, "load_engine", counting)
    loads = (Load(concurrency=1), Load(concurrency=2))
    found = run_benchmark(demo_engine, BenchmarkConfig(modes=["exact", "fly"], loads=loads, **SHORT))
    assert loaded == [2, 2]
    assert list(found.engines.load_seconds) == ["target", "draft"]
    plain = run_benchmark(demo_engine, BenchmarkConfig(modes=["autoregressive", "ngram"], **SHORT))
    assert list(plain.engines.load_seconds) == ["target"]


def test_requests_that_arrive_at_a_rate_get_the_same_tokens(demo_engine: Path, prompts_file: Path) -> None:
    loads = (Load(request_rate=float("inf")), Load(request_rate=200.0))
    config = BenchmarkConfig(modes=["autoregressive", "exact"], prompts=prompts_file, loads=loads, **SHORT)
    rows = run_benchmark(demo_engine, config).rows
    assert [row.same_as_autoregressive.min for row in rows] == [1, 1, 1, 1]
    assert {row.num_output_tokens.median for row in rows} == {12}


def test_random_tokens_go_on_for_max_tokens_when_the_end_is_ignored(demo_engine: Path) -> None:
    config = BenchmarkConfig(modes=["fly"], random_tokens=20, ignore_eos=True, **SHORT)
    (row,) = run_benchmark(demo_engine, config).rows
    assert row.num_output_tokens.median == 12
    assert (row.right_answers, row.speed_up_over_exact, row.same_as_autoregressive) == (None, None, None)


def test_a_chat_prompt_is_framed_by_the_template_alone(demo_engine: Path, prompts_file: Path) -> None:
    """The demo pair's template writes the very frame of the prompts. How many rounds FLy takes follows from the tokens
    alone."""
    common = {"modes": ["fly"], "prompts": prompts_file, "rounds": 1, "num_prompts": 2, "max_tokens": 30}
    (plain,) = run_benchmark(demo_engine, BenchmarkConfig(**common)).rows
    (chat,) = run_benchmark(demo_engine, BenchmarkConfig(**common, chat=True)).rows
    assert chat.acceptance_histogram == plain.acceptance_histogram


def test_progress_ends_where_it_said(demo_engine: Path) -> None:
    told: list[tuple[str, int, int]] = []
    run_benchmark(demo_engine, BenchmarkConfig(modes=["ngram"], **SHORT), lambda *news: told.append(news))
    assert told[0] == ("loading engines", 0, 2)
    assert told[-2] == ("ngram, 1 in flight, round 1 of 1", 2, 2)
    assert told[-1] == ("perplexity, 1 in flight", 2, 2)
    run_benchmark(
        demo_engine, BenchmarkConfig(modes=["ngram"], perplexity=False, **SHORT), lambda *news: told.append(news)
    )
    assert told[-1] == ("ngram, 1 in flight, round 1 of 1", 2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds 0: expected at least 1"),
        ({"num_prompts": 0}, "num_prompts 0: expected at least 1"),
        ({"seed": -1}, "seed -1"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"loads": ()}, "no load"),
        ({"random_tokens": 0}, "random_tokens 0: expected a prompt of at least 1 token"),
        ({"random_tokens": 5000}, "prompt has 5000 tokens, max_seq_len is 2048"),
        ({"random_tokens": 5, "prompts": Path("x")}, "prompts and random_tokens: give one of them"),
        ({"random_tokens": 5, "chat": True}, "chat: random tokens are no message"),
        ({"loads": [Load(concurrency=3)]}, "concurrency 3: 2 prompts never are as many: raise --num-prompts"),
        (
            {"loads": [Load(concurrency=9)], "num_prompts": 9},
            "was built for 8 requests in flight: rebuild with --max-batch-size 9",
        ),
        ({"modes": ["medusa"]}, "mode 'medusa': expected autoregressive"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_leaves_no_thread(
    demo_engine: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, RequestError), match=message):
        run_benchmark(demo_engine, BenchmarkConfig(**{**SHORT, **settings}))
    assert not [thread for thread in threading.enumerate() if thread.name == "fly-trt engine"]
