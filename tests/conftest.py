"""Engines of the demo pair, built once for all tests that need real ones."""

import time
from pathlib import Path
from typing import Any

import pytest

ASSETS = Path(__file__).parent / "assets"
PAIR = ASSETS / "pair"
SLOW_STEP_SECONDS = 0.02


def _build(output: Path, **flags: object) -> Path:
    from fly_build.pipeline import build, make_plan
    from fly_build.recipe import load_recipe

    # Given, not measured: what is accepted may depend on them, and no test may depend on the machine.
    costs = {"draft_token_cost": 0.12, "verification_token_cost": 0.06}
    recipe = load_recipe(None, {"target": str(PAIR / "target"), "max_seq_len": 2048, "speculative": costs, **flags})
    build(make_plan(recipe, output), lambda step, fraction: None)
    return output


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of an engine is fast: a request for many tokens runs until somebody ends it, on any machine."""
    from fly_trt.engines.onnxruntime import OnnxRuntimeEngine

    run = OnnxRuntimeEngine.run

    def slower_run(engine: Any, step: Any) -> None:
        time.sleep(SLOW_STEP_SECONDS)
        run(engine, step)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", slower_run)


@pytest.fixture(scope="session")
def demo_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo pair in float32."""
    return _build(tmp_path_factory.mktemp("engines") / "demo", draft=str(PAIR / "draft"))


@pytest.fixture(scope="session")
def demo_int8_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo pair in int8."""
    return _build(tmp_path_factory.mktemp("engines") / "demo_int8", draft=str(PAIR / "draft"), quantization="int8")


@pytest.fixture(scope="session")
def weak_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo target with a draft that is right 10 % of the time, in float32."""
    return _build(tmp_path_factory.mktemp("engines") / "weak", draft=str(PAIR / "draft_weak"))


@pytest.fixture(scope="session")
def target_only_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo target without a draft, in int8."""
    return _build(tmp_path_factory.mktemp("engines") / "target", quantization="int8")
