"""The table that people read: what it shows, and that it fits."""

import dataclasses
import io

import pytest
from rich.console import Console

from fly_trt.benchmark.measure import Benchmark
from fly_trt.benchmark.report import as_table
from fly_trt.benchmark.results import Row, Spread

NAMES = ("autoregressive", "exact", "multi_level+fly,fly_window_size=0,preset=paper", "a[1,2]")
WIDTH = 120


def shown(benchmark: Benchmark, rows: list[Row], width: int = WIDTH) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(as_table(dataclasses.replace(benchmark, rows=rows)))
    return console.export_text()


def wide(value: float) -> Spread:
    return Spread(value, 0.83 * value, 1.19 * value, [0.83 * value, 1.19 * value])


@pytest.fixture(scope="module")
def rows(benchmark: Benchmark) -> list[Row]:
    """Fifteen modes with figures that take their room."""
    figures = {
        "tokens_per_second": wide(85.4),
        "mean_acceptance_length": wide(12.34),
        "loosened_per_100": wide(12.3),
        "time_to_first_token_ms": wide(12345),
        "inter_token_latency_ms_p50": wide(99.9),
        "inter_token_latency_ms_p99": wide(1234.5),
        "right_answers": wide(231),
        "num_checks": 240,
        "right_answers_interval": (0.9273, 0.9809),
        "perplexity_over_autoregressive": wide(1.2345),
    }
    names = [*NAMES, *(f"mode-{number}" for number in range(15 - len(NAMES)))]
    return [dataclasses.replace(benchmark.rows[1], mode=name, **figures) for name in names]


def test_fifteen_modes_fit_on_one_screen(benchmark: Benchmark, rows: list[Row]) -> None:
    lines = shown(benchmark, rows).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len([line for line in lines if "231/240 [92.7, 98.1]" in line]) == 15
    text = "\n".join(lines)
    assert "…" not in text
    assert all(name in text for name in ("multi_level+fly,", "fly_window_size=0,", "preset=paper"))
    assert "a[1, 2]" in text


def test_sources_are_told_apart_where_a_mode_has_several(benchmark: Benchmark, rows: list[Row]) -> None:
    assert "by source" not in shown(benchmark, rows)
    mixed = dataclasses.replace(rows[4], accepted_by_source={"model": wide(3.21), "lookup": wide(1.5)})
    lines = shown(benchmark, [*rows[:4], mixed], width=132).splitlines()
    text = "\n".join(lines)
    assert all(words in text for words in ("by source", "model 3.21", "lookup 1.50"))
    assert len([line for line in lines if "231/240 [92.7, 98.1]" in line]) == 5
    assert max(map(len, lines)) <= 132


def test_each_load_has_its_modes_below_it(benchmark: Benchmark) -> None:
    lines = [line.split("  ")[0].strip() for line in shown(benchmark, benchmark.rows).splitlines()]
    modes = ["autoregressive", "exact", "fly-draft", "fly", "ngram"]
    start = lines.index("1 in flight")
    assert lines[start : start + 12] == ["1 in flight", *modes, "2 in flight", *modes]


def test_agreement_is_shown_in_full_where_no_answer_is_right_or_wrong(benchmark: Benchmark, rows: list[Row]) -> None:
    unchecked = [
        dataclasses.replace(row, num_checks=0, right_answers=None, right_answers_interval=None) for row in rows
    ]
    with_checks, without = shown(benchmark, rows), shown(benchmark, unchecked)
    assert ("right" in with_checks, "prefix" in with_checks) == (True, False)
    assert ("right" in without, "prefix" in without) == (False, True)
    assert "same" in with_checks
    assert "same" in without


def test_perplexity_is_its_own_where_there_is_none_to_compare_it_with(benchmark: Benchmark, rows: list[Row]) -> None:
    assert "1.234" in shown(benchmark, rows)
    alone = [dataclasses.replace(row, perplexity_over_autoregressive=None, nll_per_token=wide(0.5)) for row in rows]
    text = shown(benchmark, alone)
    assert "ratio" not in text
    assert "1.649" in text
    assert "ppl" not in shown(benchmark, [dataclasses.replace(row, nll_per_token=None) for row in alone])
