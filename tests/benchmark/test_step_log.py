"""Engines that are watched do what they do otherwise, and every step of theirs is noted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fly_trt.benchmark.model_cost import Row
from fly_trt.benchmark.step_log import NotedStep, StepLog
from fly_trt.drafting import DraftRow, ModelDrafter
from fly_trt.engines.base import Engine
from fly_trt.engines.rollouts import RollsOut
from fly_trt.manifest import ModelEngine, Source
from rolling_engine import RollingEngine
from table_engine import VOCAB_SIZE, TableEngine, hashed

LANGUAGE = hashed(8, 1, order=30)
MODEL = ModelEngine(
    model="draft.onnx",
    source=Source(checkpoint="none", architecture="none", num_parameters=1),
    vocab_size=VOCAB_SIZE,
    num_layers=1,
    num_kv_heads=1,
    head_dim=4,
    dtype="float32",
    quantization="none",
    kv_cache_dtype="float32",
)


def watched(engine: TableEngine) -> tuple[Any, StepLog]:
    log = StepLog()
    return log.watch("draft", MODEL, engine), log


def drafts(engine: Engine, wanted: dict[int, int]) -> list[list[int]]:
    drafter = ModelDrafter(engine, VOCAB_SIZE)
    rows = [DraftRow(slot, np.array([slot + 2, 3, 4]), count) for slot, count in wanted.items()]
    drafter.propose(rows[:1])
    return [draft.tokens.tolist() for draft in drafter.propose(rows)]


def rows_read(steps: Sequence[NotedStep]) -> list[tuple[Row, ...]]:
    return [step.rows for step in steps]


def test_a_watched_engine_has_rollouts_where_it_has_them_unwatched() -> None:
    rolling = RollingEngine(LANGUAGE)
    assert isinstance(watched(rolling)[0], RollsOut)
    assert watched(rolling)[0].has_rollouts
    rolling.has_rollouts = False
    assert not watched(rolling)[0].has_rollouts
    assert not isinstance(watched(TableEngine(LANGUAGE))[0], RollsOut)


def test_drafts_take_the_same_calls_when_they_are_watched() -> None:
    plain, inner = RollingEngine(LANGUAGE), RollingEngine(LANGUAGE)
    engine, _ = watched(inner)
    wanted = {0: 9, 1: 4}
    assert drafts(engine, wanted) == drafts(plain, wanted)
    assert inner.rollouts == plain.rollouts != []
    assert inner.shapes == plain.shapes


def test_a_rollout_is_noted_as_its_steps() -> None:
    engine, log = watched(RollingEngine(LANGUAGE))
    rollout = engine.rollout(1, 2, 3)
    for row, cached in enumerate((0, 0)):
        rollout.set_row(row, cached, 5)
    engine.run_rollout(rollout)
    steps = log.take()
    assert rows_read(steps) == [(Row(k, 1), Row(k, 1)) for k in range(3)]
    assert len({step.seconds for step in steps}) == 1
    assert steps[0].seconds > 0
    rollout.set_idle(0, 0)
    engine.run_rollout(rollout)
    assert rows_read(log.take()) == [(Row(k, 1),) for k in range(3)]


@pytest.mark.parametrize("kind", [TableEngine, RollingEngine])
def test_slots_between_those_that_are_drafted_for_count_for_nothing(kind: type[TableEngine]) -> None:
    engine, log = watched(kind(LANGUAGE))
    drafter = ModelDrafter(engine, VOCAB_SIZE)
    everyone = [DraftRow(slot, np.array([slot + 2, 3, 4]), 1) for slot in range(3)]
    drafter.propose(everyone)
    assert rows_read(log.take()) == [(Row(0, 3),) * 3]
    drafter.propose([DraftRow(slot, np.array([slot + 2, 3, 4]), 4) for slot in (0, 2)])
    assert rows_read(log.take()) == [(Row(3 + k, 1),) * 2 for k in range(3)]
