"""The simulated GPU: its names and conventions are those of the real libraries, where they are installed, and what it
is there to notice it notices.
"""

import inspect
import re
from typing import Any

import pytest

import simulated_tensorrt
from simulated_cuda import SimulatedCuda
from tensorrt_calls import ONLY_RTX, signatures
from tensorrt_modules import MODULES, describe

FUNCTIONS = [
    name for name, value in vars(SimulatedCuda).items() if name.startswith("cuda") and inspect.isfunction(value)
]
ENUMS = [name for name, value in vars(SimulatedCuda).items() if name.startswith("cuda") and isinstance(value, type)]
CLASSES = [
    "ILogger",
    "Runtime",
    "ICudaEngine",
    "IExecutionContext",
    "IRuntimeConfig",
    "IRuntimeCache",
    "IPluginRegistry",
]
STRATEGIES = ["ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy"]
CAPTURE = SimulatedCuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
DEFAULT = SimulatedCuda.cudaMemcpyKind.cudaMemcpyDefault


@pytest.fixture
def cuda() -> SimulatedCuda:
    return SimulatedCuda()


def stream_of(cuda: SimulatedCuda) -> Any:
    return cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)[1]


def test_there_is_something_to_compare() -> None:
    assert len(FUNCTIONS) > 15
    assert {"cudaError_t", "cudaMemcpyKind"} < set(ENUMS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_and_return_what_cuda_python_says(name: str) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    simulated, real = inspect.signature(getattr(SimulatedCuda, name)), getattr(runtime, name)
    assert len(simulated.parameters) - 1 == len(inspect.signature(real).parameters)
    returned = real.__doc__.partition("Returns\n-------\n")[2].split("\n\n")[0]
    assert (1 if simulated.return_annotation is None else 2) == len(re.findall(r"^\S", returned, re.MULTILINE))


@pytest.mark.parametrize("name", ENUMS)
def test_constants_have_cuda_pythons_values(name: str) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    assert runtime.cudaStreamNonBlocking == SimulatedCuda.cudaStreamNonBlocking
    for member in getattr(SimulatedCuda, name):
        assert getattr(getattr(runtime, name), member.name).value == member.value


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_only_what_tensorrt_has(name: str, module: str) -> None:
    """The simulation serves for both libraries, so that what only TensorRT-RTX has is in it too."""
    classes = describe(module)["classes"]
    simulated = getattr(simulated_tensorrt, name)
    names = [name for name in vars(simulated) if not name.startswith("_")]
    assert names
    for attribute in names:
        if module == "tensorrt" and {name, f"{name}.{attribute}"} & ONLY_RTX:
            continue
        assert attribute in classes[name]
        if inspect.isfunction(getattr(simulated, attribute)):
            documented = [len(of.args) for of in signatures(classes[name][attribute]["doc"], attribute)]
            assert len(inspect.signature(getattr(simulated, attribute)).parameters) in documented


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_have_tensorrts_numbers(name: str, module: str) -> None:
    if module == "tensorrt" and name in ONLY_RTX:
        pytest.skip("only TensorRT-RTX has them")
    real = describe(module)["classes"][name]
    numbers = {member: found["number"] for member, found in real.items() if found["number"] is not None}
    assert numbers == {member.name: member.value for member in getattr(simulated_tensorrt, name)}


@pytest.mark.parametrize("module", MODULES)
def test_severities_and_the_registry_are_tensorrts(module: str) -> None:
    described = describe(module)
    for severity in simulated_tensorrt.ILogger.Severity:
        assert described["classes"]["ILogger.Severity"][severity.name]["number"] == severity
        assert severity.name in described["classes"]["ILogger"]
    assert {"get_plugin_registry"} <= described["others"].keys()
    if module == "tensorrt_rtx":
        trt = pytest.importorskip(module)
        assert isinstance(trt.get_plugin_registry(), trt.IPluginRegistry)


def test_copies_wait_for_a_synchronisation(cuda: SimulatedCuda) -> None:
    stream = stream_of(cuda)
    (_, host), (_, device) = cuda.cudaMallocHost(8), cuda.cudaMalloc(8)
    cuda.view(host, 8)[:] = 1
    assert cuda.cudaMemcpyAsync(device, host, 8, DEFAULT, stream) == (0,)
    cuda.view(host, 8)[:] = 2
    assert (cuda.view(device, 8) == 0xFF).all()
    cuda.cudaStreamSynchronize(int(stream))
    assert (cuda.view(device, 8) == 2).all()
    assert cuda.copies == {"host to device": 1}


def test_rows_are_copied_by_their_pitches(cuda: SimulatedCuda) -> None:
    stream, (_, source), (_, target) = stream_of(cuda), cuda.cudaMalloc(16), cuda.cudaMalloc(6)
    cuda.view(source, 16)[:] = range(16)
    cuda.cudaMemcpy2DAsync(target, 3, source, 5, 2, 2, DEFAULT, stream)
    cuda.cudaStreamSynchronize(stream)
    assert cuda.view(target, 6).tolist() == [0, 1, 0xFF, 5, 6, 0xFF]


@pytest.mark.parametrize(("address", "size"), [("freed", 8), ("live", 257), ("foreign", 1)])
def test_memory_that_is_not_there_is_a_fault(cuda: SimulatedCuda, address: str, size: int) -> None:
    stream, (_, live), (_, freed) = stream_of(cuda), cuda.cudaMalloc(256), cuda.cudaMalloc(256)
    cuda.cudaFree(freed)
    at = {"live": live, "freed": freed, "foreign": 16}[address]
    cuda.cudaMemsetAsync(at, 0, size, stream)
    assert cuda.cudaStreamSynchronize(stream)[0].name == "cudaErrorIllegalAddress"
    assert "lie in no live allocation" in cuda.faults[0]


def test_memory_is_freed_once_and_by_its_own_function(cuda: SimulatedCuda) -> None:
    (_, device), (_, host) = cuda.cudaMalloc(8), cuda.cudaMallocHost(8)
    assert cuda.cudaFree(host)[0].value == cuda.cudaFreeHost(device)[0].value == 1
    assert cuda.cudaFree(device) == (0,)
    assert cuda.cudaFree(device)[0].value == 1
    assert len(cuda.faults) == 3


def test_a_capture_records_and_a_launch_repeats(cuda: SimulatedCuda) -> None:
    stream, (_, device) = stream_of(cuda), cuda.cudaMalloc(8)
    cuda.cudaStreamBeginCapture(stream, CAPTURE)
    cuda.cudaMemsetAsync(device, 3, 8, stream)
    _, graph = cuda.cudaStreamEndCapture(stream)
    _, executable = cuda.cudaGraphInstantiate(graph, 0)
    cuda.cudaGraphDestroy(graph)
    cuda.cudaStreamSynchronize(stream)
    assert (cuda.view(device, 8) == 0xFF).all()
    for _ in range(2):
        cuda.view(device, 8)[:] = 9
        cuda.cudaGraphLaunch(executable, stream)
        cuda.cudaStreamSynchronize(stream)
        assert (cuda.view(device, 8) == 3).all()
    cuda.cudaGraphExecDestroy(executable)
    assert cuda.cudaGraphLaunch(executable, stream)[0].name == "cudaErrorInvalidResourceHandle"


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMallocHost", "cudaFree", "cudaStreamSynchronize"])
def test_what_a_capture_does_not_allow_spoils_it(cuda: SimulatedCuda, call: str) -> None:
    stream, (_, device) = stream_of(cuda), cuda.cudaMalloc(8)
    cuda.cudaStreamBeginCapture(stream, CAPTURE)
    argument = {"cudaFree": device, "cudaStreamSynchronize": stream}.get(call, 8)
    assert getattr(cuda, call)(argument)[0].name == "cudaErrorStreamCaptureUnsupported"
    assert cuda.cudaStreamEndCapture(stream)[0].name == "cudaErrorStreamCaptureInvalidated"
    assert cuda.cudaStreamSynchronize(stream) == (0,)
