"""Engines of several ranks on simulated GPUs, each rank a process: what they compute, which devices they take, and what
is refused. How they end is test_rank_failures.py's.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simulated_engine as simulation
from fly_trt import LLM, ConfigError, EngineError, LoadedEngines, SamplingParams, SpeculativeConfig
from fly_trt.engines import Engine
from fly_trt.manifest import read_manifest
from simulated_cuda import Error, SimulatedCuda
from simulated_engine import TOKENS
from simulated_nccl import SUMS
from simulated_ranks import BROKEN, rank_processes

GOLDEN = Path(__file__).parents[1] / "assets" / "golden" / "public.jsonl"
SIZES: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 300}
SECONDS = 60.0  # nothing here takes nearly as long


def golden(config: str, step: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    fitting = [row for row in rows if row["config"]["name"] == config and len(row["prompt_token_ids"]) < 130]
    return fitting[::step]


@pytest.mark.parametrize(
    ("folder", "config", "step"),
    [
        ("two_ranks", "fly", 20),
        ("two_ranks", "exact", 30),
        ("four_ranks", "fly_k10_w4", 20),
        ("draft_alone", "fly", 20),
    ],
)
def test_the_tokens_are_the_authors_over_any_number_of_ranks(
    folder: str, config: str, step: int, node: SimulatedCuda, request: pytest.FixtureRequest, is_long: bool
) -> None:
    rows = golden(config, 1 if is_long else step)
    settings = rows[0]["config"]
    speculative = SpeculativeConfig(
        method="draft_model",
        num_speculative_tokens=settings["num_speculative_tokens"],
        acceptance="fly" if settings["fly"] else "exact",
        **({"fly_window_size": settings["window"], "fly_entropy_threshold": 0.3} if settings["fly"] else {}),
    )
    prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
    with LLM(request.getfixturevalue(folder), speculative_config=speculative, **SIZES) as llm:
        num_others = llm.manifest.target.tensor_parallel_size - 1
        assert len(rank_processes()) == num_others > 0
        outputs = llm.generate(prompts, SamplingParams(max_tokens=160))
    assert [output.outputs[0].token_ids for output in outputs] == [row["token_ids"] for row in rows]
    assert node.calls["cudaGraphLaunch"] > 10
    assert rank_processes() == []


@pytest.fixture
def engines(node: SimulatedCuda, two_ranks: Path) -> Iterator[LoadedEngines]:
    with LoadedEngines(two_ranks, max_batch_size=3, devices=[5, 2]) as engines:
        yield engines


def test_ranks_do_whatever_an_engine_does(
    engines: LoadedEngines, two_ranks: Path, simulated_engine: Path, node: SimulatedCuda
) -> None:
    """The same steps, copies, swaps and clearings in any order, beside an engine of one rank."""
    rng = np.random.default_rng(0)
    whole, ranked = simulation.load(simulated_engine), engines.draft
    assert ranked.info == whole.info
    lengths = [0, 0, 0]
    for _ in range(60):
        slot, other = (int(number) for number in rng.permutation(3)[:2])
        kind = rng.choice(["step", "batch", "copy", "swap", "clear"], p=[0.5, 0.2, 0.1, 0.1, 0.1])
        if kind == "step":
            num_tokens = int(rng.integers(1, 60))
            cached = int(rng.integers(0, lengths[slot] + 1))
            found = [logits(engine, slot, [cached], num_tokens) for engine in (whole, ranked)]
            np.testing.assert_allclose(found[0], found[1], atol=1e-4)
            lengths[slot] = cached + num_tokens if cached + num_tokens < 200 else 0
        elif kind == "batch":
            num_tokens = int(rng.integers(1, 30))
            found = [logits(engine, 0, lengths, num_tokens) for engine in (whole, ranked)]
            np.testing.assert_allclose(found[0], found[1], atol=1e-4)
        elif kind == "clear":
            lengths[slot] //= 2
            for engine in (whole, ranked):
                engine.clear_slot(slot, lengths[slot])
        else:
            num_tokens = min(lengths[slot], lengths[other]) if kind == "swap" else lengths[slot]
            for engine in (whole, ranked):
                getattr(engine, f"{kind}_slot{'s' * (kind == 'swap')}")(slot, other, num_tokens)
            lengths = [min(length, num_tokens) if at in (slot, other) else length for at, length in enumerate(lengths)]
            lengths[other] = num_tokens
    assert ranked.trim(5) == whole.trim(5)
    assert ranked.num_preparations > 0
    whole.close()


def logits(engine: Engine, first: int, cached: list[int], num_tokens: int) -> np.ndarray:
    step = engine.step(first, len(cached), num_tokens, with_logits=True)
    for row, start in enumerate(cached):
        step.set_row(row, start, TOKENS[start % 40 :][:num_tokens])
    engine.run(step)
    assert step.logits is not None
    return step.logits.copy()


def test_each_rank_is_on_its_device(engines: LoadedEngines, node: SimulatedCuda) -> None:
    assert isinstance(engines.target.info.max_batch_size, int)
    assert node.used_devices == {5}
    devices = {allocation.device for allocation in node.allocations.values()}
    assert devices == {5, None}


def test_one_set_of_processes_serves_target_and_draft(engines: LoadedEngines) -> None:
    engines.target.info, engines.draft.info  # noqa: B018
    assert len(rank_processes()) == 1


def test_ranks_load_an_engine_only_while_no_llm_has_the_turn(engines: LoadedEngines) -> None:
    """Of two LLMs that share them, one may be in a step when the other is made."""
    loading = threading.Thread(target=lambda: engines.draft, daemon=True)
    with engines.turn.held():
        loading.start()
        deadline = time.monotonic() + SECONDS
        while not engines.turn.is_wanted:
            assert time.monotonic() < deadline, "it does not stand in line"
            time.sleep(0.01)
        assert rank_processes() == []
    loading.join(SECONDS)
    assert "draft" in engines.load_seconds


def test_engines_outlive_the_thread_that_loaded_them(node: SimulatedCuda, two_ranks: Path) -> None:
    made: list[LLM] = []
    loading = threading.Thread(target=lambda: made.append(LLM(two_ranks, **SIZES)))
    loading.start()
    loading.join()
    with made[0] as llm:
        assert len(llm.generate("Spell", SamplingParams(max_tokens=8))[0].outputs[0].token_ids) > 0


@pytest.mark.parametrize("device", [0, 1])
def test_a_step_that_one_rank_cannot_record_runs_without_a_graph_on_all(
    device: int,
    node: SimulatedCuda,
    two_ranks: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The simulation finds fault with sums that only some ranks have in a graph."""
    if device == 0:
        node.refused["cudaGraphInstantiate"] = Error.cudaErrorMemoryAllocation
    broken = {"device": 1, "call": "cudaGraphInstantiate", "after": 0, "error": "cudaErrorMemoryAllocation"}
    monkeypatch.setenv(BROKEN, json.dumps(broken) if device == 1 else "")
    (row,) = golden("exact", 60)[:1]
    with LLM(two_ranks, speculative_config={"method": None}, **SIZES) as llm:
        output = llm.generate({"prompt_token_ids": row["prompt_token_ids"]}, SamplingParams(max_tokens=20))[0]
    assert output.outputs[0].token_ids == row["token_ids"][:20]
    assert not node.calls["cudaGraphLaunch"]
    reason = "CUDA: cudaErrorMemoryAllocation" if device == 0 else "another rank could not record it"
    assert f"run without a CUDA graph: {reason}" in caplog.text


