"""The TensorRT engine on a simulated GPU that computes with ONNX Runtime: the contract's promises about the cache, rows
and padding, and that logits of every type are read right.
"""

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fly_trt.engines import Engine
from fly_trt.engines.base import TOP_OUTPUTS, Step
from fly_trt.engines.blocks import OUTPUTS
from fly_trt.engines.gpu import widen
from fly_trt.errors import EngineError
from fly_trt.manifest import Dtype, read_manifest
from fly_trt.verification import FlyPolicy
from older_graphs import find_positions
from simulated_cuda import SimulatedCuda
from simulated_engine import LONGEST, LONGEST_ROW, MAX_SEQ_LEN, TOKENS, load, logits, numbers, run, same
from simulated_tensorrt import deserialise, serialise

LOOSE = FlyPolicy(entropy_threshold=0.0, use_full_entropy=True, window=2, lookahead=0)
HALVES: dict[Dtype, tuple[ir.DataType, float]] = {
    "float16": (ir.DataType.FLOAT16, 0.03),
    "bfloat16": (ir.DataType.BFLOAT16, 0.3),
}


@pytest.mark.parametrize("length", [1, 4, 5, LONGEST_ROW, 50])
def test_chunks_give_the_logits_of_the_whole(engine: Engine, length: int) -> None:
    whole = logits(engine, 0, TOKENS)
    parts = [logits(engine, at, TOKENS[at : at + length]) for at in range(0, LONGEST, length)]
    same(np.concatenate(parts), whole)


def test_steps_of_all_lengths_agree(engine: Engine) -> None:
    whole = logits(engine, 0, TOKENS)
    for length in range(1, LONGEST + 1):
        same(logits(engine, 0, TOKENS[:length]), whole[:length])


@pytest.mark.parametrize("length", [3, 9, 30])
def test_the_padding_of_a_step_is_never_seen(engine: Engine, length: int) -> None:
    """Neither what an earlier step of the same padded length left in the buffers, nor what padding wrote."""
    whole = logits(engine, 0, TOKENS)
    logits(engine, 0, TOKENS[::-1][: length + 1])
    got = [logits(engine, 0, TOKENS[:length]), logits(engine, length, TOKENS[length:])]
    same(np.concatenate(got), whole)


def test_a_rewind_forgets_what_came_after(engine: Engine) -> None:
    whole = logits(engine, 0, TOKENS)
    logits(engine, 0, TOKENS[:20])
    logits(engine, 20, TOKENS[40:60])
    same(logits(engine, 20, TOKENS[20:40]), whole[20:40])


def test_slots_are_independent(engine: Engine) -> None:
    alone = logits(engine, 0, TOKENS[:20], slot=1)
    logits(engine, 0, TOKENS[20:40], slot=0)
    logits(engine, 0, TOKENS[40:60], slot=2)
    same(logits(engine, 20, TOKENS[20:30], slot=1), logits(engine, 0, TOKENS[:30], slot=0)[20:])
    same(logits(engine, 0, TOKENS[:20], slot=1), alone, atol=0)


def test_the_last_slot_ends_where_its_memory_ends(engine: Engine) -> None:
    """The longest step at the end of the longest sequence, and a row that others make as long as they are."""
    run(engine, MAX_SEQ_LEN - 1, TOKENS, slot=2)
    step = engine.step(0, 3, LONGEST_ROW)
    for row in range(3):
        step.set_row(row, MAX_SEQ_LEN - 1, TOKENS[:1])
    engine.run(step)


def outputs(step: Step, row: int, num_tokens: int) -> list[Any]:
    """All that a step says about the tokens of a row and their successors."""
    names = [*OUTPUTS, *(TOP_OUTPUTS if step.top_ids is not None else ())]
    values = [np.atleast_1d(getattr(step, name)[row]) for name in names]
    return [value[: num_tokens - (name == "token_logprob")].copy() for name, value in zip(names, values, strict=True)]


