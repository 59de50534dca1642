"""Several greedy steps in one call, on ONNX Runtime: the bits of as many steps."""

from pathlib import Path

import numpy as np
import pytest

from fly_trt.engines.onnxruntime import OnnxRuntimeEngine
from fly_trt.engines.rollouts import LONGEST_ROLLOUT, ROLLOUT_OUTPUTS
from fly_trt.errors import EngineError
from key_block_engine import VOCAB, key_block_engine

NUM_SLOTS = 3
PROMPTS = np.random.default_rng(0).integers(2, VOCAB, (NUM_SLOTS, 40))


@pytest.fixture(params=["float32", "float16"])
def engines(request: pytest.FixtureRequest, tmp_path: Path, cpu_library: Path) -> list[OnnxRuntimeEngine]:
    """Two of the same model, which have read the same prompts of different lengths."""
    made = []
    for name in ("first", "second"):
        (folder := tmp_path / name).mkdir()
        engine = key_block_engine(folder, cpu_library, num_slots=NUM_SLOTS, cache=request.param, has_rollouts=True)
        step = engine.step(0, NUM_SLOTS, 40)
        for slot, prompt in enumerate(PROMPTS):
            step.set_row(slot, 0, prompt[: 40 - 7 * slot])
        engine.run(step)
        made.append(engine)
    return made


def one_by_one(engine: OnnxRuntimeEngine, slots: range, tokens: list[int], cached: list[int], k: int) -> dict:
    said: dict[str, list] = {name: [] for name in ROLLOUT_OUTPUTS}
    step = engine.step(slots.start, len(slots), 1)
    for i in range(k):
        for row in range(len(slots)):
            step.set_row(row, cached[row] + i, np.array([tokens[row]]))
        engine.run(step)
        tokens = step.argmax[:, 0].tolist()
        for name, values in said.items():
            values.append(getattr(step, name).copy())
    return {name: np.array(values) for name, values in said.items()}


def rolled_out(engine: OnnxRuntimeEngine, slots: range, tokens: list[int], cached: list[int], k: int) -> dict:
    rollout = engine.rollout(slots.start, len(slots), k)
    rollout.input_ids[:, 0], rollout.write_indices[:] = tokens, cached
    engine.run_rollout(rollout)
    return {name: getattr(rollout, name).copy() for name in ROLLOUT_OUTPUTS}


@pytest.mark.parametrize("slots", [range(NUM_SLOTS), range(1, 3), range(2, 3)])
def test_a_rollout_says_what_as_many_steps_say_and_leaves_the_same_caches(
    engines: list[OnnxRuntimeEngine], slots: range
) -> None:
    cached = [40 - 7 * slot for slot in slots]
    tokens = [int(PROMPTS[slot, 5]) for slot in slots]
    for k in (1, 2, 16, 5):
        wanted = one_by_one(engines[0], slots, tokens, cached, k)
        found = rolled_out(engines[1], slots, tokens, cached, k)
        for name in set(ROLLOUT_OUTPUTS) - {"entropy"}:
            assert found[name].tobytes() == wanted[name].tobytes(), (name, k)
        cached = [at + k for at in cached]
        tokens = wanted["argmax"][-1, :, 0].tolist()
    for slot in range(NUM_SLOTS):  # those too that were not rolled out
        at = [40 - 7 * slot + (24 if slot in slots else 0)]
        first, second = (one_by_one(engine, range(slot, slot + 1), [3], at, 1) for engine in engines)
        assert first["argmax_logprob"].tobytes() == second["argmax_logprob"].tobytes()


def test_the_cache_grows_under_a_rollout(engines: list[OnnxRuntimeEngine]) -> None:
    first, second = engines
    slots, cached, tokens = range(1), [first.capacity - 3], [5]
    for engine in engines:  # which holds what is before them
        step = engine.step(0, 1, first.capacity - 43)
        step.set_row(0, 40, np.full(first.capacity - 43, 7))
        engine.run(step)
    capacity = second.capacity
    wanted = one_by_one(first, slots, tokens, cached, 8)
    found = rolled_out(second, slots, tokens, cached, 8)
    assert second.capacity == first.capacity > capacity
    assert found["argmax_logprob"].tobytes() == wanted["argmax_logprob"].tobytes()


def test_buffers_are_made_once_for_a_shape_and_bound_once_for_a_cache(engines: list[OnnxRuntimeEngine]) -> None:
    engine = engines[0]
    assert engine.rollout(0, 2, 4) is engine.rollout(0, 2, 4)
    rolled_out(engine, range(2), [3, 4], [9, 9], 4)
    before = engine.num_preparations
    rolled_out(engine, range(2), [3, 4], [9, 9], 4)
    assert engine.num_preparations == before
    with pytest.raises(EngineError, match="slots 2 to 3: the engine has 3"):
        engine.rollout(2, 2, 4)
    for num_steps in (0, LONGEST_ROLLOUT + 1):
        with pytest.raises(EngineError, match=f"a rollout of {num_steps} steps: expected 1 to {LONGEST_ROLLOUT}"):
            engine.rollout(0, 2, num_steps)


def test_of_too_many_shapes_the_one_that_was_used_longest_ago_is_bound_again(
    engines: list[OnnxRuntimeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fly_trt.engines.onnxruntime.MAX_BOUND_SHAPES", 2)
    engine = engines[0]
    first, second = engine.rollout(0, 1, 4), engine.rollout(0, 2, 4)
    assert engine.rollout(0, 1, 4) is first
    engine.rollout(0, 3, 4)
    assert engine.rollout(0, 1, 4) is first
    assert engine.rollout(0, 2, 4) is not second
