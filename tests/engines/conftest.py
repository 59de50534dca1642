"""The simulated GPU, and the demo pair as an engine directory for it, built once for all tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import simulated_engine as simulation
from fly_trt.engines import Engine
from simulated_cuda import SimulatedCuda
from simulated_onnxruntime import SimulatedOnnxRuntime
from simulated_onnxruntime import install as install_onnxruntime
from simulated_tensorrt import install


@pytest.fixture(scope="session")
def simulated_engine(build_once: Callable[..., Path]) -> Path:
    return build_once("simulated", simulation.build)


@pytest.fixture(scope="session")
def cuda_engine(build_once: Callable[..., Path]) -> Path:
    """For ONNX Runtime's CUDA provider."""
    return build_once("cuda", simulation.build_for_onnxruntime)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled kernels are kept, instead of the user's home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fly-trt"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, kernels: Path) -> Iterator[SimulatedCuda]:
    """A GPU on which nothing may go wrong unless the test takes it off the list."""
    cuda = install(monkeypatch)
    yield cuda
    assert cuda.faults == []


@pytest.fixture
def library(gpu: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> SimulatedOnnxRuntime:
    """onnxruntime-gpu on that GPU."""
    return install_onnxruntime(monkeypatch, gpu)


@pytest.fixture
def engine(gpu: SimulatedCuda, simulated_engine: Path) -> Engine:
    """The demo draft with three slots."""
    return simulation.load(simulated_engine)
