"""What the machine does at best: bytes that it reads and products that it makes in a second, measured on the threads
that the engines use, and beside them what its integer units could do by their number.

A rate of products is that of the fastest of several kernels, each as one large product, so that no library's
shortcomings pass for the machine's. Another kernel is a line in KERNELS: a function that returns the work, or None
where this process cannot run it.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fly_trt.benchmark.model_cost import Arithmetic, Machine
from fly_trt.engines.base import CPU_DOMAIN

BANDWIDTH_BYTES = 256 << 20  # beyond any cache that a CPU has today
ROWS, INPUTS, OUTPUTS = 256, 1024, 1024  # of a product: 0.27e9 MACs, with operands that fit into a core's cache
RUNS = 10  # of each kernel in a round: a limit is a best moment
MEMORY_RUNS = 3

# MACs a cycle and core, of 8-bit integers, by the flag of the CPU that says so: where a core has two such units, the
# sum of both. Without VNNI a product takes three instructions.
INTEGER_UNITS = (("amx_int8", 1024), ("avx512_vnni", 128), ("avx_vnni", 64), ("avx512bw", 64), ("avx2", 32))


def _onnx_product(onnx: ModuleType, library: Path | None, operator: str) -> Callable[[], object]:
    """By an operator of ONNX Runtime's own: activations uint8 for integers, as its fast kernels want them."""
    rng = np.random.default_rng(0)
    if operator == "MatMul":
        x: Any = rng.standard_normal((ROWS, INPUTS), np.float32)
        weight: Any = rng.standard_normal((INPUTS, OUTPUTS), np.float32)
        return _session_run(onnx, onnx.helper.make_node(operator, ["x", "weight"], ["y"]), x, {"weight": weight})
    x = rng.integers(0, 256, (ROWS, INPUTS)).astype(np.uint8)
    weight = rng.integers(-64, 65, (INPUTS, OUTPUTS)).astype(np.int8)
    node = onnx.helper.make_node(operator, ["x", "weight"], ["y"])
    return _session_run(onnx, node, x, {"weight": weight}, result=onnx.TensorProto.INT32)


def _int8_linear(onnx: ModuleType, library: Path | None) -> Callable[[], object] | None:
    """By the kernels of the engine directory, where it has some: activations are quantised with it."""
    if library is None:
        return None
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, INPUTS), np.float32)
    weight = rng.integers(0, 129, (OUTPUTS // 16, INPUTS // 4, 16, 4)).astype(np.uint8)
    node = onnx.helper.make_node("Int8Linear", ["x", "weight", "scales"], ["y"], domain=CPU_DOMAIN)
    return _session_run(onnx, node, x, {"weight": weight, "scales": np.ones(OUTPUTS, np.float32)}, library=library)


def _session_run(
    onnx: ModuleType,
    node: Any,
    x: Any,
    weights: dict[str, Any],
    *,
    result: int | None = None,
    library: Path | None = None,
) -> Callable[[], object]:
    """A run of one node in a session as the engines' are, into the same memory each time."""
    import onnxruntime as ort

    from fly_trt.engines.onnxruntime import session_options

    helper = onnx.helper
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", result or onnx.TensorProto.FLOAT, (ROWS, OUTPUTS))],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(CPU_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets if library else opsets[:1], ir_version=10)
    options = session_options()
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu")
    return lambda: session.run_with_iobinding(binding)


MakeProduct = Callable[[ModuleType, Path | None], Callable[[], object] | None]
KERNELS: tuple[tuple[str, Arithmetic, MakeProduct], ...] = (
    ("MatMul", "float32", partial(_onnx_product, operator="MatMul")),
    ("MatMulInteger", "int8", partial(_onnx_product, operator="MatMulInteger")),
    ("Int8Linear", "int8", _int8_linear),
)


class MachineLimits:
    """Measured in turns with what shall be compared with them: the best of all rounds counts. `library`: kernels that
    the engines have beside ONNX Runtime's."""

    def __init__(self, onnx: ModuleType, library: Path | None = None) -> None:
        from fly_trt.engines.onnxruntime import num_pool_threads

        self._memory = np.ones(BANDWIDTH_BYTES // 8, np.int64)
        made = [(name, kind, make(onnx, library)) for name, kind, make in KERNELS]
        self._threads = num_pool_threads() or 1  # of those sessions
        self._kernels = {name: (kind, run) for name, kind, run in made if run is not None}
        self._seconds: dict[str, float] = {}

    def measure(self) -> None:
        parts = np.array_split(self._memory, self._threads)
        with ThreadPoolExecutor(self._threads) as pool:
            self._time("memory", lambda: list(pool.map(np.max, parts)), MEMORY_RUNS)
        for name, (_, multiply) in self._kernels.items():
            self._time(name, multiply, RUNS)

    def machine(self) -> Machine:
        kernels = {name: ROWS * INPUTS * OUTPUTS / self._seconds[name] for name in self._kernels}
        rates: dict[Arithmetic, float] = {}
        for name, (kind, _) in self._kernels.items():
            rates[kind] = max(kernels[name], rates.get(kind, 0.0))
        bandwidth = BANDWIDTH_BYTES / self._seconds["memory"]
        return Machine(bandwidth, rates, kernels, nominal_int8_rate(self._threads))

    def _time(self, name: str, work: Callable[[], object], runs: int) -> None:
        work()
        for _ in range(runs):
            started = time.perf_counter()
            work()
            taken = time.perf_counter() - started
            self._seconds[name] = min(taken, self._seconds.get(name, math.inf))


def cpu_info(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What the system says of the first core; nothing where it has no such file."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def matrix_instructions() -> list[str]:
    """Of the CPU, those that decide how fast it multiplies, widest first."""
    flags = set(cpu_info().get("flags", "").split())
    of_interest = ("amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512f", "avx2")
    return [flag for flag in of_interest if flag in flags]


def nominal_int8_rate(num_threads: int) -> float | None:
    """MACs per second of the integer units of so many cores at the clock that the system shows, in case each core has
    two of them, as all with AVX-512 VNNI but the smallest have; None where flags or clock are not known."""
    info = cpu_info()
    flags, clock = set(info.get("flags", "").split()), info.get("cpu MHz")
    macs = next((macs for flag, macs in INTEGER_UNITS if flag in flags), None)
    return None if macs is None or clock is None else num_threads * macs * 1e6 * float(clock)