@pytest.mark.parametrize("num_tokens", [1, 5, 8, LONGEST_ROW, LONGEST_ROW + 1, 70])
@pytest.mark.parametrize("first_slot", [0, 1])
def test_rows_of_a_batch_give_what_they_give_alone(engine: Engine, first_slot: int, num_tokens: int) -> None:
    """Also with drafts that a policy of their own judges, at other positions; long rows run one by one."""
    alone, starts = [], (0, 7)
    cut = max(1, num_tokens // 2)
    policies = {"policy": LOOSE}, {}
    for row, cached in enumerate(starts):
        if cached:
            logits(engine, 0, TOKENS[row : row + cached], slot=first_slot + row)
        tokens = TOKENS[row + cached :][:num_tokens]
        step = engine.step(first_slot + row, 1, num_tokens, with_logits=True, with_top=True)
        step.set_row(0, cached, tokens[:cut], tokens[cut:], **policies[row])
        engine.run(step)
        alone.append((outputs(step, 0, num_tokens), numbers(step.logits[0])))

    for with_logits, with_top in itertools.product((False, True), repeat=2):
        step = engine.step(first_slot, 2, num_tokens, with_logits=with_logits, with_top=with_top)
        for row, cached in enumerate(starts):
            tokens = TOKENS[row + cached :][:num_tokens]
            step.set_row(row, cached, tokens[:cut], tokens[cut:], **policies[row])
        engine.run(step)
        for row, (found, row_logits) in enumerate(alone):
            for got, want in zip(outputs(step, row, num_tokens), found, strict=with_top):
                same(got, want)
            if with_logits:
                same(step.logits[row], row_logits)
            if num_tokens > 5:
                assert step.num_accepted[0] > step.num_accepted[1] == 0  # the policies differ


@pytest.mark.parametrize("length", [15, 50])
def test_the_draft_of_a_row_is_verified_in_the_engine(engine: Engine, length: int) -> None:
    prompt = TOKENS[: length - 5]
    greedy: list[int] = []
    for _ in range(6):
        greedy.append(int(run(engine, 0, np.array([*prompt, *greedy])).next_token[0]))
    draft = np.array(greedy[:5])
    step = engine.step(0, 1, length)
    step.set_row(0, 0, prompt, draft)
    engine.run(step)
    assert (int(step.num_accepted[0]), int(step.next_token[0])) == (5, greedy[5])
    draft[2] += 1
    step.set_row(0, 0, prompt, draft)
    engine.run(step)
    assert (int(step.num_accepted[0]), int(step.next_token[0])) == (2, greedy[2])


def test_a_copied_slot_goes_on_as_its_source_does(engine: Engine) -> None:
    whole = logits(engine, 0, TOKENS)
    other = logits(engine, 0, TOKENS[::-1], slot=1)
    logits(engine, 0, TOKENS[::-1], slot=2)
    engine.copy_slot(0, 2, 40)
    for slot in (0, 2):
        same(logits(engine, 40, TOKENS[40:60], slot=slot), whole[40:60])
    same(logits(engine, 60, TOKENS[::-1][60:], slot=1), other[60:])


def test_a_copy_changes_no_token_behind_it(engine: Engine) -> None:
    """The rest of the target is still its own: only the first 40 tokens are the source's."""
    logits(engine, 0, TOKENS)
    text = np.concatenate([TOKENS[:40], TOKENS[::-1][:40]])
    whole = logits(engine, 0, text, slot=2)
    engine.copy_slot(0, 2, 40)
    same(logits(engine, 79, text[79:], slot=2), whole[79:])


def test_swapped_slots_go_on_in_each_others_place(engine: Engine) -> None:
    texts = TOKENS[:30], TOKENS[30:60]
    want = []
    for slot, text in zip((0, 2), texts, strict=True):
        want.append(logits(engine, 0, text, slot=slot)[20:])
    middle = logits(engine, 0, TOKENS[60:90], slot=1)
    engine.swap_slots(0, 2, 20)
    same(logits(engine, 20, texts[0][20:], slot=2), want[0])
    same(logits(engine, 20, texts[1][20:], slot=0), want[1])
    same(logits(engine, 20, TOKENS[80:90], slot=1), middle[20:])


def test_nothing_is_copied_for_slots_that_hold_nothing(engine: Engine, gpu: SimulatedCuda) -> None:
    engine.copy_slot(0, 1, 0)
    engine.swap_slots(0, 1, 0)
    assert not gpu.copies


def test_a_slot_that_was_never_used_holds_numbers(engine: Engine) -> None:
    """A masked key is multiplied by zero, which makes nothing of a number, and NaN of what memory may hold at first."""
    for slot in range(3):
        logits(engine, 0, TOKENS[:1], slot=slot)


def test_a_cleared_slot_holds_numbers_and_keeps_what_lies_before(engine: Engine, gpu: SimulatedCuda) -> None:
    whole = logits(engine, 0, TOKENS[:30], slot=1)
    logits(engine, 0, TOKENS[:30], slot=0)
    engine.clear_slot(1, 20)
    for slot in (0, 1):
        same(logits(engine, 20, TOKENS[20:30], slot=slot), whole[20:])
    for cache in engine._caches:
        gpu.cudaMemsetAsync(cache.address, 0xFF, cache.num_bytes, engine._stream.handle)  # NaN
    engine.clear_slot(1, 0)
    same(logits(engine, 0, TOKENS[:30], slot=1), whole)
    for slot in (0, 2):
        assert np.isnan(run(engine, 0, TOKENS[:30], slot).logits).any()


def test_trimming_gives_nothing_back(engine: Engine, simulated_engine: Path) -> None:
    whole = logits(engine, 0, TOKENS)
    assert engine.trim(5) == read_manifest(simulated_engine).draft.tensorrt.cache_tokens >= MAX_SEQ_LEN
    same(logits(engine, 50, TOKENS[50:]), whole[50:])


def test_logits_leave_the_engine_only_when_asked_for(engine: Engine, gpu: SimulatedCuda) -> None:
    step = run(engine, 0, TOKENS[:5], with_logits=False)
    assert step.logits is None
    assert step.argmax[0].tolist() == logits(engine, 0, TOKENS[:5]).argmax(-1).tolist()
    gpu.copies.clear()
    engine.run(step)
    assert gpu.copies == {"host to device": 1, "device to host": 1}
    gpu.copies.clear()
    run(engine, 0, TOKENS[:5])
    assert gpu.copies == {"host to device": 1, "device to host": 2}


@pytest.mark.parametrize("num_tokens", [1, 5, 50])
def test_the_most_probable_tokens_leave_the_engine_only_when_asked_for(
    engine: Engine, gpu: SimulatedCuda, num_tokens: int
) -> None:
    """Before and after a graph of the shape was recorded, which steps with and without them share."""
    num_ranks = engine.info.entropy_top_k
    for start in (0, 20, 40):
        want = logits(engine, 0, TOKENS[start:][:num_tokens])
        step = engine.step(0, 1, num_tokens, with_top=True)
        step.set_row(0, 0, TOKENS[start:][:num_tokens])
        gpu.copies.clear()
        engine.run(step)
        assert gpu.copies == {"host to device": 1, "device to host": 2}
        order = np.argsort(-want, axis=-1, kind="stable")[:, :num_ranks]
        log_probs = want - np.logaddexp.reduce(want, axis=-1, keepdims=True)
        np.testing.assert_array_equal(step.top_ids[0], order)
        same(step.top_logprobs[0], np.take_along_axis(log_probs, order, axis=-1))
        usual = run(engine, 0, TOKENS[start:][:num_tokens], with_logits=False)
        assert (usual.top_ids, usual.top_logprobs) == (None, None)
    assert len(gpu.executables) == (num_tokens <= LONGEST_ROW)


def test_an_engine_without_the_most_probable_tokens_runs_and_names_the_fix_where_they_are_asked_for(
    engine: Engine, simulated_engine: Path, tmp_path: Path
) -> None:
    onnx_model, library, profiles = deserialise((simulated_engine / "draft/model.plan").read_bytes())
    model = ir.from_proto(onnx.load_model_from_string(onnx_model))
    kept = [value for value in model.graph.outputs if value.name not in TOP_OUTPUTS]
    del model.graph.outputs[:]
    model.graph.outputs.extend(kept)
    (tmp_path / "older.plan").write_bytes(serialise(ir.to_proto(model).SerializeToString(), library, profiles))
    older = load(simulated_engine, folder=tmp_path, model="older.plan", top_tokens=False)
    for num_tokens in (5, 5, 50):
        same(logits(older, 0, TOKENS[:num_tokens]), logits(engine, 0, TOKENS[:num_tokens]))
    with pytest.raises(EngineError, match="rebuild it with fly-build"):
        older.step(0, 1, 5, with_top=True)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(("num_tokens", "first"), [(5, 4), (7, 3), (20, 19), (50, 49), (50, 40), (50, 10)])
def test_what_is_said_of_some_positions_is_what_is_said_of_them_among_all(
    engine: Engine, num_rows: int, num_tokens: int, first: int
) -> None:
    """Also where rows or positions are padded, and where long rows run one at a time."""
    for asked in (None, num_tokens - first, None, num_tokens - first, num_tokens - first):
        context = max(first + 1, num_tokens - 2)
        step = engine.step(0, num_rows, num_tokens, num_positions=asked, with_logits=True, with_top=True)
        for row in range(num_rows):
            tokens = TOKENS[row : row + num_tokens]
            step.set_row(row, 0, tokens[:context], tokens[context:], first=first if asked else 0)
        engine.run(step)
        found = {
            name: np.array([getattr(step, name)[row, step.at(row, first, num_tokens)] for row in range(num_rows)])
            for name in ("argmax", "entropy_topk", "argmax_logprob", "logits", "top_ids")
        }
        found["next_token"] = step.next_token.copy()
        if asked is None:
            every = found
        for name, numbers_ in found.items():
            same(numbers_, every[name])


def test_an_engine_that_cannot_be_asked_of_positions_speaks_of_all(
    engine: Engine, simulated_engine: Path, tmp_path: Path
) -> None:
    onnx_model, library, profiles = deserialise((simulated_engine / "draft/model.plan").read_bytes())
    model = ir.from_proto(onnx.load_model_from_string(onnx_model))
    find_positions(model)
    (tmp_path / "older.plan").write_bytes(serialise(ir.to_proto(model).SerializeToString(), library, profiles))
    older = load(simulated_engine, folder=tmp_path, model="older.plan", positions=False)
    for num_tokens in (5, 5, 50):
        step = older.step(0, 1, num_tokens, num_positions=1, with_logits=True)
        step.set_row(0, 0, TOKENS[:num_tokens], first=num_tokens - 1)
        older.run(step)
        assert step.num_positions == num_tokens
        same(step.logits[0], logits(engine, 0, TOKENS[:num_tokens]))


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_raw_logits_of_every_type_become_float32(dtype: Dtype) -> None:
    stored = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    values = np.array([[[0.0, -1.5, 3.25, 448.0], [-np.inf, np.nan, 2.0**-14, -448.0]]], stored)
    target = np.empty(values.shape, np.float32)
    widen(np.frombuffer(values.tobytes(), np.uint8), dtype, target)
    np.testing.assert_array_equal(target, values.astype(np.float32))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_caches_and_logits_are_read_right(
    dtype: Dtype, gpu: SimulatedCuda, simulated_engine: Path, tmp_path: Path
) -> None:
    onnx_type, atol = HALVES[dtype]
    onnx_model, library, profiles = deserialise((simulated_engine / "draft/model.plan").read_bytes())
    (tmp_path / "half.plan").write_bytes(serialise(in_half(onnx_model, onnx_type), library, profiles))
    half = load(simulated_engine, folder=tmp_path, model="half.plan", kv_cache_dtype=dtype)
    engine = load(simulated_engine)

    want = [logits(engine, 0, TOKENS[at : at + 20], slot=at // 20)[15:] for at in (0, 20, 40)]
    for at in (0, 20, 40):
        logits(half, 0, TOKENS[at : at + 15], slot=at // 20)
    half.swap_slots(0, 2, 15)
    half.copy_slot(1, 0, 15)
    step = half.step(0, 3, 5, with_logits=True)
    texts = (1, 1, 0)
    for row, text in enumerate(texts):
        step.set_row(row, 15, TOKENS[20 * text + 15 :][:5])
    for _ in range(2):
        half.run(step)
        for row, text in enumerate(texts):
            same(step.logits[row], want[text], atol)


def in_half(onnx_model: bytes, dtype: ir.DataType) -> bytes:
    """The same graph with caches and logits of another type around the same arithmetic."""
    model = ir.from_proto(onnx.load_model_from_string(onnx_model))
    graph = model.graph
    first = graph[0]
    for value in graph.inputs:
        if value.name.startswith("past_"):
            widened = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            for node, index in list(value.uses()):
                if node is not widened:
                    node.replace_input_with(index, widened.outputs[0])
            value.dtype = dtype
            graph.insert_before(first, widened)
    for index, value in enumerate(graph.outputs):
        if value.name == "logits" or value.name.startswith("present_"):
            narrowed = ir.node("Cast", [value], {"to": dtype})
            graph.append(narrowed)
            result = narrowed.outputs[0]
            result.name, value.name = value.name, f"{value.name}.float32"
            result.shape, result.dtype = value.shape, dtype
            graph.outputs[index] = result
    return ir.to_proto(model).SerializeToString()
