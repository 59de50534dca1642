"""Engines that the servers of a module are started over."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fly_trt import AsyncLLM


@pytest.fixture(scope="module")
def llm(demo_engine: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(demo_engine)
    yield llm
    llm.shutdown()
