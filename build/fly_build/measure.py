"""What drafting and verifying cost on this pair of engines, for the decisions that must not depend on a clock.

Acceptance may depend on what a draft token costs, but not on what it costs today: the same request gives the same
tokens on every machine that has the engine directory. So the costs are found once, at the end of a build, and stand in
fly.json. Which of the two ways is the right one for an engine is its backend's to say.
"""

import math
import time
from pathlib import Path

import numpy as np

from fly_trt.engines import Engine, load_engine
from fly_trt.engines.base import Step
from fly_trt.manifest import Manifest

CACHED_TOKENS = 200
VERIFIED_TOKENS = 16
DRAFT_TOKENS = 5  # one after the other, as they are drafted: the first one after a target step finds cold caches
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 50, 3.0
# A decode step waits for the weights to be read, and a few tokens more hardly change it.
GPU_VERIFICATION_TOKEN_COST = 0.01


def estimate_costs(manifest: Manifest) -> tuple[float, float]:
    """draft_token_cost and verification_token_cost from the sizes of the weights, for engines of a GPU, which the
    machine that builds them may not have."""
    assert manifest.draft is not None
    ratio = manifest.draft.source.num_parameters / manifest.target.source.num_parameters
    return ratio, GPU_VERIFICATION_TOKEN_COST


def measure_costs(manifest: Manifest, directory: Path) -> tuple[float, float]:
    """draft_token_cost and verification_token_cost from the fastest of each kind of step, since other work on the
    machine only adds to them."""
    assert manifest.draft is not None
    engines = [load_engine(directory, manifest, model, num_slots=1) for model in (manifest.target, manifest.draft)]
    try:
        cached = min(CACHED_TOKENS, manifest.limits.max_seq_len - VERIFIED_TOKENS)
        verified = min(VERIFIED_TOKENS, manifest.limits.max_num_tokens)
        target, draft = engines
        kinds = [(target, 1, 1), (target, verified, 1), (draft, 1, DRAFT_TOKENS)]
        steps = [_prepared(engine, num_tokens, cached) for engine, num_tokens, _ in kinds]
        fastest = [math.inf] * len(kinds)
        began, num_rounds = time.perf_counter(), 0
        while num_rounds < MIN_ROUNDS or (num_rounds < MAX_ROUNDS and time.perf_counter() - began < SECONDS):
            num_rounds += 1
            for kind, ((engine, _, count), step) in enumerate(zip(kinds, steps, strict=True)):
                started = time.perf_counter()
                for _ in range(count):
                    engine.run(step)
                fastest[kind] = min(fastest[kind], (time.perf_counter() - started) / count)
        single, several, drafted = fastest
        return drafted / single, max(0.0, several / single - 1) / max(1, verified - 1)
    finally:
        for engine in engines:
            engine.close()


def _prepared(engine: Engine, num_tokens: int, cached: int) -> Step:
    """A step of one row that ran once, so that nothing has to be made ready any more."""
    step = engine.step(0, 1, num_tokens)
    step.set_row(0, max(0, cached), np.zeros(num_tokens, np.int64))
    engine.run(step)
    return step
