"""The ONNX Runtime engine on the demo pair: the contract's promises about the cache."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fly_trt.engines import Engine, load_engine
from fly_trt.engines.base import Step
from fly_trt.engines.onnxruntime import CACHE_BLOCK_TOKENS, MAX_BOUND_SHAPES
from fly_trt.errors import EngineError
from fly_trt.manifest import Manifest, read_manifest
from key_block_engine import key_block_engine

TOKENS = np.random.default_rng(0).integers(2, 880, 64)


@pytest.fixture(scope="module")
def manifest(demo_engine: Path) -> Manifest:
    return read_manifest(demo_engine)


@pytest.fixture(params=["demo", "key blocks"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    """The demo pair's target, and a decoder whose keys lie in blocks of tokens, in 16 bits."""
    if request.param == "demo":
        directory = request.getfixturevalue("demo_engine")
        manifest = request.getfixturevalue("manifest")
        return load_engine(directory, manifest, manifest.target, num_slots=3)
    return key_block_engine(tmp_path, request.getfixturevalue("cpu_library"), num_slots=3, cache="float16")


def run(engine: Engine, cached: int, tokens: np.ndarray, slot: int = 0) -> Step:
    step = engine.step(slot, 1, len(tokens), with_logits=True)
    step.set_row(0, cached, tokens)
    engine.run(step)
    return step


def logits(engine: Engine, cached: int, tokens: np.ndarray, slot: int = 0) -> np.ndarray:
    return run(engine, cached, tokens, slot).logits[0].copy()


def test_chunks_give_the_logits_of_the_whole(engine: Engine) -> None:
    whole = logits(engine, 0, TOKENS)
    parts = [logits(engine, at, TOKENS[at : at + 16]) for at in range(0, 64, 16)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-4)


def test_all_steps_share_one_buffer_of_logits(engine: Engine) -> None:
    """Steps of any shape, in any order: each gives its own logits, in memory that the largest of them needs."""
    whole = logits(engine, 0, TOKENS)
    buffers = set()
    for num_tokens in (64, 3, 17, 1, 40, 64):
        for slot in range(3):
            step = run(engine, 0, TOKENS[:num_tokens], slot)
            np.testing.assert_allclose(step.logits[0], whole[:num_tokens], atol=1e-4)
            buffers.add(step.logits.__array_interface__["data"][0])
    assert len(buffers) == 1


def test_logits_are_right_while_their_buffer_grows(demo_engine: Path, manifest: Manifest) -> None:
    engine = load_engine(demo_engine, manifest, manifest.target, num_slots=3)
    whole = logits(engine, 0, TOKENS)
    fresh = load_engine(demo_engine, manifest, manifest.target, num_slots=3)
    for num_tokens in (1, 2, 5, 9, 33, 2, 64, 5):
        np.testing.assert_allclose(logits(fresh, 0, TOKENS[:num_tokens]), whole[:num_tokens], atol=1e-4)


def test_a_rewind_forgets_what_came_after(engine: Engine) -> None:
    logits(engine, 0, TOKENS[:20])
    logits(engine, 20, TOKENS[40:60])
    np.testing.assert_allclose(logits(engine, 20, TOKENS[20:40]), logits(engine, 0, TOKENS)[20:40], atol=1e-4)


def test_slots_are_independent(engine: Engine) -> None:
    alone = logits(engine, 0, TOKENS[:20], slot=1)
    logits(engine, 0, TOKENS[20:40], slot=0)
    logits(engine, 0, TOKENS[40:60], slot=2)
    np.testing.assert_allclose(
        logits(engine, 20, TOKENS[20:30], slot=1), logits(engine, 0, TOKENS[:30], slot=0)[20:], atol=1e-4
    )
    np.testing.assert_allclose(logits(engine, 0, TOKENS[:20], slot=1), alone, atol=0)


