"""Triton's module `triton_python_backend_utils` without a server, as far as fly_trt calls it.

The rules are those of python_backend's C++ sources (response_sender.cc, pb_cancel.cc and metric.cc of r24.10): a sender
is closed by its final flag, even when that response does not arrive, and the server deletes its response factory then.
What must not happen there ends up in the server's `faults`: a response after the final one, a request that is asked
about after its final response or while that is on its way, and a metric family that goes before its metrics.
"""

import enum
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fly_trt.serving.triton.tensors import INPUTS, OUTPUTS

MODULE = "triton_python_backend_utils"
MODEL_MODULES = ("fly_trt.serving.triton.model", "fly_trt.serving.triton.metrics")
"""What imports the module."""

FINAL = 1
ASKING_SECONDS = 0.0005  # a message to the server and back
WAIT_SECONDS = 60.0
DTYPES = {
    "TYPE_BOOL": np.bool_,
    "TYPE_FP32": np.float32,
    "TYPE_INT32": np.int32,
    "TYPE_STRING": np.object_,
    "TYPE_UINT64": np.uint64,
}


class TritonModelException(Exception): ...  # noqa: N818


class TritonError:
    INVALID_ARG, UNAVAILABLE, INTERNAL, CANCELLED = Code = enum.Enum(
        "Code", ["INVALID_ARG", "UNAVAILABLE", "INTERNAL", "CANCELLED"]
    )

    def __init__(self, message: str, code: Any = Code.INTERNAL) -> None:
        if not (isinstance(message, str) and isinstance(code, TritonError.Code)):
            raise TypeError(f"TritonError({message!r}, {code!r}): incompatible constructor arguments")
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> Any:
        return self._code


class Tensor:
    def __init__(self, name: str, array: npt.NDArray[Any]) -> None:
        if not name:
            raise TritonModelException("Tensor name cannot be an empty string.")
        if not isinstance(array, np.ndarray):
            raise TypeError(f"Tensor({name!r}, {type(array).__name__}): incompatible constructor arguments")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> npt.NDArray[Any]:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._output_tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._output_tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class ResponseSender:
    """`on_send` and `on_ask` are called with each response and each question, and may raise. `is_gone`: whether the
    client went away."""

    def __init__(self, server: "SimulatedTriton") -> None:
        self.responses: list[InferenceResponse] = []  # that arrived
        self.closed = threading.Event()
        self.is_gone = False
        self.on_send: Callable[[InferenceResponse, int], None] = lambda response, flags: None
        self.on_ask: Callable[[], None] = lambda: None
        self._server = server
        self._lock = threading.Lock()
        self._has_ended = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if flags not in (0, FINAL):
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if flags == 0 and response is None:
            raise TritonModelException("Inference Response object must be provided when the response flags is zero.")
        with self._lock:
            if self._has_ended:
                self._server.faults.append("sent after the final response")
                raise TritonModelException("Unable to send response. Response sender has been closed.")
            self._has_ended = flags == FINAL
        try:
            if response is not None:
                self.on_send(response, flags)
                self.responses.append(response)
        finally:
            if flags == FINAL:
                self.closed.set()

    def is_cancelled(self) -> bool:
        if self._has_ended:
            self._server.faults.append("asked after the final response")
        self.on_ask()
        time.sleep(ASKING_SECONDS)
        if self._has_ended:
            self._server.faults.append("asked while the final response was sent")
        return self.is_gone


class Request:
    """A request as a model gets it, and its client. `timeout`: microseconds. `inputs`: by name, each [1, d] to the
    model."""

    def __init__(
        self, server: "SimulatedTriton", *, timeout: int = 0, outputs: Sequence[str] = (), **inputs: Any
    ) -> None:
        self.sender = ResponseSender(server)
        self._inputs = [Tensor(name, _as_input(name, value)) for name, value in inputs.items()]
        self._outputs = list(outputs) or [spec.name for spec in OUTPUTS]
        self._timeout = timeout

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return "{}"

    def timeout(self) -> int:
        return self._timeout

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def get_response_sender(self) -> ResponseSender:
        return self.sender

    def wait(self) -> None:
        """Until the final response."""
        assert self.sender.closed.wait(WAIT_SECONDS), "no final response"

    @property
    def errors(self) -> list[tuple[Any, str]]:
        """Code and message of every error that arrived."""
        found = [response.error() for response in self.sender.responses]
        return [(error.code(), error.message()) for error in found if error is not None]

    @property
    def token_ids(self) -> list[int]:
        """That arrived, of a request for one sequence."""
        tensors = [tensor for response in self.sender.responses for tensor in response.output_tensors()]
        return [int(token) for t in tensors if t.name() == "output_ids" for token in t.as_numpy().reshape(-1)]


