"""The timing of FLy in torch runs, on a small vocabulary."""

import pytest

import torch_acceptance_time


def test_it_prints_what_each_gate_costs(capsys: pytest.CaptureFixture[str]) -> None:
    torch_acceptance_time.main(["--vocab-size", "1100", "--requests", "2", "--rounds", "2", "--no-compile"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines if "eager" in line] == ["reference, eager", "paper, eager"] * 2
    assert [line.split()[-1] for line in lines if "argmax " in line and "ms" not in line] == ["100%"] * 2