def test_rows_of_a_batch_give_what_they_give_alone(engine: Engine) -> None:
    alone = [logits(engine, 0, TOKENS[at : at + 8], slot=at // 8) for at in (0, 8, 16)]
    step = engine.step(0, 3, 8, with_logits=True)
    for row in range(3):
        step.set_row(row, 0, TOKENS[8 * row : 8 * row + 8])
    engine.run(step)
    np.testing.assert_allclose(step.logits, np.stack(alone), atol=1e-4)


def test_the_cache_grows_in_blocks_and_keeps_what_it_holds(engine: Engine) -> None:
    long = np.resize(TOKENS, 3 * CACHE_BLOCK_TOKENS)
    whole = logits(engine, 0, long)
    fresh = [logits(engine, at, long[at : at + 64], slot=1) for at in range(0, len(long), 64)]
    np.testing.assert_allclose(np.concatenate(fresh), whole, atol=1e-3)


def test_growing_for_one_slot_keeps_what_the_others_hold(engine: Engine) -> None:
    want = [logits(engine, 0, TOKENS[at : at + 30], slot=at // 10) for at in (0, 10)]
    logits(engine, 0, np.resize(TOKENS, 2 * CACHE_BLOCK_TOKENS), slot=2)
    assert engine.capacity == 2 * CACHE_BLOCK_TOKENS
    for slot, at in enumerate((0, 10)):
        got = logits(engine, 20, TOKENS[at + 20 : at + 30], slot=slot)
        np.testing.assert_allclose(got, want[slot][20:], atol=1e-4)


def test_a_slot_that_was_never_used_is_right_after_the_cache_grew(engine: Engine) -> None:
    want = logits(engine, 0, TOKENS[:20])
    logits(engine, 0, np.resize(TOKENS, 2 * CACHE_BLOCK_TOKENS))
    np.testing.assert_allclose(logits(engine, 0, TOKENS[:20], slot=1), want, atol=1e-4)


@pytest.mark.parametrize("num_made", [0, 1, 2, 5])
def test_where_memory_is_short_the_cache_grows_once_there_is_some(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, num_made: int
) -> None:
    """Of the arrays of a larger cache, so many are made before memory is short."""
    want = logits(engine, 0, TOKENS)
    fresh = [logits(engine, 0, np.resize(TOKENS, n), slot=1)[-1] for n in (2 * CACHE_BLOCK_TOKENS,)]
    engine.trim(0)
    zeros, made = np.zeros, []

    def short(shape: Any, *arguments: Any) -> Any:
        if np.ndim(shape) and len(shape) >= 4:
            made.append(shape)
            if len(made) > num_made:
                raise MemoryError
        return zeros(shape, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("fly_trt.engines.onnxruntime.np.zeros", short)
        with pytest.raises(MemoryError):
            run(engine, 0, np.resize(TOKENS, 3 * CACHE_BLOCK_TOKENS), slot=1)
    np.testing.assert_allclose(logits(engine, 0, TOKENS), want, atol=1e-4)
    again = logits(engine, 0, np.resize(TOKENS, 2 * CACHE_BLOCK_TOKENS), slot=1)[-1]
    np.testing.assert_allclose(again, fresh[0], atol=1e-4)


def test_a_cleared_slot_keeps_what_lies_before(engine: Engine) -> None:
    want = logits(engine, 0, TOKENS[:30], slot=1)
    run(engine, 0, TOKENS[:30], slot=0)
    engine.clear_slot(1, 20)
    np.testing.assert_allclose(logits(engine, 20, TOKENS[20:30], slot=1), want[20:], atol=1e-4)
    np.testing.assert_allclose(logits(engine, 20, TOKENS[20:30], slot=0), want[20:], atol=1e-4)


def test_trimming_gives_back_the_room_of_long_sequences(demo_engine: Path, manifest: Manifest) -> None:
    engine = load_engine(demo_engine, manifest, manifest.target, num_slots=2)
    want = logits(engine, 0, TOKENS)
    small = engine.capacity
    logits(engine, 0, np.resize(TOKENS, 6 * CACHE_BLOCK_TOKENS), slot=1)
    assert engine.capacity >= 6 * CACHE_BLOCK_TOKENS
    assert engine.trim(len(TOKENS)) == engine.capacity == small == CACHE_BLOCK_TOKENS
    np.testing.assert_array_equal(logits(engine, 0, TOKENS), want)
    assert engine.capacity == CACHE_BLOCK_TOKENS


def test_trimming_keeps_what_is_still_needed(engine: Engine) -> None:
    whole = logits(engine, 0, TOKENS)
    logits(engine, 0, TOKENS[:40], slot=1)
    logits(engine, 0, np.resize(TOKENS, 6 * CACHE_BLOCK_TOKENS), slot=0)
    engine.trim(40)
    np.testing.assert_allclose(logits(engine, 40, TOKENS[40:], slot=1), whole[40:], atol=1e-4)
    held = engine.trim(40)
    np.testing.assert_allclose(logits(engine, 50, TOKENS[50:], slot=0), whole[50:], atol=1e-4)
    assert held == CACHE_BLOCK_TOKENS


def test_a_little_too_much_room_is_not_given_back(engine: Engine) -> None:
    logits(engine, 0, np.resize(TOKENS, 3 * CACHE_BLOCK_TOKENS))
    assert engine.trim(5) == engine.capacity == 3 * CACHE_BLOCK_TOKENS


def test_a_copied_slot_goes_on_as_its_source_does(engine: Engine) -> None:
    whole = logits(engine, 0, TOKENS)
    logits(engine, 0, TOKENS[:50][::-1], slot=2)
    engine.copy_slot(0, 2, 40)
    np.testing.assert_array_equal(logits(engine, 40, TOKENS[40:], slot=2), logits(engine, 40, TOKENS[40:], slot=0))
    np.testing.assert_allclose(logits(engine, 40, TOKENS[40:], slot=2), whole[40:], atol=1e-4)


def test_what_was_copied_or_swapped_survives_growth(engine: Engine) -> None:
    whole = logits(engine, 0, TOKENS)
    engine.copy_slot(0, 1, 40)
    engine.swap_slots(1, 2, 40)
    logits(engine, 0, np.resize(TOKENS, 2 * CACHE_BLOCK_TOKENS))
    np.testing.assert_allclose(logits(engine, 40, TOKENS[40:], slot=2), whole[40:], atol=1e-4)


def test_swapped_slots_go_on_in_each_others_place(engine: Engine) -> None:
    texts = TOKENS[:30], TOKENS[30:60]
    for slot, text in zip((0, 2), texts, strict=True):
        logits(engine, 0, text[:20], slot=slot)
    want = [logits(engine, 20, text[20:], slot=slot) for slot, text in zip((0, 2), texts, strict=True)]
    engine.swap_slots(0, 2, 20)
    for slot, text, expected in zip((2, 0), texts, want, strict=True):
        np.testing.assert_array_equal(logits(engine, 20, text[20:], slot=slot), expected)


def test_a_slot_is_swapped_with_one_that_was_never_used(engine: Engine) -> None:
    logits(engine, 0, TOKENS[:20])
    want = logits(engine, 20, TOKENS[20:30])
    engine.swap_slots(0, 1, 20)
    np.testing.assert_array_equal(logits(engine, 20, TOKENS[20:30], slot=1), want)


def test_a_step_that_was_made_long_ago_still_reaches_the_cache(engine: Engine) -> None:
    old = engine.step(0, 1, 4, with_logits=True)
    old.set_row(0, 0, TOKENS[:4])
    engine.run(old)
    for length in range(5, 5 + MAX_BOUND_SHAPES + 1):
        engine.step(0, 1, length)
    logits(engine, 0, np.resize(TOKENS, 2 * CACHE_BLOCK_TOKENS))
    logits(engine, 0, TOKENS[:20])
    old.set_row(0, 20, TOKENS[20:24])
    engine.run(old)
    np.testing.assert_allclose(old.logits[0], logits(engine, 0, TOKENS[:24])[20:], atol=1e-4)


def test_the_cache_is_updated_in_place(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    for at in range(0, 64, 16):
        run(engine, at, TOKENS[at : at + 16])
    run(engine, 0, np.resize(TOKENS, CACHE_BLOCK_TOKENS + 1))
    captured = capfd.readouterr()
    assert "in-place" not in captured.out + captured.err


def test_logits_leave_the_engine_only_when_asked_for(engine: Engine) -> None:
    step = engine.step(0, 1, 4)
    step.set_row(0, 0, TOKENS[:4])
    engine.run(step)
    assert step.logits is None
    assert step.argmax[0].tolist() == logits(engine, 0, TOKENS[:4]).argmax(-1).tolist()


def test_the_most_probable_tokens_leave_the_engine_only_when_asked_for(engine: Engine) -> None:
    want = logits(engine, 0, TOKENS[:4])
    steps = []
    for asked in ({}, {"with_top": True}, {"with_top": True, "with_logits": True}, {}):
        step = engine.step(0, 1, 4, **asked)
        step.set_row(0, 0, TOKENS[:4])
        engine.run(step)
        steps.append(step)
        if not asked:
            assert (step.top_ids, step.top_logprobs) == (None, None)
            continue
        order = np.argsort(-want, axis=-1, kind="stable")[:, : engine.info.entropy_top_k]
        np.testing.assert_array_equal(step.top_ids[0], order)
        log_probs = want - np.logaddexp.reduce(want, axis=-1, keepdims=True)
        np.testing.assert_allclose(step.top_logprobs[0], np.take_along_axis(log_probs, order, axis=-1), atol=1e-4)
        np.testing.assert_array_equal(step.top_logprobs[0, :, 0], step.argmax_logprob[0])
    usual, with_top, with_both, _ = (len(step.binding[1].get_outputs()) for step in steps)
    assert (with_top - usual, with_both - usual) == (2, 3)


def test_an_engine_without_the_most_probable_tokens_names_the_fix(demo_engine: Path, manifest: Manifest) -> None:
    older = manifest.model_copy(update={"head": manifest.head.model_copy(update={"top_tokens": False})})
    engine = load_engine(demo_engine, older, older.target, num_slots=1)
    assert not engine.info.has_top_tokens
    with pytest.raises(EngineError, match=r"most probable tokens, but .* rebuild it with fly-build"):
        engine.step(0, 1, 4, with_top=True)


def test_the_draft_of_a_row_is_verified_in_the_engine(engine: Engine) -> None:
    prompt = TOKENS[:10]
    greedy = []
    for _ in range(6):
        context = np.concatenate([prompt, greedy]).astype(np.int64)
        greedy.append(int(run(engine, 0, context).next_token[0]))
    draft = np.array(greedy[:5])
    step = engine.step(0, 1, 15)
    step.set_row(0, 0, prompt, draft)
    engine.run(step)
    assert (int(step.num_accepted[0]), int(step.next_token[0])) == (5, greedy[5])
    draft[2] += 1
    step.set_row(0, 0, prompt, draft)
    engine.run(step)
    assert (int(step.num_accepted[0]), int(step.next_token[0])) == (2, greedy[2])


def test_a_slot_that_does_not_exist_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match="slots 2 to 3: the engine has 3"):
        engine.step(2, 2, 1)


def test_more_slots_than_built_for_name_the_fix(demo_engine: Path, manifest: Manifest) -> None:
    with pytest.raises(EngineError, match="built for max_batch_size 8, asked for 9: rebuild with --max-batch-size 9"):
        load_engine(demo_engine, manifest, manifest.target, num_slots=9)


def test_a_file_that_is_no_graph_is_named(demo_engine: Path, manifest: Manifest, tmp_path: Path) -> None:
    shutil.copytree(demo_engine, tmp_path / "engine")
    (tmp_path / "engine" / "target" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"model\.onnx: ONNX Runtime .* cannot load it") as raised:
        load_engine(tmp_path / "engine", manifest, manifest.target, num_slots=1)
    assert "\n" not in str(raised.value)


def test_another_backends_engine_is_refused(demo_engine: Path, manifest: Manifest) -> None:
    other = manifest.model_copy(update={"backend": "openvino"})
    with pytest.raises(EngineError, match="built for backend 'openvino', this version runs onnxruntime"):
        load_engine(demo_engine, other, other.target, num_slots=1)


def test_a_step_is_a_plain_record_of_the_contract() -> None:
    names = [f.name for f in dataclasses.fields(Step)]
    assert names[:8] == [
        "first_slot",
        "input_ids",
        "write_indices",
        "num_context",
        "num_draft",
        "entropy_threshold",
        "use_full_entropy",
        "window",
    ]