@pytest.mark.parametrize(
    "sums", ["none", pytest.param("896", id="logits alone"), pytest.param("384", id="all but logits")]
)
def test_a_library_that_does_not_sum_is_found_out(
    sums: str, node: SimulatedCuda, two_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits are summed themselves, so that they are the same on all ranks where only what is before is wrong."""
    monkeypatch.setenv(SUMS, sums)
    with pytest.raises(EngineError) as caught:
        LLM(two_ranks, **SIZES)
    message = str(caught.value)
    assert "\n" not in message
    what = "logits" if sums == "384" else "hidden states"
    assert message.startswith(
        f"{two_ranks}/target/model.rank0.plan: the ranks do not sum: {what} of one row differ by "
    )
    assert "between ranks 0 and 1" in message
    assert "tensorrt_rtx 1.7.1.116 leaves sums out" in message
    assert "rebuild with fly-build" in message
    assert rank_processes() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": [0]}, "devices [0]: demo was built for 2 ranks, a GPU each: give 2 of them, or rebuild with"),
        ({"devices": [0, 1, 2]}, "devices [0, 1, 2]: demo was built for 2 ranks, a GPU each: give 2 of them"),
        ({"device_id": 1}, "device_id 1: demo was built for 2 ranks, a GPU each: give devices=[0, 1] instead"),
        ({"device_id": 1, "devices": [0, 1]}, "device_id 1 and devices [0, 1]: give one of them"),
        ({"devices": [1, 1]}, "devices [1, 1]: a device twice: each rank needs one of its own"),
        ({"devices": []}, "devices []: expected a list of CUDA devices, such as [0, 1]"),
        ({"devices": "01"}, "devices '01': expected a list of CUDA devices"),
        ({"devices": [0, -1]}, "devices [0, -1]: expected a list of CUDA devices"),
        ({"devices": [0, 8]}, "device 8: this machine has 8 CUDA devices (0 to 7): give devices that it has"),
    ],
)
def test_devices_that_do_not_fit_are_refused_by_name(
    settings: dict[str, Any], message: str, node: SimulatedCuda, two_ranks: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(two_ranks, **settings)
    assert str(caught.value).startswith(message.replace("demo", read_manifest(two_ranks).name))
    assert rank_processes() == []


def test_an_engine_for_one_gpu_takes_one_device(node: SimulatedCuda, simulated_engine: Path) -> None:
    with pytest.raises(ConfigError, match=r"^devices \[0, 1\]: .* was built for one GPU: give 1 of them"):
        LLM(simulated_engine, devices=[0, 1])
    with LoadedEngines(simulated_engine, devices=[3]) as engines:
        assert engines.draft.info.max_batch_size == simulation.LIMITS["max_batch_size"]
    assert node.used_devices == {3}


def test_shared_engines_have_their_devices_already(engines: LoadedEngines) -> None:
    with pytest.raises(ConfigError, match=r"^devices \(?\[?0, 1.*: the engines are loaded already"):
        LLM(engines, devices=[0, 1], enable_prefix_caching=False)


@pytest.mark.parametrize(
    ("library", "version", "least"), [("tensorrt", "11.2.1.7", "11.3"), ("tensorrt_rtx", "1.7.0.1", "1.7.1")]
)
def test_libraries_that_may_leave_sums_out_are_refused(
    library: str, version: str, least: str, node: SimulatedCuda, two_ranks: Path
) -> None:
    manifest = read_manifest(two_ranks)
    plan = manifest.draft.tensorrt.model_copy(update={"library": library, "version": version})
    with LoadedEngines(two_ranks) as engines, pytest.raises(EngineError) as caught:
        engines._load("draft", manifest.draft.model_copy(update={"tensorrt": plan}))
    assert f"built with {library} {version}, which may leave out the sums" in str(caught.value)
    assert str(caught.value).endswith(f"rebuild with {library} {least} or later")
    assert rank_processes() == []


def test_a_missing_nccl_names_the_extra(node: SimulatedCuda, two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nccl", None)
    with pytest.raises(
        EngineError, match=r"^nccl.*: not installed, engines of several ranks need it: pip install 'fly"
    ):
        LLM(two_ranks)
    assert rank_processes() == []
