"""What drafting and verifying cost on this pair of engines, for the decisions that must not depend on a clock.

Acceptance may depend on what a draft token costs, but not on what it costs today: the same request gives the same
tokens on every machine that has the engine directory. So the costs are measured once, here, and stand in fly.json.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fly_trt.engines import Engine, load_engine
from fly_trt.engines.base import Step
from fly_trt.manifest import Manifest

CACHED_TOKENS = 200
VERIFIED_TOKENS = 16
ROUNDS = 9
SECONDS = 20.0  # after which fewer rounds have to do
# A decode step waits for the weights to be read, and a few tokens more hardly change it.
GPU_VERIFICATION_TOKEN_COST = 0.01


def add_costs(manifest: Manifest, directory: Path, report: Callable[[float], None]) -> Manifest:
    """The manifest with draft_token_cost and verification_token_cost among its speculative defaults, where they are not
    given: measured for ONNX Runtime; for engines of a GPU, which the machine that builds them may not have, taken from
    the sizes of the weights."""
    names = ("draft_token_cost", "verification_token_cost")
    if manifest.draft is None or all(name in manifest.speculative for name in names):
        return manifest
    report(0.0)
    costs = _measured(manifest, directory) if manifest.backend == "onnxruntime" else _estimated(manifest)
    report(1.0)
    rounded = {name: float(f"{cost:.2g}") for name, cost in zip(names, costs, strict=True)}
    return manifest.model_copy(update={"speculative": rounded | manifest.speculative})


def _estimated(manifest: Manifest) -> tuple[float, float]:
    assert manifest.draft is not None
    ratio = manifest.draft.source.num_parameters / manifest.target.source.num_parameters
    return ratio, GPU_VERIFICATION_TOKEN_COST


def _measured(manifest: Manifest, directory: Path) -> tuple[float, float]:
    """Medians of interleaved steps, so that a machine that slows down for a while slows all of them."""
    assert manifest.draft is not None
    engines = [load_engine(directory, manifest, model, num_slots=1) for model in (manifest.target, manifest.draft)]
    try:
        cached = min(CACHED_TOKENS, manifest.limits.max_seq_len - VERIFIED_TOKENS)
        verified = min(VERIFIED_TOKENS, manifest.limits.max_num_tokens)
        target, draft = engines
        steps = [_prepared(target, 1, cached), _prepared(target, verified, cached), _prepared(draft, 1, cached)]
        seconds: list[list[float]] = [[], [], []]
        began = time.perf_counter()
        while len(seconds[0]) < ROUNDS and not (seconds[0] and time.perf_counter() - began > SECONDS):
            for engine, step, found in zip((target, target, draft), steps, seconds, strict=True):
                started = time.perf_counter()
                engine.run(step)
                found.append(time.perf_counter() - started)
        single, several, drafted = map(statistics.median, seconds)
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
