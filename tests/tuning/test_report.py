"""A result as a table for a terminal."""

import dataclasses

from rich.console import Console

from fly_trt.tuning.report import MOST_SEARCHED, as_table
from fly_trt.tuning.result import PLAIN, TuningResult
from tuning_results import tuned
from tuning_tables import Simulated


def shown(result: TuningResult, width: int = 120) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(as_table(result))
    return capture.get().splitlines()


def row(lines: list[str], name: str) -> list[str]:
    return next(line.split() for line in lines if line.startswith(name))


def test_judged_candidates_come_first_and_the_faster_before_the_slower() -> None:
    lines = shown(tuned())
    assert "prompts.jsonl: 200 prompts chose and 600 judged, by checks, seed 7" in lines[0]
    names = ["multi_level+relaxed", "hybrid+fly", "default", "ngram+exact", "plain"]
    places = [next(place for place, line in enumerate(lines) if line.startswith(name)) for name in names]
    assert places == sorted(places)


def test_a_row_has_speed_quality_and_the_bound() -> None:
    result = tuned()
    bound = result.chosen.retention
    assert bound is not None
    cells = " ".join(row(shown(result), "hybrid+fly"))
    for figure in ("2.2", "100 %", "99.1 %", "600 chosen"):
        assert figure in cells
    assert "all" in row(shown(result), "ngram+exact")
    assert row(shown(result), "plain")[-2:] == ["the", "baseline"]


def test_it_fits_the_terminal_and_says_how_many_it_does_not_show() -> None:
    names = [f"hybrid+fly,fly_window_size={number}" for number in range(5, 20)]
    result = tuned(searched=tuple(Simulated(name, 1.5, 0.1) for name in names))
    lines = shown(result, width=110)
    assert max(map(len, lines)) <= 110
    assert sum("(search)" in line for line in lines) == MOST_SEARCHED
    assert "and 5 that left the search" in lines[-1]


def test_a_search_that_was_cut_short_is_told() -> None:
    assert not any("the time was up" in line for line in shown(tuned()))
    assert any("the time was up" in line for line in shown(dataclasses.replace(tuned(), was_complete=False)))


def test_perplexity_has_a_column_where_it_was_read() -> None:
    result = tuned()
    assert not any("ppl" in line for line in shown(result))
    candidates = [dataclasses.replace(one, perplexity_ratio=1.021) for one in result.candidates]
    lines = shown(dataclasses.replace(result, candidates=candidates))
    assert any("ppl" in line for line in lines)
    assert "1.021" in row(lines, "hybrid+fly")


def test_nothing_chosen_is_shown_as_plain_decoding() -> None:
    result = tuned((Simulated(PLAIN, 1.0), Simulated("ngram+exact", 0.8)))
    assert result.verdict.kind == "nothing_pays"
    assert row(shown(result), "plain")[-1] == "chosen"
