"""Which plans a GPU runs, and what the TensorRT engine is refused with where library, GPU, memory or files do not fit:
one line with what was found, what was expected and the fix, and no memory left behind.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fly_trt.engines import Engine
from fly_trt.errors import EngineError
from fly_trt.manifest import read_manifest
from simulated_cuda import SimulatedCuda
from simulated_engine import LONGEST, TOKENS, load, logits, run, same
from simulated_tensorrt import VERSION, deserialise, install, serialise


@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.0"])
def test_a_portable_plan_runs_on_later_gpus(gpu: SimulatedCuda, simulated_engine: Path, capability: str) -> None:
    gpu.compute_capability = tuple(map(int, capability.split(".")))
    logits(load(simulated_engine), 0, TOKENS[:5])


def test_full_tensorrt_runs_a_plan_for_this_gpu(
    monkeypatch: pytest.MonkeyPatch, simulated_engine: Path, tmp_path: Path
) -> None:
    gpu = install(monkeypatch, "tensorrt")
    gpu.compute_capability = (9, 0)
    onnx_model, _, profiles = deserialise((simulated_engine / "draft/model.plan").read_bytes())
    (tmp_path / "full.plan").write_bytes(serialise(onnx_model, "tensorrt", profiles))
    full = {"library": "tensorrt", "model": "full.plan"}
    engine = load(simulated_engine, folder=tmp_path, **full, compute_capability="9.0")
    whole = logits(engine, 0, TOKENS)
    for _ in range(2):
        same(logits(engine, 50, TOKENS[50:55]), whole[50:55])
    assert len(gpu.executables) == 1
    with pytest.raises(EngineError, match=r"built for compute capability 8\.0, this GPU has 9\.0: rebuild"):
        load(simulated_engine, folder=tmp_path, **full, compute_capability="8.0")
    assert gpu.faults == []


def remove(*names: str) -> Callable[[SimulatedCuda, pytest.MonkeyPatch], None]:
    def apply(gpu: SimulatedCuda, patch: pytest.MonkeyPatch) -> None:
        for name in names:
            patch.setitem(sys.modules, name, None)

    return apply


def change(**attributes: Any) -> Callable[[SimulatedCuda, pytest.MonkeyPatch], None]:
    return lambda gpu, patch: vars(gpu).update(attributes)


@pytest.mark.parametrize(
    ("circumstance", "record", "message"),
    [
        (
            change(),
            {"version": "1.6.0"},
            rf"draft/model\.plan: built with tensorrt_rtx 1\.6\.0, found {VERSION}: install tensorrt_rtx==1\.6\.0 or "
            "rebuild",
        ),
        (
            change(compute_capability=(7, 5)),
            {},
            r"built for compute capability 8\.0 or later, this GPU has 7\.5: rebuild with fly-build",
        ),
        (
            change(compute_capability=(9, 0)),
            {},
            r"draft/model\.plan: built with TensorRT-RTX, which is for RTX GPUs, and this one has compute capability "
            r"9\.0: rebuild on this machine with fly-build --tensorrt-library tensorrt \(pip install 'fly-trt",
        ),
        (remove("tensorrt_rtx"), {}, r"tensorrt_rtx: not installed: pip install 'fly-trt\[tensorrt-rtx\]'"),
        (change(), {"library": "tensorrt"}, r"tensorrt: not installed: pip install 'fly-trt\[tensorrt\]'"),
        (
            remove("cuda", "cuda.bindings", "cuda.bindings.runtime"),
            {},
            r"cuda\S*: not installed: pip install 'fly-trt\[tensorrt\]'",
        ),
        (change(num_devices=0), {}, r"no CUDA device \(cudaErrorNoDevice\): run on a machine with one, or build for"),
        (change(free_bytes=100_000), {}, "CUDA: cudaErrorMemoryAllocation: see nvidia-smi"),
        (change(), {"tensorrt": None}, r"draft/model\.plan: the manifest has no TensorRT record: rebuild"),
        (
            change(),
            {"plugin_library": "libfly_plugins.so"},
            r"libfly_plugins\.so: no such plugin library: build it with plugins/CMakeLists\.txt",
        ),
    ],
    ids=[
        "version",
        "older GPU",
        "Hopper",
        "no TensorRT-RTX",
        "no TensorRT",
        "no cuda-python",
        "no GPU",
        "too little memory",
        "no record",
        "no plugins",
    ],
)
def test_what_cannot_run_here_is_refused_with_the_fix(
    gpu: SimulatedCuda,
    monkeypatch: pytest.MonkeyPatch,
    simulated_engine: Path,
    circumstance: Callable[[SimulatedCuda, pytest.MonkeyPatch], None],
    record: dict[str, Any],
    message: str,
) -> None:
    circumstance(gpu, monkeypatch)
    with pytest.raises(EngineError, match=message) as raised:
        load(simulated_engine, **record)
    assert "\n" not in str(raised.value)
    del raised
    gc.collect()
    assert not gpu.allocations
    assert not gpu.streams


@pytest.mark.parametrize("kept", [100, 100_000])
def test_a_plan_that_does_not_load_is_named(
    gpu: SimulatedCuda, simulated_engine: Path, tmp_path: Path, kept: int
) -> None:
    plan = (simulated_engine / "draft/model.plan").read_bytes()
    (tmp_path / "short.plan").write_bytes(plan[:kept])
    with pytest.raises(EngineError, match=rf"short\.plan: tensorrt_rtx {VERSION} cannot load it: .*Serial") as raised:
        load(simulated_engine, folder=tmp_path, model="short.plan")
    assert "\n" not in str(raised.value)


def test_a_slot_that_does_not_exist_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match="slots 2 to 3: the engine has 3"):
        engine.step(2, 2, 1)


def test_a_step_that_is_longer_than_built_for_is_refused(engine: Engine, gpu: SimulatedCuda) -> None:
    with pytest.raises(EngineError, match=r"tensorrt_rtx: input_ids: .*\(1, 101\) lies outside of profile 2"):
        run(engine, 0, np.resize(TOKENS, LONGEST + 1))
    gpu.faults.clear()
    logits(engine, 0, TOKENS)


def test_a_step_that_would_write_beyond_its_slot_is_refused(engine: Engine, simulated_engine: Path) -> None:
    room = read_manifest(simulated_engine).draft.tensorrt.cache_tokens
    last = room - 8  # 5 tokens are padded to 8
    run(engine, last, TOKENS[:5])
    with pytest.raises(EngineError, match=f"{last + 1} tokens cached and a step of 8: a slot has room for {room}"):
        run(engine, last + 1, TOKENS[:5])


def test_work_that_fails_is_an_error_and_the_engine_can_still_be_closed(
    gpu: SimulatedCuda, simulated_engine: Path
) -> None:
    engine = load(simulated_engine)
    with pytest.raises(EngineError, match="CUDA: cudaErrorLaunchFailure"):
        run(engine, 0, [TOKENS[0], 10_000])
    with pytest.raises(EngineError, match="CUDA: cudaErrorLaunchFailure"):
        run(engine, 0, TOKENS[:2])
    assert gpu.faults.pop() == "cudaStreamSynchronize: a token that is not in the vocabulary"
    engine.close()
    gc.collect()
    assert not gpu.allocations
