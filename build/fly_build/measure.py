"""What drafting and verifying cost on this pair of engines, for the decisions that must not depend on a clock.

Acceptance may depend on what a draft token costs, but not on what it costs today: the same request gives the same
tokens on every machine that has the engine directory. So the costs are found once, at the end of a build, and stand in
fly.json. Which of the two ways is the right one for an engine is its backend's to say.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fly_build.latency import StepTime
from fly_trt.engines import Engine, load_engine
from fly_trt.engines.base import Step
from fly_trt.engines.onnxruntime import held_cores
from fly_trt.manifest import Manifest, ModelEngine

CACHED_TOKENS = 200
VERIFIED_TOKENS = 16
DRAFT_TOKENS = 5  # one after the other, as they are drafted: the first one after a target step finds cold caches
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 50, 3.0
# A decode step waits for the weights to be read, and a few tokens more hardly change it.
GPU_VERIFICATION_TOKEN_COST = 0.01


def estimate_costs(manifest: Manifest) -> tuple[float, float]:
    """draft_token_cost and verification_token_cost from the sizes of the weights, for engines of a GPU, which the
    machine that builds them may not have."""
    return _read_by_a_step(_draft(manifest)) / _read_by_a_step(manifest.target), GPU_VERIFICATION_TOKEN_COST


def measure_costs(manifest: Manifest, directory: Path) -> tuple[float, float]:
    """draft_token_cost and verification_token_cost from the fastest of each kind of step, since other work on the
    machine only adds to them."""
    models = (manifest.target, _draft(manifest))
    engines = [load_engine(directory, manifest, model, num_slots=1) for model in models]
    try:
        cached = min(CACHED_TOKENS, manifest.limits.max_seq_len - VERIFIED_TOKENS)
        verified = min(VERIFIED_TOKENS, manifest.limits.max_num_tokens)
        target, draft = engines
        single, several, drafted = _fastest(
            [
                (target, _prepared(target, 1, cached), 1),
                (target, _prepared(target, verified, cached), 1),
                (draft, _prepared(draft, 1, cached), DRAFT_TOKENS),
            ]
        )
        return drafted / single, _further_token(single, several, verified)
    finally:
        for engine in engines:
            engine.close()


def measure_target_steps(manifest: Manifest, directory: Path, contexts: list[int]) -> tuple[list[float], float]:
    """Seconds of a target step of one token behind so many cached tokens, for contexts in rising order, since a step's
    cost follows the longest sequence so far; and what each further token of a step adds at the first of them, in steps
    of one token."""
    target = load_engine(directory, manifest, manifest.target, num_slots=1)
    try:
        verified = min(VERIFIED_TOKENS, manifest.limits.max_num_tokens)
        cached = [min(context, manifest.limits.max_seq_len - verified) for context in contexts]
        first, several = _fastest([(target, _prepared(target, count, cached[0]), 1) for count in (1, verified)])
        others = [_fastest([(target, _prepared(target, 1, count), 1)])[0] for count in cached[1:]]
        return [first, *others], _further_token(first, several, verified)
    finally:
        target.close()


def step_times(engines: Sequence[Engine], manifest: Manifest) -> list[StepTime]:
    """Of each engine, in seconds; the last one is the target."""
    cached = min(CACHED_TOKENS, manifest.limits.max_seq_len - VERIFIED_TOKENS)
    verified = min(VERIFIED_TOKENS, manifest.limits.max_num_tokens)
    counts = [DRAFT_TOKENS] * (len(engines) - 1) + [1]
    kinds = [
        (engine, _prepared(engine, num_tokens, cached), count if num_tokens == 1 else 1)
        for engine, count in zip(engines, counts, strict=True)
        for num_tokens in (1, verified)
    ]
    times = _fastest(kinds)
    return [
        StepTime(single, single * _further_token(single, several, verified))
        for single, several in zip(times[::2], times[1::2], strict=True)
    ]


def estimated_step_times(models: Sequence[ModelEngine]) -> list[StepTime]:
    """The same from the sizes of the weights, in parameters that are read: for engines of a GPU."""
    sizes = [_read_by_a_step(model) for model in models]
    return [StepTime(size, size * GPU_VERIFICATION_TOKEN_COST) for size in sizes]


def _read_by_a_step(model: ModelEngine) -> float:
    """Parameters that a GPU reads in a step, of which each of several has its part."""
    return model.source.num_parameters / model.tensor_parallel_size


def _draft(manifest: Manifest) -> ModelEngine:
    """The draft model, or the self-draft that most sequences begin with."""
    return manifest.draft or manifest.self_drafts[0].engine


def _fastest(kinds: list[tuple[Engine, Step, int]]) -> list[float]:
    """Seconds of each kind of step, which runs so many times in a row."""
    fastest = [math.inf] * len(kinds)
    began, num_rounds = time.perf_counter(), 0
    while num_rounds < MIN_ROUNDS or (num_rounds < MAX_ROUNDS and time.perf_counter() - began < SECONDS):
        num_rounds += 1
        for kind, (engine, step, count) in enumerate(kinds):
            with held_cores():  # as the thread that serves
                started = time.perf_counter()
                for _ in range(count):
                    engine.run(step)
                seconds = time.perf_counter() - started
            fastest[kind] = min(fastest[kind], seconds / count)
    return fastest


def _further_token(single: float, several: float, num_tokens: int) -> float:
    return max(0.0, several / single - 1) / max(1, num_tokens - 1)


def _prepared(engine: Engine, num_tokens: int, cached: int) -> Step:
    """A step of one row that ran once, so that nothing has to be made ready any more."""
    step = engine.step(0, 1, num_tokens)
    step.set_row(0, max(0, cached), np.zeros(num_tokens, np.int64))
    engine.run(step)
    return step
