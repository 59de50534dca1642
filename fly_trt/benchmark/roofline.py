"""How far the steps of an engine are from the limits of this machine (`fly-bench --roofline`), on ONNX Runtime.

A step reads every weight once, so it cannot take less time than their bytes over the memory bandwidth; and it
multiplies every weight with every token, so not less than its multiply-accumulates (MACs) over the rate of matrix
products. Both limits are measured here, in turns with the steps, on the threads that the engines use. Attention, norms
and the verification head are no part of the limits: what they take shows as distance from them.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from fly_trt.benchmark.results import Spread
from fly_trt.engines import find_backend
from fly_trt.engines.base import Engine, Step
from fly_trt.engines.directory import LoadedEngines, Role
from fly_trt.errors import ConfigError
from fly_trt.service.config import resolve_speculative_config

Arithmetic = Literal["float32", "int8"]

BANDWIDTH_BYTES = 256 << 20  # beyond any cache that a CPU has today
PRODUCT_SIZE = 2048  # of the square matrix, with PRODUCT_ROWS rows on the other side: 1.07e9 MACs
PRODUCT_ROWS = 256
CACHED_TOKENS = 128
PROMPT_TOKENS = 64
SEVERAL_ROWS = 4
RUNS = 3  # of a step in each round
INT8_PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits")


@dataclass(frozen=True, slots=True)
class Machine:
    """The best of the rounds: a limit is what the machine can do when nothing else happens on it.

    memory_bandwidth: bytes read per second. product_rates: MACs per second of large matrix products.
    """

    memory_bandwidth: float
    product_rates: Mapping[Arithmetic, float]


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one step has to do at least: bytes of weights that it reads, and MACs for each token. Experts of mixtures,
    of which a token uses few, are not counted."""

    weight_bytes: int
    macs_per_token: Mapping[Arithmetic, int]

    def memory_ms(self, machine: Machine) -> float:
        return 1e3 * self.weight_bytes / machine.memory_bandwidth

    def arithmetic_ms(self, machine: Machine, num_tokens: int) -> float:
        macs = self.macs_per_token.items()
        return 1e3 * num_tokens * sum(count / machine.product_rates[kind] for kind, count in macs)


@dataclass(frozen=True, slots=True)
class StepFigures:
    """A step of `batch_size` rows of `num_tokens` tokens, in ms."""

    role: Role
    batch_size: int
    num_tokens: int
    measured: Spread
    memory_ms: float
    arithmetic_ms: float

    @property
    def limit_ms(self) -> float:
        return max(self.memory_ms, self.arithmetic_ms)


@dataclass(frozen=True, slots=True)
class Roofline:
    engines: LoadedEngines
    machine: Machine
    costs: Mapping[Role, ModelCost]
    steps: list[StepFigures]


def run_roofline(
    engine_dir: Path, rounds: int, num_threads: int | None, progress: Callable[[str, int, int], None]
) -> Roofline:
    """Raises ConfigError for engines of a GPU, and where the extra `bench` is not installed."""
    onnx = _import_onnx()
    engines = LoadedEngines(engine_dir, num_threads=num_threads)
    if find_backend(engine_dir, engines.manifest).is_gpu:
        raise ConfigError(
            f"roofline: {engines.manifest.name} was built for {engines.manifest.backend} on cuda: the limits of a GPU "
            "are not measured, leave --roofline out"
        )
    with engines:
        known: tuple[Role, ...] = ("target", "draft", "inner_draft")
        roles = [role for role in known if getattr(engines.manifest, role) is not None]
        progress("loading engines", 0, rounds)
        steps = [step for role in roles for step in _steps(role, engines)]
        limits = _Limits(onnx)
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}", number, rounds)
            limits.measure()
            for step in steps:
                step.measure()
        costs = {role: _cost(onnx, engines.directory / getattr(engines.manifest, role).model) for role in roles}
        machine = limits.machine()
        return Roofline(engines, machine, costs, [step.figures(costs[step.role], machine) for step in steps])


@dataclass(slots=True)
class _MeasuredStep:
    role: Role
    engine: Engine
    step: Step
    milliseconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        self.engine.run(self.step)
        started = time.perf_counter()
        for _ in range(RUNS):
            self.engine.run(self.step)
        self.milliseconds.append(1e3 * (time.perf_counter() - started) / RUNS)

    def figures(self, cost: ModelCost, machine: Machine) -> StepFigures:
        rows, length = self.step.input_ids.shape
        arithmetic = cost.arithmetic_ms(machine, rows * length)
        measured = Spread.of(self.milliseconds)
        assert measured is not None
        return StepFigures(self.role, rows, length, measured, cost.memory_ms(machine), arithmetic)


