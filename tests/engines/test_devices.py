"""Which GPU an engine is on, on the simulated ones: the chosen one in every thread, the calling thread's current one
where none is chosen, and no other takes memory. A device that does not exist or would not be used is refused.
"""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, ConfigError, EngineError, LoadedEngines, SamplingParams
from fly_trt.engines import Engine, load_engine
from fly_trt.engines.cuda import DeviceBuffer, device_name
from fly_trt.manifest import read_manifest
from fly_trt.service.config import ServiceConfig
from simulated_cuda import Error, SimulatedCuda
from simulated_engine import TOKENS, logits, run, same

PROMPTS = [record["prompt"] for record in load_eval_prompts()[::60]]
GREEDY = SamplingParams(max_tokens=32)
SIZES = {"max_batch_size": 4, "max_seq_len": 300}


@pytest.fixture
def gpus(gpu: SimulatedCuda) -> SimulatedCuda:
    """Two of them."""
    gpu.num_devices = 2
    return gpu


@pytest.fixture(scope="module")
def wanted(demo_engine: Path) -> list[list[int]]:
    """What ONNX Runtime generates."""
    with LLM(demo_engine, **SIZES) as llm:
        return tokens(llm)


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def load(built: Path, device_id: int | None) -> Engine:
    manifest = read_manifest(built)
    return load_engine(built, manifest, manifest.draft, num_slots=3, device_id=device_id)


def in_new_thread(function: Callable[[], Any]) -> Any:
    """The result, from a thread that has device 0 as every new one, and is gone afterwards."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


def devices_with_memory(gpus: SimulatedCuda) -> set[int]:
    return {found.device for found in gpus.allocations.values() if found.is_device}


def test_an_llm_on_another_device_generates_onnxruntimes_tokens(
    gpus: SimulatedCuda, simulated_engine: Path, wanted: list[list[int]]
) -> None:
    """Loaded and warmed up in this thread, run and closed in another; draft and target, with graphs."""
    with LLM(simulated_engine, device_id=1, **SIZES) as llm:
        assert tokens(llm) == wanted
        assert gpus.calls["cudaGraphLaunch"] > 20
        assert devices_with_memory(gpus) == {1}
    assert gpus.used_devices == {1}
    assert not devices_with_memory(gpus)
    assert not gpus.executables
    assert not gpus.contexts


def test_two_llms_on_two_devices_run_at_the_same_time(
    gpus: SimulatedCuda, simulated_engine: Path, wanted: list[list[int]]
) -> None:
    with LLM(simulated_engine, device_id=1, **SIZES) as one, LLM(simulated_engine, device_id=0, **SIZES) as other:
        assert devices_with_memory(gpus) == {0, 1}
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(tokens, (one, other))) == [wanted, wanted]
        other.shutdown()
        assert devices_with_memory(gpus) == {1}
        assert tokens(one) == wanted
    assert not devices_with_memory(gpus)


def test_llms_that_take_turns_on_loaded_engines_generate_onnxruntimes_tokens(
    gpus: SimulatedCuda, simulated_engine: Path, wanted: list[list[int]]
) -> None:
    """Each in its own thread, with the graphs that another one's thread captured."""
    modes: tuple[dict[str, Any], ...] = ({}, {"method": "draft_model"}, {"adaptive_draft_length": False})
    with LoadedEngines(simulated_engine, max_batch_size=4, device_id=1) as engines:
        assert not devices_with_memory(gpus)
        llms = [LLM(engines, speculative_config=mode, max_seq_len=300, enable_prefix_caching=False) for mode in modes]
        for llm in (*llms, *llms):
            assert tokens(llm) == wanted
        for llm in llms:
            llm.shutdown()
        assert devices_with_memory(gpus) == {1}
    assert gpus.used_devices == {1}
    assert not devices_with_memory(gpus)
    assert not gpus.executables
    assert not gpus.contexts


