"""plugins/check/steps.py and kill_rank.py on the simulated GPUs: they do what they say, and say what they find. Times,
those of sums too, need real ones."""

import random
from pathlib import Path

import pytest

import kill_rank
import steps
from fly_trt.manifest import read_manifest
from simulated_cuda import Error, SimulatedCuda


def test_steps_of_all_ranks_are_graphs(node: SimulatedCuda, two_ranks: Path) -> None:
    rows = steps.time_steps(two_ranks, runs=1)
    assert [(row.batch_size, row.num_tokens) for row in rows] == [(1, 1), (1, 16), (4, 1), (4, 16)]  # of six slots
    assert [row.no_graph for row in rows] == [None] * len(rows)
    assert node.calls["cudaGraphLaunch"] == len(rows) * steps.WARM_UP_RUNS  # all runs but the first of each
    steps._print(rows)


def test_the_reason_why_a_step_is_no_graph_is_kept(node: SimulatedCuda, two_ranks: Path) -> None:
    node.refused["cudaGraphInstantiate"] = Error.cudaErrorMemoryAllocation
    rows = steps.time_steps(two_ranks, runs=1)
    assert all("CUDA: cudaErrorMemoryAllocation" in (row.no_graph or "") for row in rows)


def test_the_share_of_sums_is_that_of_those_that_the_step_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph where the step is one, else launched."""
    times = {64: (0.02, 0.01), 1024: (0.02, 0.01), 900: (0.4, 0.3), 14400: (3.0, 2.0)}
    monkeypatch.setattr(steps, "time_sums", lambda num_ranks, counts, runs: {count: times[count] for count in counts})
    rows = [steps.Row(1, 1, 4.0, None, 101), steps.Row(1, 16, 4.0, "no graph", 101)]
    steps._add_sums(rows, 2, 64, 900, 1)
    assert [row.share for row in rows] == pytest.approx([(100 * 0.01 + 0.3) / 4, (100 * 0.02 + 3.0) / 4])
    steps._print(rows)
    steps._add_sums(rows, 2, 64, 901, 1)  # a vocabulary that is whole on every rank
    assert [row.share for row in rows] == pytest.approx([101 * 0.01 / 4, 101 * 0.02 / 4])


def test_hidden_size_is_that_of_the_checkpoint(two_ranks: Path) -> None:
    assert steps._hidden_size(read_manifest(two_ranks)) == 384


def test_a_rank_that_was_killed_is_told_of_and_nothing_is_left(node: SimulatedCuda, two_ranks: Path) -> None:
    kill = kill_rank.kill_one(two_ranks, random.Random(1), seconds=120)
    assert kill.passes
    assert "rank 1 (process" in kill.line
    assert kill.num_left == 0
    node.faults.clear()  # of a sum that was aborted