def _steps(role: Role, engines: LoadedEngines) -> Iterator[_MeasuredStep]:
    """One token, a verification, a prompt, and the first two of several sequences at once."""
    manifest, engine = engines.manifest, getattr(engines, role)
    several = min(SEVERAL_ROWS, engines.max_batch_size)
    verified = 1 + resolve_speculative_config(manifest, {}).num_speculative_tokens
    shapes = [(1, 1), (1, verified), (1, min(PROMPT_TOKENS, manifest.limits.max_num_tokens))]
    shapes += [(several, 1), (several, verified)] if several > 1 else []
    rng = np.random.default_rng(0)
    for batch_size, num_tokens in shapes:
        cached = min(CACHED_TOKENS, manifest.limits.max_seq_len - num_tokens)
        if cached < 0 or batch_size * num_tokens > manifest.limits.max_num_tokens:
            continue
        step = engine.step(0, batch_size, num_tokens)
        for row in range(batch_size):
            step.set_row(row, cached, rng.integers(0, engine.info.vocab_size, num_tokens))
        yield _MeasuredStep(role, engine, step)


class _Limits:
    """What the machine does at best: seconds of one pass over memory, and of one product of each kind."""

    def __init__(self, onnx: ModuleType) -> None:
        from fly_trt.engines.onnxruntime import num_pool_threads, session_options

        self._threads = num_pool_threads() or 1
        self._memory = np.ones(BANDWIDTH_BYTES // 8, np.int64)
        self._products = {kind: _product(onnx, kind, session_options()) for kind in ("float32", "int8")}
        self._seconds: dict[str, float] = {}

    def measure(self) -> None:
        parts = np.array_split(self._memory, self._threads)
        with ThreadPoolExecutor(self._threads) as pool:
            self._time("memory", lambda: list(pool.map(np.max, parts)))
        for kind, multiply in self._products.items():
            self._time(kind, multiply)

    def machine(self) -> Machine:
        macs = PRODUCT_ROWS * PRODUCT_SIZE**2
        rates: dict[Any, float] = {kind: macs / self._seconds[kind] for kind in self._products}
        return Machine(BANDWIDTH_BYTES / self._seconds["memory"], rates)

    def _time(self, name: str, work: Callable[[], object]) -> None:
        work()
        for _ in range(RUNS):
            started = time.perf_counter()
            work()
            taken = time.perf_counter() - started
            self._seconds[name] = min(taken, self._seconds.get(name, math.inf))


def _product(onnx: ModuleType, kind: str, options: Any) -> Callable[[], object]:
    """One large matrix product by the kernel that the engines use."""
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    shape = (PRODUCT_SIZE, PRODUCT_SIZE)
    types = onnx.TensorProto
    if kind == "int8":
        weight: Any = rng.integers(-64, 65, shape).astype(np.int8)
        x: Any = rng.integers(0, 256, (PRODUCT_ROWS, PRODUCT_SIZE)).astype(np.uint8)
        operator, given, result = "MatMulInteger", types.UINT8, types.INT32
    else:
        weight = rng.standard_normal(shape, np.float32)
        x = rng.standard_normal((PRODUCT_ROWS, PRODUCT_SIZE), np.float32)
        operator, given, result = "MatMul", types.FLOAT, types.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["x", "weight"], ["y"])],
        "product",
        [onnx.helper.make_tensor_value_info("x", given, x.shape)],
        [onnx.helper.make_tensor_value_info("y", result, x.shape)],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def _cost(onnx: ModuleType, path: Path) -> ModelCost:
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    # Half precision is cast and a shared embedding table transposed when the session is made: a step reads float32.
    widened: dict[str, Any] = {}
    for node in graph.node:
        if node.op_type in ("Cast", "Transpose") and (source := (weights | widened).get(node.input[0])) is not None:
            widened[node.output[0]] = source
    macs: dict[Arithmetic, int] = {"float32": 0, "int8": 0}
    num_bytes = 0
    for node in graph.node:
        if node.op_type != "MatMul" and node.op_type not in INT8_PRODUCTS:
            continue
        read = [weights[name] for name in node.input if name in weights]
        num_bytes += sum(math.prod(tensor.dims) * _item_bytes(onnx, tensor) for tensor in read)
        computed = [widened[name] for name in node.input if name in widened]
        num_bytes += sum(4 * math.prod(tensor.dims) for tensor in computed)
        if node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            macs["int8"] += sizes["K"] * sizes["N"]
        else:
            kind: Arithmetic = "float32" if node.op_type == "MatMul" else "int8"
            macs[kind] += sum(math.prod(tensor.dims) for tensor in [*read, *computed] if len(tensor.dims) == 2)
    return ModelCost(num_bytes, {kind: count for kind, count in macs.items() if count})


def _item_bytes(onnx: ModuleType, tensor: Any) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _import_onnx() -> ModuleType:
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise ConfigError("roofline: onnx is not installed: pip install 'fly-trt[bench]'") from None
    return onnx