def test_threads_of_the_cpu_have_no_effect_there(gpus: SimulatedCuda, simulated_engine: Path) -> None:
    message = r"^num_threads 2: has no effect, \w+ was built for tensorrt, which computes on the GPU: leave it out$"
    with pytest.raises(ConfigError, match=message):
        LLM(simulated_engine, num_threads=2)


def test_the_current_device_has_a_name(gpus: SimulatedCuda) -> None:
    gpus.cudaSetDevice(1)
    assert device_name() == "Simulated GPU 1"


@pytest.fixture
def far_engine(gpus: SimulatedCuda, simulated_engine: Path) -> Iterator[Engine]:
    """An engine on device 1 that a thread loaded which is gone. No other device may be touched."""
    engine = in_new_thread(lambda: load(simulated_engine, 1))
    yield engine
    assert gpus.used_devices == {1}
    assert devices_with_memory(gpus) <= {1}


def use(engine: Engine, what: str) -> None:
    if what == "run":
        run(engine, 0, TOKENS[:5])
    elif what == "step":
        engine.step(0, 1, 9)
    elif what == "copy_slot":
        engine.copy_slot(0, 1, 5)
    elif what == "swap_slots":
        engine.swap_slots(0, 1, 5)
    else:
        engine.close()


@pytest.mark.parametrize("what", ["run", "step", "copy_slot", "swap_slots", "close"])
def test_each_use_in_a_new_thread_chooses_the_device(gpus: SimulatedCuda, far_engine: Engine, what: str) -> None:
    in_new_thread(lambda: use(far_engine, what))


def test_a_step_runs_wherever_it_was_made(gpus: SimulatedCuda, far_engine: Engine) -> None:
    """With and without a graph, and in a thread that used the other device for something else before."""
    step = in_new_thread(lambda: far_engine.step(0, 1, 5, with_logits=True))
    found = []

    def go() -> None:
        step.set_row(0, 0, TOKENS[:5])
        far_engine.run(step)
        found.append(step.logits[0].copy())

    for _ in range(3):
        in_new_thread(go)
    assert len(gpus.executables) == 1
    gpus.cudaSetDevice(0)
    go()
    gpus.used_devices.discard(0)
    for other in found[1:]:
        same(other, found[0], atol=0)


def test_slots_are_moved_from_any_thread(gpus: SimulatedCuda, far_engine: Engine) -> None:
    whole = in_new_thread(lambda: logits(far_engine, 0, TOKENS))
    in_new_thread(lambda: far_engine.copy_slot(0, 1, 40))
    in_new_thread(lambda: far_engine.swap_slots(1, 2, 40))
    same(in_new_thread(lambda: logits(far_engine, 40, TOKENS[40:], slot=2)), whole[40:])


def test_an_engine_that_is_let_go_in_another_thread_leaves_its_device_alone(
    gpus: SimulatedCuda, simulated_engine: Path
) -> None:
    """A garbage collector runs in any thread."""
    engine = load(simulated_engine, 1)
    run(engine, 0, TOKENS[:5])
    gpus.cudaSetDevice(0)
    del engine
    assert gpus.cudaGetDevice()[1] == 0
    assert not gpus.allocations
    assert not gpus.streams


@pytest.mark.parametrize("current", [0, 1])
def test_without_a_device_it_is_the_one_that_is_current_where_the_llm_is_made(
    gpus: SimulatedCuda, simulated_engine: Path, wanted: list[list[int]], current: int
) -> None:
    gpus.cudaSetDevice(current)
    gpus.used_devices.clear()
    with LLM(simulated_engine, **SIZES) as llm:
        assert tokens(llm) == wanted
        assert devices_with_memory(gpus) == {current}
    assert gpus.used_devices == {current}


def test_the_chosen_device_is_the_one_that_must_fit(gpus: SimulatedCuda, simulated_engine: Path) -> None:
    gpus.compute_capabilities[0] = (7, 5)
    logits(in_new_thread(lambda: load(simulated_engine, 1)), 0, TOKENS[:5])
    with pytest.raises(EngineError, match=r"built for compute capability 8\.0 or later, this GPU has 7\.5"):
        load(simulated_engine, 0)


