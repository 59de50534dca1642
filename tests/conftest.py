"""What all tests share: how much a run tries, one core for each of its workers, and engines of the demo pair.

A run is one process, or several (pytest-xdist) that share what is built once. Without --long it tries fewer random
examples, always the same ones.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

ASSETS = Path(__file__).parent / "assets"
PAIR = ASSETS / "pair"
SLOW_STEP_SECONDS = 0.02
# No deadline: no test may depend on the machine.
settings.register_profile("long", max_examples=100, deadline=None)
settings.register_profile("everyday", max_examples=25, derandomize=True, deadline=None)
BuildOnce = Callable[[str, Callable[[Path], object]], Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="as many random examples and requests as before a release")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("long" if config.getoption("--long") else "everyday")
    if "FLY_TRT_TEST_TRACES" not in os.environ:  # the first process of the run
        folder = tempfile.TemporaryDirectory(prefix="fly-trt-traces-")
        os.environ["FLY_TRT_TEST_TRACES"] = folder.name
        config.add_cleanup(folder.cleanup)
    if hasattr(config, "workerinput"):  # one of several processes: the others need the other cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        from fly_trt.engines.onnxruntime import session_options

        session_options(num_threads=1)


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("--long")


@pytest.fixture(scope="session")
def build_once(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> BuildOnce:
    """build_once(name, make): the path `name` that make(path) has written in whichever process of the run asked first.
    Tests leave it as it is."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(pytestconfig, "workerinput"):
        folder = folder.parent
    folder /= "shared"
    folder.mkdir(exist_ok=True)

    def build_once(name: str, make: Callable[[Path], object]) -> Path:
        path, is_whole = folder / name, folder / f"{name}.whole"
        with FileLock(folder / f"{name}.lock"):
            if not is_whole.exists():
                shutil.rmtree(path, ignore_errors=True)
                make(path)
                is_whole.touch()
        return path

    return build_once


def _build(output: Path, **flags: object) -> None:
    from traced_once import build

    # Given, not measured: what is accepted may depend on them, and no test may depend on the machine.
    costs = {"draft_token_cost": 0.12, "verification_token_cost": 0.06}
    build(output, target=str(PAIR / "target"), **{"max_seq_len": 2048, "speculative": costs, **flags})


@pytest.fixture(scope="session")
def cpu_library() -> Path:
    """The operators of plugins/cpu, compiled from the sources of the tree."""
    from fly_build.cpu_library import find_library

    if (library := find_library("auto")) is None:
        pytest.skip("no compiler, or not Linux on an x86-64 CPU with AVX2")
    return library


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
def demo_engine(build_once: BuildOnce) -> Path:
    """The demo pair in float32."""
    return build_once("demo", lambda path: _build(path, draft=str(PAIR / "draft")))


@pytest.fixture(scope="session")
def plain_operators_engine(build_once: BuildOnce) -> Path:
    """The demo pair in float32 without the operators of plugins/cpu, as where there is no compiler."""
    flags = {"draft": str(PAIR / "draft"), "cpu_kernels": "off"}
    return build_once("plain_operators", lambda path: _build(path, **flags))


@pytest.fixture(scope="session")
def demo_int8_engine(build_once: BuildOnce) -> Path:
    """The demo pair in int8."""
    return build_once("demo_int8", lambda path: _build(path, draft=str(PAIR / "draft"), quantization="int8"))


@pytest.fixture(scope="session")
def weak_engine(build_once: BuildOnce) -> Path:
    """The demo target with a draft that is right 10 % of the time, in float32."""
    return build_once("weak", lambda path: _build(path, draft=str(PAIR / "draft_weak")))


@pytest.fixture(scope="session")
def chain_engine(build_once: BuildOnce) -> Path:
    """The demo pair with the weak draft before the draft, in float32."""
    models = {"draft": str(PAIR / "draft"), "inner_draft": str(PAIR / "draft_weak")}
    rates = {"draft_acceptance": 0.9, "inner_draft_acceptance": 0.7}
    return build_once("chain", lambda path: _build(path, **models, chain=rates))


@pytest.fixture(scope="session")
def target_only_engine(build_once: BuildOnce) -> Path:
    """The demo target without a draft, in int8."""
    return build_once("target", lambda path: _build(path, quantization="int8"))


@pytest.fixture(scope="session")
def self_engine(build_once: BuildOnce) -> Path:
    """The demo target in float32 with drafts made of itself, one of them for sequences that begin with 100 tokens."""
    times = {"attention": 1.0, "attention_per_1000_tokens": 20.0, "mlp": 1.5, "head": 1.0, "further_token": 0.01}
    settings = {"contexts": [64, 100], "step_times": times}
    return build_once("self", lambda path: _build(path, self_draft=settings))
