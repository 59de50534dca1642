"""plugins/check/steps.py on the simulated GPUs: it runs the steps that it says, and says why one is no CUDA graph. Its
times, and those of sums, need real ones."""

from pathlib import Path

import pytest

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
    monkeypatch.setattr(steps, "time_sums", lambda num_ranks, counts, runs: dict.fromkeys(counts, (0.02, 0.01)))
    rows = [steps.Row(1, 1, 4.0, None, 100), steps.Row(1, 16, 4.0, "no graph", 100)]
    steps._add_sums(rows, 2, 64, 1)
    assert [row.share for row in rows] == [0.25, 0.5]
    steps._print(rows)


def test_hidden_size_is_that_of_the_checkpoint(two_ranks: Path) -> None:
    assert steps._hidden_size(read_manifest(two_ranks)) == 384
