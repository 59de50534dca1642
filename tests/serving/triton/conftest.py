"""A server of the demo pair, for all tests that leave it as they found it: those that need another model have it load
one (hosted_model.py)."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_switch import SLOW, add_switch

from fly_trt.serving.triton.repository import make_plan, write_model
from triton_server import LAUNCHER, TritonServer


@pytest.fixture(scope="session")
def launcher(build_once: Callable[..., Path]) -> None:
    """The server's environment, or the reason why this machine has none."""
    if not sys.platform.startswith("linux") or sys.version_info[:2] not in ((3, 11), (3, 12)):
        pytest.skip(f"the tritonserver wheel is for Linux and Python 3.11 or 3.12, not {sys.platform} {sys.version}")

    def prepare(path: Path) -> None:
        """Nothing is written at `path`: the environment lies beside the launcher."""
        subprocess.run([LAUNCHER, "--prepare"], check=True, env=os.environ | {"PYTHON": sys.executable})

    build_once("launcher", prepare)


@pytest.fixture(scope="session")
def repository(demo_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fly-triton` writes by default, under the name fly. Its engine's steps can be made slow."""
    repository = tmp_path_factory.mktemp("triton") / "model_repository"
    write_model(make_plan(demo_engine, repository), lambda done, total: None)
    add_switch(repository / "fly", repository.parent / "slow", SLOW)
    return repository


@pytest.fixture
def slow_steps(repository: Path) -> Iterator[None]:
    """No step of the shared server's engine is fast."""
    switch = repository.parent / "slow"
    switch.touch()
    yield
    switch.unlink()


@pytest.fixture(scope="session")
def server(launcher: None, repository: Path) -> Iterator[TritonServer]:
    arguments = ("--model-control-mode", "explicit", "--load-model", "fly")
    with TritonServer(repository, repository.parent / "server.log", *arguments) as server:
        yield server
