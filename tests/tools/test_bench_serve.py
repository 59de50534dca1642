"""tools/bench_serve.py measures what it says: the same prompts through AsyncLLM and over HTTP."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize("client", ["raw", "openai"])
def test_every_way_answers_with_the_same_tokens(demo_engine: Path, client: str) -> None:
    flags = ("--rounds", "1", "--prompts", "3", "--in-flight", "2", "--max-tokens", "12", "--client", client)
    command = [sys.executable, str(REPOSITORY / "tools" / "bench_serve.py"), str(demo_engine), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    for way in ("AsyncLLM", "HTTP, streamed", "HTTP, whole"):
        assert way in result.stdout
    assert "the same number of tokens in every round: {36}" in result.stdout
