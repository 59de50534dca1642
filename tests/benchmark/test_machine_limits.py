"""What the machine can do is the best of what was measured."""

from pathlib import Path

import onnx
import pytest

from fly_trt.benchmark import machine_limits
from fly_trt.benchmark.machine_limits import MachineLimits, cpu_info, matrix_instructions, nominal_int8_rate
from one_operator import cpu_kernels

CPU = """processor\t: 0
model name\t: A Processor
cpu MHz\t\t: 2000.000
flags\t\t: sse2 {flags}

processor\t: 1
model name\t: Another
"""


def test_a_kind_of_product_has_the_rate_of_its_fastest_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three of integers, of which one is slow and one cannot be run."""
    kernels = (
        *machine_limits.KERNELS,
        ("slow", "int8", lambda onnx, library: lambda: sum(range(10_000_000))),
        ("missing", "int8", lambda onnx, library: None),
    )
    monkeypatch.setattr(machine_limits, "KERNELS", kernels)
    monkeypatch.setattr(machine_limits, "RUNS", 1)
    limits = MachineLimits(onnx)
    limits.measure()
    machine = limits.machine()
    assert machine.kernels.keys() == {"MatMul", "MatMulInteger", "slow"}
    assert machine.product_rates["float32"] == machine.kernels["MatMul"]
    assert machine.product_rates["int8"] == machine.kernels["MatMulInteger"] > machine.kernels["slow"]
    assert machine.memory_bandwidth > 0


@pytest.mark.parametrize(
    ("flags", "rate", "seen"),
    [
        ("avx2 avx512f avx512bw", 2 * 64 * 2e9, ["avx512f", "avx2"]),
        ("avx2 avx512f avx512_vnni amx_int8", 2 * 1024 * 2e9, ["amx_int8", "avx512_vnni", "avx512f", "avx2"]),
        ("", None, []),
    ],
)
def test_the_units_of_the_cpu_are_known_by_its_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, rate: float | None, seen: list[str]
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(CPU.format(flags=flags))
    info = cpu_info(path)
    assert info["model name"] == "A Processor"
    monkeypatch.setattr(machine_limits, "cpu_info", lambda: info)
    assert nominal_int8_rate(2) == rate
    assert matrix_instructions() == seen


def test_a_system_that_says_nothing_of_its_cpu_has_no_nominal_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_limits, "cpu_info", lambda: cpu_info(tmp_path / "missing"))
    assert nominal_int8_rate(2) is None


def test_products_of_plugins_are_measured_where_the_engines_have_them() -> None:
    limits = MachineLimits(onnx, cpu_kernels())
    limits.measure()
    machine = limits.machine()
    assert machine.kernels["Int8Linear"] > 0
    assert machine.product_rates["int8"] == max(machine.kernels["Int8Linear"], machine.kernels["MatMulInteger"])
