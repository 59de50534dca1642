"""TensorRT-LLM's Executor, simulated, and what was built of the demo pair for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import simulated_executor
from executor_directory import write_directory


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """`tensorrt_llm.bindings.executor`; every Executor of it has to be shut down."""
    yield simulated_executor.install(monkeypatch, tmp_path / "tensorrt_llm")
    left = list(simulated_executor.Executor.alive)
    for executor in left:
        executor.shutdown()
    assert [executor.role for executor in left] == [], "executors that nobody shut down"


@pytest.fixture
def directory(bindings: Any, demo_engine: Path, tmp_path: Path) -> Path:
    """The demo pair with FLy as the authors have it."""
    return write_directory(tmp_path / "engine", demo_engine)
