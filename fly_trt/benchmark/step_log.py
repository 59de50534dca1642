"""Which steps the engines made while something was measured: an engine that stands before another one and notes each of
its steps, with the rows that it had to process and the time that it took. It changes nothing: what has rollouts still
has them, each noted as its steps.
"""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from fly_trt.benchmark.model_cost import Row
from fly_trt.engines.base import Engine, EngineInfo, Step
from fly_trt.engines.directory import Role
from fly_trt.engines.rollouts import Rollout, RollsOut
from fly_trt.manifest import ModelEngine


class NotedStep(NamedTuple):
    """model: the engine's file. rows: without padding and idle slots. A step's prompt tokens are all processed, and of
    their logits the last ones read, of draft tokens those of each. seconds: of a rollout's step its share of the call.
    """

    role: Role
    model: str
    rows: tuple[Row, ...]
    seconds: float


@dataclass(slots=True)
class StepLog:
    """`steps` since somebody took them."""

    steps: list[NotedStep] = field(default_factory=list)

    def watch(self, role: Role, model: ModelEngine, engine: Engine) -> Engine:
        """For LoadedEngines."""
        if isinstance(engine, RollsOut):
            return WatchedRollouts(engine, role, model.model, self.steps)
        return WatchedEngine(engine, role, model.model, self.steps)

    def take(self) -> list[NotedStep]:
        taken = self.steps.copy()
        self.steps.clear()
        return taken


class WatchedEngine:
    """An engine whose steps are noted in `steps`."""

    def __init__(self, engine: Engine, role: Role, model: str, steps: list[NotedStep]) -> None:
        self.info: EngineInfo = engine.info
        self._engine = engine
        self._role: Role = role
        self._model = model
        self._steps = steps
        # As they are: nothing stands between.
        self.copy_slot, self.swap_slots, self.clear_slot = engine.copy_slot, engine.swap_slots, engine.clear_slot
        self.step, self.trim, self.close = engine.step, engine.trim, engine.close

    @property
    def num_preparations(self) -> int:
        return self._engine.num_preparations

    def run(self, step: Step) -> None:
        started = time.perf_counter()
        self._engine.run(step)
        self._note(rows_of(step), time.perf_counter() - started)

    def _note(self, rows: tuple[Row, ...], seconds: float) -> None:
        self._steps.append(NotedStep(self._role, self._model, rows, seconds))


class WatchedRollouts(WatchedEngine):
    """One that has the methods for rollouts as well."""

    def __init__(self, engine: RollsOut, role: Role, model: str, steps: list[NotedStep]) -> None:
        super().__init__(engine, role, model, steps)
        self.has_rollouts = engine.has_rollouts
        self.rollout = engine.rollout
        self._run_rollout = engine.run_rollout

    def run_rollout(self, rollout: Rollout) -> None:
        started = time.perf_counter()
        self._run_rollout(rollout)
        seconds = (time.perf_counter() - started) / rollout.num_steps
        cached = [at for row, at in enumerate(rollout.write_indices.tolist()) if row not in rollout.idle_rows]
        for k in range(rollout.num_steps):
            self._note(tuple(Row(at + k, 1) for at in cached), seconds)


def rows_of(step: Step) -> tuple[Row, ...]:
    counts = (array.tolist() for array in (step.write_indices, step.num_context, step.num_draft))
    rows = enumerate(zip(step.first_position, *counts, strict=True))
    return tuple(
        Row(cached, first + context + draft, 1 + draft)
        for row, (first, cached, context, draft) in rows
        if row not in step.idle_rows
    )