class Logger:
    INFO, WARNING, ERROR, VERBOSE = LogLevel = enum.Enum("LogLevel", ["INFO", "WARNING", "ERROR", "VERBOSE"])
    server: "SimulatedTriton"

    @classmethod
    def log(cls, message: str, level: Any = LogLevel.INFO) -> None:
        cls.server.log.append((level, message))


class Metric:
    def __init__(self, family: "MetricFamily", labels: Mapping[str, str]) -> None:
        self._family = weakref.ref(family)
        self._key = family.name, frozenset(labels.items())
        family.server.values.setdefault(self._key, 0.0)

    def increment(self, value: float) -> None:
        if value < 0:
            raise TritonModelException("Failed to increment metric value: a counter only grows")
        self._change(lambda before: before + value)

    def set(self, value: float) -> None:
        if self._living_family().kind is MetricFamily.COUNTER:
            raise TritonModelException("Failed to set metric value: not of a counter")
        self._change(lambda before: value)

    def value(self) -> float:
        return self._living_family().server.values[self._key]

    def _change(self, new: Callable[[float], float]) -> None:
        server = self._living_family().server
        server.on_metric(self._key[0])
        server.values[self._key] = new(server.values[self._key])

    def _living_family(self) -> "MetricFamily":
        if (family := self._family()) is None:
            raise TritonModelException("Invalid metric operation as the corresponding 'MetricFamily' has been deleted.")
        return family


class MetricFamily:
    COUNTER, GAUGE = MetricKind = enum.Enum("MetricKind", ["COUNTER", "GAUGE"])
    server: "SimulatedTriton"

    def __init__(self, name: str, description: str, kind: Any) -> None:
        self._metrics: weakref.WeakSet[Metric] = weakref.WeakSet()
        if not self.server.has_metrics:
            raise TritonModelException("Error when creating MetricFamily: metrics are not available")
        self.name, self.description, self.kind = name, description, kind

    def Metric(self, labels: Mapping[str, str]) -> Metric:
        metric = Metric(self, labels)
        self._metrics.add(metric)
        return metric

    def __del__(self) -> None:
        if len(self._metrics):
            self.server.faults.append(f"metric family {self.name} was deleted before its metrics")


class SimulatedTriton:
    """The server. `values`: of the metrics, by name and labels; they outlive a model instance. `on_metric` is called
    with a metric's name before it changes, and may raise."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.log: list[tuple[Any, str]] = []
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.has_metrics = True
        self.on_metric: Callable[[str], None] = lambda name: None

    def value(self, name: str) -> float:
        """The sum over all labels."""
        return sum(value for (found, _), value in self.values.items() if found == name)


def install(patch: pytest.MonkeyPatch) -> SimulatedTriton:
    """Makes this the process's only server, until the patch is undone. The caller takes MODEL_MODULES out of
    sys.modules, before and after."""
    server = SimulatedTriton()
    module = types.ModuleType(MODULE)
    parts = [InferenceResponse, Tensor, TritonError, TritonModelException]
    parts += [type(part.__name__, (part,), {"server": server}) for part in (Logger, MetricFamily)]
    vars(module).update({part.__name__: part for part in parts}, TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL)
    patch.setitem(sys.modules, MODULE, module)
    return server


def _as_input(name: str, value: Any) -> npt.NDArray[Any]:
    values = value if isinstance(value, list) else [value]
    data_type = next(spec.data_type for spec in INPUTS if spec.name == name)
    encoded = [item.encode() if isinstance(item, str) else item for item in values]
    return np.array([encoded], DTYPES[data_type])
