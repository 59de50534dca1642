"""An engine thread on an engine that a test can hold."""

from collections.abc import Iterator

import pytest

from fly_trt.runtime.thread import EngineThread
from stepped_engine import SteppedEngine, make_loop


@pytest.fixture
def engine() -> SteppedEngine:
    return SteppedEngine()


@pytest.fixture
def thread(engine: SteppedEngine) -> Iterator[EngineThread]:
    running = EngineThread(make_loop(engine), engine.close)
    yield running
    engine.let_go()
    running.shutdown()
