"""The simulated GPU, and the demo pair as an engine directory for it, built once for all tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import simulated_engine as simulation
from fly_trt.engines import Engine
from simulated_cuda import SimulatedCuda
from simulated_onnxruntime import SimulatedOnnxRuntime
from simulated_onnxruntime import install as install_onnxruntime
from simulated_ranks import faults_of_ranks, install_node, shard
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


@pytest.fixture(scope="session")
def two_ranks(build_once: Callable[..., Path]) -> Path:
    """Target and draft over two ranks, as fly-build makes them."""
    return build_once("two_ranks", lambda path: simulation.build(path, tp_size=2, draft_tp_size=2))


@pytest.fixture(scope="session")
def four_ranks(build_once: Callable[..., Path], simulated_engine: Path) -> Path:
    """The target over four ranks, which share KV heads, and the draft over two of them. fly-build does not do it: the
    target's six heads are filled up with others of zeros."""
    return build_once("four_ranks", lambda path: shard(simulated_engine, path, target=4, draft=2))


@pytest.fixture(scope="session")
def draft_alone(build_once: Callable[..., Path], simulated_engine: Path) -> Path:
    """The target over two ranks, and the draft on rank 0."""
    return build_once("draft_alone", lambda path: shard(simulated_engine, path, target=2, draft=1))


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, kernels: Path, tmp_path: Path) -> Iterator[SimulatedCuda]:
    """Eight GPUs, of which this process and those of the ranks that it starts have the same view. Nothing may go wrong
    on one of them."""
    folder = tmp_path / "node"
    folder.mkdir()
    cuda = install_node(monkeypatch, folder)
    yield cuda
    assert cuda.faults == []
    assert faults_of_ranks(folder) == []


@pytest.fixture
def library(gpu: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> SimulatedOnnxRuntime:
    """onnxruntime-gpu on that GPU."""
    return install_onnxruntime(monkeypatch, gpu)


@pytest.fixture
def engine(gpu: SimulatedCuda, simulated_engine: Path) -> Engine:
    """The demo draft with three slots."""
    return simulation.load(simulated_engine)
