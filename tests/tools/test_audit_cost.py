"""What audits cost is measured on any engine directory."""

from pathlib import Path

import pytest

import audit_cost


@pytest.mark.long
def test_it_measures_all_three_parts(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompts", "3", "--rounds", "2", "--max-tokens", "24", "--slots", "2", "--requests", "6"]
    monkeypatch.setattr("sys.argv", ["audit_cost.py", str(demo_engine), *arguments])
    audit_cost.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[1].strip(): line.split() for line in lines if line.startswith("  ")}
    copied, read = (float(rows[f"read again, the prompt {how}"][-2]) for how in ("copied", "too"))
    assert min(copied, read) > 0
    shares = [float(rows[name][-1]) for name in rows if name.startswith("audit_fraction")]
    assert len(shares) == len(audit_cost.FRACTIONS)
    assert shares[0] == 0
    assert float(rows["while one is under way"][-1]) > 0
