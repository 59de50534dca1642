"""What a step of the TensorRT engine costs: one launch and one copy each way from its second run on, no memory, and as
many graphs and contexts as are allowed. Where no graph can be made, and after the engine is closed, nothing is left.
"""

import itertools
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fly_trt.engines import Engine
from fly_trt.engines.gpu import MAX_STEPS
from fly_trt.engines.tensorrt import MAX_BOUND_SHAPES
from simulated_cuda import Error, SimulatedCuda
from simulated_engine import TOKENS, load, logits, run, same


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_from_its_second_run_on_a_step_is_one_launch(engine: Engine, gpu: SimulatedCuda, num_tokens: int) -> None:
    whole = logits(engine, 0, TOKENS)
    step = engine.step(0, 2, num_tokens)
    for turn in range(3):
        gpu.calls.clear()
        gpu.copies.clear()
        for row, at in enumerate((turn, 10)):
            step.set_row(row, 0, TOKENS[at : at + num_tokens])
        engine.run(step)
        assert step.argmax[1].tolist() == run(engine, 0, TOKENS[10 : 10 + num_tokens], 2).argmax[0].tolist()
        if turn == 0:
            same(step.argmax[0], whole[:num_tokens].argmax(-1))
    before = gpu.calls.copy()
    engine.run(step)
    assert gpu.calls - before == Counter(cudaSetDevice=1, cudaGraphLaunch=1, cudaStreamSynchronize=1)


def test_the_first_run_computes_once(engine: Engine, gpu: SimulatedCuda) -> None:
    """What is recorded for the next ones does not run again."""
    gpu.copies.clear()
    run(engine, 0, TOKENS[:5], with_logits=False)
    assert gpu.copies == {"host to device": 1, "device to host": 1}


def test_the_run_that_prepares_a_shape_is_counted(engine: Engine) -> None:
    """It takes longer than those that follow, so nobody should learn from its time."""
    is_new = {5: True, 6: False, 1: True, 50: True, 60: False, 70: True}  # 6 tokens are padded to 8 like 5, 60 to 64
    for num_tokens, prepares in is_new.items():
        before = engine.num_preparations
        run(engine, 0, TOKENS[:num_tokens])
        assert engine.num_preparations == before + prepares
        run(engine, 0, TOKENS[:num_tokens])
        assert engine.num_preparations == before + prepares


def test_steps_of_a_prompt_have_no_graphs(engine: Engine, gpu: SimulatedCuda) -> None:
    for _ in range(3):
        for length in (30, 70):
            run(engine, 0, TOKENS[:length])
    assert not gpu.executables
    assert len(gpu.contexts) == 1


def test_a_steady_state_allocates_nothing(engine: Engine, gpu: SimulatedCuda) -> None:
    def work(shift: int) -> None:
        for slot in range(3):
            for num_tokens in (1, 2, 3, 5, 16, 24, 70):
                for with_logits in (False, True):
                    run(engine, shift, TOKENS[shift:][:num_tokens], slot, with_logits=with_logits)
        for num_tokens, with_top in itertools.product((1, 6, 30), (False, True)):
            step = engine.step(0, 3, num_tokens, with_top=with_top)
            for row in range(3):
                step.set_row(row, shift, TOKENS[row : row + num_tokens])
            engine.run(step)
        engine.copy_slot(0, 1, 9)
        engine.swap_slots(0, 2, 9)

    work(0)
    gpu.calls.clear()
    work(10)
    assert gpu.calls["cudaGraphLaunch"] > 20
    assert not {name for name in gpu.calls if "Malloc" in name or "Free" in name or "Create" in name}
    assert len(gpu.contexts) == len(gpu.executables) + 1


@pytest.mark.parametrize(
    "circumstance",
    [
        {"captures_of_engines": "are refused"},
        {"captures_of_engines": "are spoiled"},
        {"refused": {"cudaGraphInstantiate": Error.cudaErrorMemoryAllocation}},
    ],
    ids=["refused", "spoiled", "not instantiated"],
)
def test_where_nothing_can_be_captured_steps_run_without_a_graph(
    engine: Engine, gpu: SimulatedCuda, circumstance: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    whole = logits(engine, 0, TOKENS)
    usual = {name: getattr(gpu, name) for name in circumstance}
    vars(gpu).update(circumstance)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            same(logits(engine, 0, TOKENS[:5]), whole[:5])
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "steps of (1, 8) run without a CUDA graph"
    ]
    assert gpu.calls["cudaStreamBeginCapture"] == 1
    assert not gpu.graphs
    assert not gpu.executables
    vars(gpu).update(usual)
    for _ in range(2):
        same(logits(engine, 5, TOKENS[5:9]), whole[5:9])  # other shapes are tried anew
    assert len(gpu.executables) == 1


