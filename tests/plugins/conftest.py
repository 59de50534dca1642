"""The CPU library as these tests share it: compiled from the sources of the tree."""

from pathlib import Path

import pytest

from cpu_operators import CpuOperators


@pytest.fixture(scope="session")
def cpu_operators(cpu_library: Path) -> CpuOperators:
    return CpuOperators(cpu_library)


@pytest.fixture(scope="session")
def offered_kinds(cpu_operators: CpuOperators) -> list[str]:
    """The kinds of kernels that run on this machine."""
    with pytest.raises(RuntimeError) as refusal:
        cpu_operators.name("none")
    return refusal.value.args[0].strip().rpartition(": ")[2].split(", ")