@pytest.mark.parametrize(
    ("num_devices", "device_id", "message"),
    [
        (2, 3, "device 3: this machine has 2 CUDA devices (0 to 1): give a device_id that it has"),
        (2, 2, "device 2: this machine has 2 CUDA devices (0 to 1): give a device_id that it has"),
        (1, 1, "device 1: this machine has 1 CUDA device (0): give a device_id that it has"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(
    gpu: SimulatedCuda, simulated_engine: Path, num_devices: int, device_id: int, message: str
) -> None:
    gpu.num_devices = num_devices
    with pytest.raises(ConfigError) as raised:
        LLM(simulated_engine, device_id=device_id)
    assert str(raised.value) == f"{message}, or change CUDA_VISIBLE_DEVICES"
    assert not gpu.allocations
    assert not gpu.used_devices


def test_a_chosen_device_where_there_is_none_is_refused_like_any(gpu: SimulatedCuda, simulated_engine: Path) -> None:
    gpu.num_devices = 0
    with pytest.raises(EngineError, match=r"no CUDA device \(cudaErrorNoDevice\): run on a machine with one"):
        LLM(simulated_engine, device_id=0)


def test_the_error_names_the_device_whose_memory_does_not_suffice(gpus: SimulatedCuda, simulated_engine: Path) -> None:
    gpus.free_bytes = 100_000
    with pytest.raises(EngineError, match=r"cudaErrorMemoryAllocation: see nvidia-smi .* free on device 1$"):
        load(simulated_engine, 1)


def test_the_error_names_the_device_that_cannot_be_used(gpus: SimulatedCuda, simulated_engine: Path) -> None:
    gpus.refused["cudaSetDevice"] = Error.cudaErrorInvalidDevice
    with pytest.raises(EngineError, match=r"cudaErrorInvalidDevice: see nvidia-smi .* on device 1$"):
        load(simulated_engine, 1)


def test_a_device_for_an_onnxruntime_engine_is_refused(demo_engine: Path) -> None:
    threads = threading.active_count()
    with pytest.raises(ConfigError) as raised:
        LLM(demo_engine, device_id=0)
    assert str(raised.value) == (
        f"device_id 0: has no effect, {demo_engine} was built for onnxruntime, which runs on the CPU: leave it out, or "
        "rebuild with --device cuda"
    )
    assert threading.active_count() <= threads


@pytest.mark.parametrize("value", [-1, True, "0", 1.0, np.int64(1)])
def test_a_device_is_a_whole_number(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^device_id .*: expected a whole number, at least 0$"):
        ServiceConfig(device_id=value)
    assert ServiceConfig(device_id=0).device_id == 0


CAPTURE = SimulatedCuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
DEFAULT = SimulatedCuda.cudaMemcpyKind.cudaMemcpyDefault


@pytest.fixture
def cuda() -> SimulatedCuda:
    """Two simulated devices with nothing on them."""
    cuda = SimulatedCuda()
    cuda.num_devices = 2
    return cuda


@pytest.mark.parametrize(
    "work",
    [
        lambda cuda, stream, memory: cuda.cudaMemcpyAsync(memory, memory, 8, DEFAULT, stream),
        lambda cuda, stream, memory: cuda.cudaMemcpy2DAsync(memory, 4, memory, 4, 4, 2, DEFAULT, stream),
        lambda cuda, stream, memory: cuda.cudaMemsetAsync(memory, 0, 8, stream),
        lambda cuda, stream, memory: cuda.cudaStreamBeginCapture(stream, CAPTURE),
        lambda cuda, stream, memory: cuda.cudaGraphLaunch(next(iter(cuda.executables)), stream),
    ],
    ids=["copy", "copy of rows", "memset", "capture", "launch"],
)
def test_the_simulation_refuses_work_for_a_device_that_is_not_current(
    cuda: SimulatedCuda, work: Callable[[SimulatedCuda, Any, int], tuple[Any, ...]]
) -> None:
    cuda.cudaSetDevice(1)
    _, stream = cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)
    _, memory = cuda.cudaMalloc(8)
    cuda.cudaStreamBeginCapture(stream, CAPTURE)
    _, graph = cuda.cudaStreamEndCapture(stream)
    cuda.cudaGraphInstantiate(graph, 0)
    (error, *_) = in_new_thread(lambda: work(cuda, stream, memory))
    assert error.name == "cudaErrorInvalidResourceHandle"
    assert cuda.faults[0].endswith("a stream of device 1 while device 0 is current")
    assert work(cuda, stream, memory) == (0,)


def test_the_simulation_keeps_device_and_last_error_for_each_thread(cuda: SimulatedCuda) -> None:
    assert cuda.cudaSetDevice(2) == (Error.cudaErrorInvalidDevice,)
    assert cuda.cudaSetDevice(1) == (0,)
    assert cuda.used_devices == {1}
    assert in_new_thread(lambda: (cuda.cudaGetDevice()[1], cuda.thread.last_error)) == (0, 0)
    assert (cuda.cudaGetDevice()[1], cuda.thread.last_error) == (1, Error.cudaErrorInvalidDevice)
    assert cuda.used_devices == {1}


@pytest.mark.parametrize("prepared", [True, False])
def test_the_simulation_refuses_an_engine_whose_device_is_not_current(
    gpus: SimulatedCuda, simulated_engine: Path, monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    engine = load(simulated_engine, 1)
    step = engine.step(0, 1, 70)
    if prepared:
        engine.run(step)
    monkeypatch.setattr("fly_trt.engines.cuda.use_device", lambda device: None)
    with pytest.raises(EngineError, match="InvalidResourceHandle" if prepared else "no execution context"):
        in_new_thread(lambda: engine.run(step))
    assert re.search("a (stream|TensorRT engine) of device 1 while device 0 is current$", gpus.faults.pop())
    engine.close()


@pytest.mark.parametrize("name", ["_scratch", "_logits", "_caches"])
def test_the_simulation_refuses_an_engine_with_another_devices_memory(
    gpus: SimulatedCuda, simulated_engine: Path, name: str
) -> None:
    engine = load(simulated_engine, 1)
    gpus.cudaSetDevice(0)
    own = getattr(engine, name)
    foreign = [DeviceBuffer(cache.num_bytes) for cache in own] if name == "_caches" else DeviceBuffer(own.num_bytes)
    setattr(engine, name, foreign)
    with pytest.raises(EngineError, match=r"execution: .*not on device 1|execution: .*of device memory at"):
        run(engine, 0, TOKENS[:5])
    assert len(gpus.faults) == 1
    gpus.faults.clear()
    engine.close()


def test_in_the_simulation_memory_belongs_to_a_device(cuda: SimulatedCuda) -> None:
    cuda.free_bytes = 100
    _, one = cuda.cudaMalloc(80)
    assert cuda.cudaMalloc(80)[0].name == "cudaErrorMemoryAllocation"
    cuda.cudaSetDevice(1)
    (_, other), (_, stream) = cuda.cudaMalloc(80), cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)
    assert devices_with_memory(cuda) == {0, 1}
    cuda.cudaMemsetAsync(other, 0, 8, stream)
    assert cuda.cudaStreamSynchronize(stream) == (0,)
    cuda.cudaMemsetAsync(one, 0, 8, stream)
    assert cuda.cudaStreamSynchronize(stream)[0].name == "cudaErrorIllegalAddress"
    assert cuda.cudaFree(one) == (0,)


def test_in_the_simulation_a_capture_is_spoiled_by_its_own_thread_only(cuda: SimulatedCuda) -> None:
    _, stream = cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)
    cuda.cudaStreamBeginCapture(stream, CAPTURE)
    assert in_new_thread(lambda: cuda.cudaMalloc(8))[0] == 0
    assert cuda.cudaStreamEndCapture(stream)[0] == 0
