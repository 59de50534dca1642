"""What a step is made of: every operator of the graph, and no time counted twice."""

import json
from pathlib import Path

import pytest
import step_profile
from step_profile import Event, ProfiledRun, sum_up


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["step_profile.py", *map(str, arguments)])
    step_profile.main()


def test_every_shape_has_its_operators_of_all_nodes_that_ran(
    plain_operators_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _main(monkeypatch, plain_operators_engine, "--shapes", "1x1", "2x16", "--rounds", 2, "--cached", 5, 300, "--json")
    records = json.loads(capsys.readouterr().out)
    shapes = [(record["rows"], record["num_tokens"], record["num_cached"]) for record in records]
    assert shapes == [(1, 1, 5), (2, 16, 5), (1, 1, 300), (2, 16, 300)]
    for record in records:
        assert record["num_nodes"]["MatMul"] == 43
        assert record["num_nodes"]["Attention"] == 6  # inside a branch
        assert all(milliseconds > 0 for milliseconds in record["operators"].values())
        assert sum(record["operators"].values()) == pytest.approx(sum(record["nodes"].values()))
        assert sum(record["operators"].values()) <= record["profiled_milliseconds"]
        assert len(record["milliseconds"]) == 2


def test_builds_stand_beside_each_other(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _main(monkeypatch, demo_engine, demo_engine, "--shapes", "1x4", "--rounds", 1, "--role", "draft", "--nodes", 2)
    out = capsys.readouterr().out
    assert "first" in out
    assert out.count("between nodes") == 2
    assert "1 x 4 at 128" in out


def test_a_node_has_its_own_time_and_not_that_of_nodes_inside_it() -> None:
    events = [Event("If", "a", 0.0, 1.0), Event("Attention", "b", 0.2, 0.7), Event("Mul", "c", 1.0, 0.5)]
    found = sum_up([ProfiledRun(1.6, events), ProfiledRun(9.0, [Event("Mul", "c", 2.0, 9.0)])])
    assert found.total == pytest.approx(1600)
    assert found.milliseconds == pytest.approx({"If": 300, "Attention": 700, "Mul": 500})
    assert found.num_nodes == {"If": 1, "Attention": 1, "Mul": 1}


def test_a_shape_that_the_engine_cannot_run_is_refused(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _main(monkeypatch, demo_engine, "--shapes", "1x1", "--cached", 1 << 20)
    assert "was built with --max-seq-len" in capsys.readouterr().err
