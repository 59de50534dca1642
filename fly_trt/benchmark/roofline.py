"""How far the steps of engines, and whole modes, are from the limits of this machine (`fly-bench --roofline`), on ONNX
Runtime.

A step reads every weight once and the keys and values that its tokens see, so it cannot take less time than their bytes
over the memory bandwidth; and not less than its multiply-accumulates over the rate of products (model_cost.py). Both
limits are measured here (machine_limits.py), in turns with the steps. The limit of a mode is the sum of the limits of
the steps that its engines really made.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

from fly_trt.benchmark.machine_limits import MachineLimits
from fly_trt.benchmark.measure import Benchmark, BenchmarkConfig, measure_modes
from fly_trt.benchmark.model_cost import Machine, ModelCost, Row, count_cost
from fly_trt.benchmark.results import Row as ModeRow
from fly_trt.benchmark.results import Spread
from fly_trt.benchmark.step_log import NotedStep, StepLog
from fly_trt.engines import find_backend
from fly_trt.engines.base import Engine
from fly_trt.engines.directory import LoadedEngines, Role
from fly_trt.errors import ConfigError
from fly_trt.manifest import read_manifest
from fly_trt.service.config import resolve_speculative_config

CACHED_TOKENS = 128
PROMPT_TOKENS = 64
SEVERAL_ROWS = 4
RUNS = 3  # of a step in each round


@dataclass(frozen=True, slots=True)
class StepFigures:
    """A step of `batch_size` rows of `num_tokens` tokens behind `num_cached`, of which the logits of `num_logits` are
    read, in ms: what it takes, and at least for what."""

    role: Role
    batch_size: int
    num_tokens: int
    num_cached: int
    num_logits: int
    measured: Spread
    weights_ms: float
    cache_ms: float
    products_ms: float
    attention_ms: float

    @property
    def memory_ms(self) -> float:
        return self.weights_ms + self.cache_ms

    @property
    def arithmetic_ms(self) -> float:
        return self.products_ms + self.attention_ms

    @property
    def limit_ms(self) -> float:
        return max(self.memory_ms, self.arithmetic_ms)


@dataclass(frozen=True, slots=True)
class ModeFigures:
    """A mode under a load, in ms by output token: all of it, the steps of the engines by role, and those at their
    limits. tokens_per_second over all rounds; at_limit: of the engines' limits alone."""

    mode: str
    load: str
    num_steps: Mapping[Role, int]
    tokens_per_second: float
    at_limit: float
    total_ms: float
    measured_ms: Mapping[Role, float]
    limit_ms: Mapping[Role, float]


@dataclass(frozen=True, slots=True)
class Roofline:
    """`modes` and `benchmark` where modes were asked for."""

    engines: LoadedEngines
    machine: Machine
    costs: Mapping[Role, ModelCost]
    steps: list[StepFigures]
    modes: list[ModeFigures]
    benchmark: Benchmark | None


def run_roofline(
    engine_dir: Path,
    rounds: int,
    num_threads: int | None,
    progress: Callable[[str, int, int], None],
    *,
    cached: Sequence[int] = (),
    config: BenchmarkConfig | None = None,
) -> Roofline:
    """cached: tokens in each slot before the steps. config: the modes to measure on the same engines; none without.

    Raises ConfigError for engines of a GPU, for steps that the engines were not built for, and where the extra `bench`
    is not installed."""
    onnx = _import_onnx()
    log = StepLog()
    manifest = read_manifest(engine_dir)
    if find_backend(engine_dir, manifest).is_gpu:
        raise ConfigError(
            f"roofline: {manifest.name} was built for {manifest.backend} on cuda: the limits of a GPU "
            "are not measured, leave --roofline out"
        )
    limit = manifest.limits.max_batch_size
    slots = max(min(SEVERAL_ROWS, limit), (config and config.most_in_flight) or limit)
    engines = LoadedEngines(engine_dir, max_batch_size=slots, num_threads=num_threads, watch=log.watch)
    with engines:
        progress("loading engines", 0, rounds)
        known: tuple[Role, ...] = ("target", "draft", "inner_draft")
        roles = [role for role in known if getattr(manifest, role) is not None]
        groups = _step_groups(engines, roles, cached)
        kernels = manifest.target.cpu_kernels
        limits = MachineLimits(onnx, engines.directory / kernels if kernels else None)
        for number in range(rounds):
            progress(f"steps, round {number + 1} of {rounds}", number, rounds)
            with engines.held_cores():
                limits.measure()
                for group in groups:
                    _measure_together(group)
        benchmark = None if config is None else measure_modes(engines, config, progress, log)
        with engines.held_cores():
            limits.measure()
        machine = limits.machine()
        costs = _costs(onnx, engines)
        by_role = {role: costs[getattr(manifest, role).model] for role in roles}
        steps = [step.figures(by_role[step.role], machine) for group in groups for step in group]
        modes = [] if benchmark is None else _mode_figures(benchmark, costs, machine)
        return Roofline(engines, machine, by_role, steps, modes, benchmark)


