"""What drafting and verifying cost on this pair of engines, for the decisions that must not depend on a clock.

Acceptance may depend on what a draft token costs, but not on what it costs today: the same request gives the same
tokens on every machine that has the engine directory. So the costs are found once, at the end of a build, and stand in
fly.json. Which of the two ways is the right one for an engine is its backend's to say.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fly_build.latency import StepTime
from fly_trt.engines import Engine, load_engine
from fly_trt.engines.rollouts import RollsOut
from fly_trt.manifest import Manifest, ModelEngine

CACHED_TOKENS = 200
VERIFIED_TOKENS = 16
DRAFT_TOKENS = 5  # one after the other, as they are drafted: the first one after a target step finds cold caches
Kind = tuple[Callable[[], None], int]  # what runs steps in a row, and how many
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
        kinds = [_steps(target, 1, cached), _steps(target, verified, cached), _drafting(draft, cached)]
        single, several, drafted = _fastest(kinds)
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
        first, several = _fastest([_steps(target, count, cached[0]) for count in (1, verified)])
        others = [_fastest([_steps(target, 1, count)])[0] for count in cached[1:]]
        return [first, *others], _further_token(first, several, verified)
    finally:
        target.close()


def step_times(engines: Sequence[Engine], manifest: Manifest) -> list[StepTime]:
    """Of each engine, in seconds; the last one is the target."""
    cached = min(CACHED_TOKENS, manifest.limits.max_seq_len - VERIFIED_TOKENS)
    verified = min(VERIFIED_TOKENS, manifest.limits.max_num_tokens)
    *drafts, target = engines
    kinds = [kind for draft in drafts for kind in (_drafting(draft, cached), _steps(draft, verified, cached))]
    kinds += [_steps(target, num_tokens, cached) for num_tokens in (1, verified)]
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


def _fastest(kinds: list[Kind]) -> list[float]:
    """Seconds of a step of each kind."""
    from fly_trt.engines.onnxruntime import held_cores  # here, since plans are made where there is no ONNX Runtime

    fastest = [math.inf] * len(kinds)
    began, num_rounds = time.perf_counter(), 0
    while num_rounds < MIN_ROUNDS or (num_rounds < MAX_ROUNDS and time.perf_counter() - began < SECONDS):
        num_rounds += 1
        for kind, (run, count) in enumerate(kinds):
            with held_cores():  # as the thread that serves
                started = time.perf_counter()
                run()
                seconds = time.perf_counter() - started
            fastest[kind] = min(fastest[kind], seconds / count)
    return fastest


def _further_token(single: float, several: float, num_tokens: int) -> float:
    return max(0.0, several / single - 1) / max(1, num_tokens - 1)


def _steps(engine: Engine, num_tokens: int, cached: int, count: int = 1) -> Kind:
    """Steps of one row, one of which ran already, so that nothing has to be made ready any more."""
    step = engine.step(0, 1, num_tokens)
    step.set_row(0, max(0, cached), np.zeros(num_tokens, np.int64))
    engine.run(step)

    def run() -> None:
        for _ in range(count):
            engine.run(step)

    return run, count


def _drafting(engine: Engine, cached: int) -> Kind:
    """Tokens one after the other as they are drafted: in one rollout where the engine has them."""
    if not isinstance(engine, RollsOut) or not engine.has_rollouts:
        return _steps(engine, 1, cached, DRAFT_TOKENS)
    rollout = engine.rollout(0, 1, DRAFT_TOKENS)
    rollout.set_row(0, max(0, cached), 0)
    engine.run_rollout(rollout)
    return partial(engine.run_rollout, rollout), DRAFT_TOKENS