def test_the_shapes_that_were_used_longest_ago_are_given_up(gpu: SimulatedCuda, simulated_engine: Path) -> None:
    engine = load(simulated_engine, num_slots=6)
    whole = logits(engine, 0, TOKENS)
    shapes = [(slot, rows, length) for length in (2, 4, 8, 1) for rows in range(1, 7) for slot in range(7 - rows)][
        : MAX_BOUND_SHAPES + 3
    ]

    def check(slot: int, num_rows: int, num_tokens: int) -> None:
        step = engine.step(slot, num_rows, num_tokens, with_logits=True)
        for row in range(num_rows):
            step.set_row(row, 0, TOKENS[:num_tokens])
        engine.run(step)
        for row in range(num_rows):
            same(step.logits[row], whole[:num_tokens])

    for shape in shapes:
        check(*shape)
        check(*shapes[0])
    assert gpu.calls["cudaStreamBeginCapture"] == len(shapes)  # the first was never given up
    assert len(gpu.executables) == MAX_BOUND_SHAPES
    assert len(gpu.contexts) == MAX_BOUND_SHAPES + 1
    check(*shapes[-1])
    assert gpu.calls["cudaStreamBeginCapture"] == len(shapes)
    for _ in range(2):
        check(*shapes[1])
    assert gpu.calls["cudaStreamBeginCapture"] == len(shapes) + 1


def test_a_step_that_was_made_long_ago_still_reaches_the_cache(gpu: SimulatedCuda, simulated_engine: Path) -> None:
    engine = load(simulated_engine, num_slots=6)
    whole = logits(engine, 0, TOKENS)
    old = run(engine, 0, TOKENS[:4])
    for length in range(MAX_STEPS // 6 + 2):
        for slot in range(6):
            engine.step(slot, 1, length + 1)
    assert engine.step(0, 1, 4, with_logits=True) is not old
    old.set_row(0, 20, TOKENS[20:24])
    engine.run(old)
    same(old.logits[0], whole[20:24])


def test_closing_frees_what_was_allocated(gpu: SimulatedCuda, simulated_engine: Path) -> None:
    engine = load(simulated_engine)
    for num_tokens in (1, 5, 70):
        for _ in range(2):
            run(engine, 0, TOKENS[:num_tokens])
    assert gpu.allocations
    assert gpu.executables
    engine.close()
    assert not gpu.allocations
    assert not gpu.executables
    assert not gpu.contexts
    del engine
    assert not gpu.streams


def test_buffers_of_a_step_outlive_the_engine(gpu: SimulatedCuda, simulated_engine: Path) -> None:
    engine = load(simulated_engine)
    step = run(engine, 0, TOKENS[:5])
    found = step.argmax.copy(), step.entropy.copy()
    engine.close()
    for got, want in zip((step.argmax, step.entropy), found, strict=True):
        np.testing.assert_array_equal(got, want)


def compiled(gpu: SimulatedCuda, built: Path, lengths: list[int]) -> int:
    """Kernels that an engine compiles that runs steps of these lengths and is closed."""
    before = gpu.calls["compile kernels"]
    engine = load(built)
    for length in lengths:
        run(engine, 0, TOKENS[:length])
    engine.close()
    return gpu.calls["compile kernels"] - before


def test_compiled_kernels_are_shared_by_slots_and_kept_for_the_next_process(
    simulated_engine: Path, gpu: SimulatedCuda, kernels: Path
) -> None:
    engine = load(simulated_engine)
    for slot in range(3):
        run(engine, 0, TOKENS[:5], slot)
    assert gpu.calls["compile kernels"] == 1
    engine.close()
    (kept,) = kernels.iterdir()
    assert compiled(gpu, simulated_engine, [5, 1]) == 1
    assert compiled(gpu, simulated_engine, [5, 1]) == 0
    assert list(kernels.iterdir()) == [kept]


def test_kept_kernels_that_do_not_fit_are_replaced(
    simulated_engine: Path, gpu: SimulatedCuda, kernels: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(gpu, simulated_engine, [5])
    (kept,) = kernels.iterdir()
    content = kept.read_bytes()
    kept.write_bytes(b"of another version")
    with caplog.at_level(logging.INFO):
        assert compiled(gpu, simulated_engine, [5]) == 1
    assert "kernels of another version or GPU: they are compiled anew" in caplog.text
    assert kept.read_bytes() == content


def test_an_engine_that_cannot_keep_its_kernels_runs_all_the_same(
    simulated_engine: Path, gpu: SimulatedCuda, kernels: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        assert compiled(gpu, simulated_engine, [5]) == 1
    assert "the compiled kernels are not kept" in caplog.text