@dataclass(slots=True)
class _MeasuredStep:
    """rows: all alike."""

    role: Role
    engine: Engine
    rows: tuple[Row, ...]
    milliseconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        num_cached, num_tokens, num_logits = self.rows[0]
        num_context = num_tokens - num_logits + 1
        step = self.engine.step(0, len(self.rows), num_tokens, num_positions=num_logits)
        ids = np.random.default_rng(0).integers(0, self.engine.info.vocab_size, num_tokens)
        for row in range(len(self.rows)):
            step.set_row(row, num_cached, ids[:num_context], ids[num_context:], first=num_context - 1)
        self.engine.run(step)  # makes room
        for row in range(len(self.rows)):
            self.engine.clear_slot(row, 0)  # memory that was never written need not be read
        self.engine.run(step)
        started = time.perf_counter()
        for _ in range(RUNS):
            self.engine.run(step)
        self.milliseconds.append(1e3 * (time.perf_counter() - started) / RUNS)

    def figures(self, cost: ModelCost, machine: Machine) -> StepFigures:
        measured = Spread.of(self.milliseconds)
        assert measured is not None
        num_cached, num_tokens, num_logits = self.rows[0]
        return StepFigures(
            role=self.role,
            batch_size=len(self.rows),
            num_tokens=num_tokens,
            num_cached=num_cached,
            num_logits=num_logits,
            measured=measured,
            weights_ms=cost.weights_ms(machine, self.rows),
            cache_ms=cost.cache_ms(machine, self.rows),
            products_ms=cost.products_ms(machine, self.rows),
            attention_ms=cost.attention_ms(machine, self.rows),
        )


def _measure_together(steps: Sequence[_MeasuredStep]) -> None:
    """Of as many cached tokens: what a longer cache left allocated would cost them time, and those that come after."""
    engines = {id(step.engine): step.engine for step in steps}.values()
    for engine in engines:
        engine.trim(0)
    for step in steps:
        step.measure()
    for engine in engines:
        engine.trim(0)


def _step_groups(engines: LoadedEngines, roles: Sequence[Role], cached: Sequence[int]) -> list[list[_MeasuredStep]]:
    """For each number of cached tokens one token, a verification, a prompt, and the first two of several sequences at
    once, in every engine."""
    limits = engines.manifest.limits
    verified = 1 + resolve_speculative_config(engines.manifest, {}).num_speculative_tokens
    prompt = Row(0, min(PROMPT_TOKENS, limits.max_num_tokens))
    several = min(SEVERAL_ROWS, engines.max_batch_size)
    shapes = [(1, Row(0, 1)), (1, Row(0, verified, verified)), (1, prompt)]
    shapes += [(several, Row(0, 1)), (several, Row(0, verified, verified))] if several > 1 else []
    shapes = [(count, row) for count, row in shapes if count * row.num_tokens <= limits.max_num_tokens]
    longest = limits.max_seq_len - max(row.num_tokens for _, row in shapes)
    for num_cached in cached:
        if not 0 <= num_cached <= longest:
            raise ConfigError(
                f"cached_tokens {num_cached}: {engines.manifest.name} was built for max_seq_len {limits.max_seq_len}, "
                f"expected 0 to {longest} before a step: give fewer, or rebuild with a larger --max-seq-len"
            )
    return [
        [
            _MeasuredStep(role, getattr(engines, role), count * (row._replace(num_cached=num_cached),))
            for role in roles
            for count, row in shapes
        ]
        for num_cached in cached or (min(CACHED_TOKENS, longest),)
    ]


def _costs(onnx: ModuleType, engines: LoadedEngines) -> dict[str, ModelCost]:
    """By model file."""
    manifest = engines.manifest
    drafts = (manifest.draft, manifest.inner_draft, *(draft.engine for draft in manifest.self_drafts))
    models = {model.model: model for model in filter(None, (manifest.target, *drafts))}
    return {path: count_cost(onnx, engines.directory / path, model) for path, model in models.items()}


def _mode_figures(benchmark: Benchmark, costs: Mapping[str, ModelCost], machine: Machine) -> list[ModeFigures]:
    return [_mode(row, steps, costs, machine) for row, steps in zip(benchmark.rows, benchmark.steps, strict=True)]


def _mode(row: ModeRow, steps: Sequence[NotedStep], costs: Mapping[str, ModelCost], machine: Machine) -> ModeFigures:
    """Over all rounds together."""
    assert row.num_output_tokens is not None
    assert row.seconds is not None
    num_tokens, seconds = sum(row.num_output_tokens.rounds), sum(row.seconds.rounds)
    num_steps: dict[Role, int] = {}
    measured: dict[Role, float] = {}
    limits: dict[Role, float] = {}
    for step in steps:
        limit = costs[step.model].limit_ms(machine, step.rows)
        num_steps[step.role] = num_steps.get(step.role, 0) + 1
        measured[step.role] = measured.get(step.role, 0.0) + 1e3 * step.seconds / num_tokens
        limits[step.role] = limits.get(step.role, 0.0) + limit / num_tokens
    return ModeFigures(
        mode=row.mode,
        load=str(row.load),
        num_steps=num_steps,
        tokens_per_second=num_tokens / seconds,
        at_limit=1e3 / sum(limits.values()),
        total_ms=1e3 * seconds / num_tokens,
        measured_ms=measured,
        limit_ms=limits,
    )


def _import_onnx() -> ModuleType:
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise ConfigError("roofline: onnx is not installed: pip install 'fly-trt[bench]'") from None
    return onnx
