"""What is used of nccl4py exists in the real package, with the arguments that it is called with, and the simulation has
only what that has. libnccl is not there in tests.
"""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

import simulated_nccl
from fly_trt import EngineError
from fly_trt.engines import nccl

SOURCES = [Path(nccl.__file__), Path(__file__).resolve().parents[2] / "plugins" / "check" / "steps.py"]
# What variables hold in these files, as attributes of nccl.core.
HOLDS = {"core": "", "self._communicator": "Communicator", "communicator": "Communicator"}


def chains() -> dict[str, ast.Call | None]:
    """Every name that they use of the package, and the call where it is called."""
    return {name: call for source in SOURCES for name, call in chains_of(source).items()}


def chains_of(source: Path) -> dict[str, ast.Call | None]:
    tree = ast.parse(source.read_text())
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found: dict[str, ast.Call | None] = {}
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        for variable, prefix in HOLDS.items():
            if text.startswith(f"{variable}.") and "(" not in text:
                found[f"{prefix}.{text.removeprefix(variable + '.')}".lstrip(".")] = calls.get(id(node))
    return found


def find(module: Any, chain: str) -> Any:
    for name in chain.split("."):
        module = getattr(module, name)
    return module


def test_there_is_something_to_compare() -> None:
    assert {"get_unique_id", "Communicator.init", "Communicator.ptr", "Communicator.abort"} < chains().keys()
    assert {"Communicator.allreduce", "SUM"} < chains().keys()


@pytest.mark.parametrize("chain", sorted(chains()))
def test_names_and_arguments_are_those_of_the_real_package(chain: str) -> None:
    core = pytest.importorskip("nccl.core")
    real = find(core, chain)
    call = chains()[chain]
    if call is not None:
        bound = [] if inspect.ismethod(real) or "." not in chain or chain.startswith("UniqueId") else [None]
        inspect.signature(real).bind(*bound, *call.args, **{str(word.arg): word for word in call.keywords})


@pytest.mark.parametrize("name", ["UniqueId.from_bytes", "UniqueId.__bytes__", "get_unique_id", "Communicator.init"])
def test_the_simulation_has_the_real_signatures(name: str) -> None:
    core = pytest.importorskip("nccl.core")
    simulated, real = (inspect.signature(find(module, name)).parameters for module in (simulated_nccl, core))
    assert list(simulated) == list(real)


def test_versions_say_whether_libnccl_is_there() -> None:
    core = pytest.importorskip("nccl.core")
    assert hasattr(core.get_version(), "libnccl")
    assert hasattr(simulated_nccl.get_version(), "libnccl")
    assert isinstance(core.Communicator.ptr, property)
    assert len(bytes(core.get_unique_id(empty=True))) == simulated_nccl.ID_BYTES


def test_without_libnccl_the_extra_is_named() -> None:
    core = pytest.importorskip("nccl.core")
    if core.get_version().libnccl is not None:
        pytest.skip("libnccl is there")
    with pytest.raises(EngineError, match=r"^libnccl.so.2: not found, .*: pip install 'fly-trt\[multi-gpu\]'$"):
        nccl.load()
