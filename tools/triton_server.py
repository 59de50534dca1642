"""A real tritonserver on a model repository, and clients of it over gRPC and plain HTTP: for tests and measurements."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

LAUNCHER = Path(__file__).parent / "tritonserver"
START_SECONDS = 120
REQUEST_SECONDS = 60
SETTLE_SECONDS = 0.7
TYPES = {str: np.object_, bool: np.bool_, int: np.int32, float: np.float32}


class TritonServer:
    """A context manager: the server runs and its models are loaded, at the end it is stopped and must have ended well.

    `log` is what it printed. Arguments go to tritonserver.
    """

    def __init__(self, repository: Path, log: Path, *arguments: str) -> None:
        self.http_port, self.grpc_port, self.metrics_port = _free_ports(3)
        self.exit_code: int | None = None
        self.repository = repository
        self._log_path = log
        self._streams: list[GrpcStream] = []
        command = [LAUNCHER, "--model-repository", repository, "--exit-timeout-secs", "30", *arguments]
        for kind, port in (("http", self.http_port), ("grpc", self.grpc_port), ("metrics", self.metrics_port)):
            command += [f"--{kind}-address", "127.0.0.1", f"--{kind}-port", str(port)]
        environment = os.environ | {"PYTHON": sys.executable}
        with log.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._streams:  # of a test that failed: their threads would outlive it
            stream.disconnect()
        if self.exit_code is None:
            self.terminate()
            exit_code = self.wait()
            assert exit_code == 0 or error[0] is not None, self.log[-3000:]

    @property
    def log(self) -> str:
        return self._log_path.read_bytes().decode(errors="replace").replace("\0", "")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"tritonserver ended with {self._process.returncode}:\n{self.log}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=5)
                return
            time.sleep(0.1)
        raise TimeoutError(f"tritonserver was not ready after {START_SECONDS} s:\n{self.log[-3000:]}")

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once, however it stands with it."""
        self._process.kill()
        self.exit_code = self._process.wait()

    def wait(self) -> int:
        """Until the server has ended; its exit code."""
        self.exit_code = self._process.wait(START_SECONDS)
        return self.exit_code

    def post(self, path: str, body: dict[str, Any] | str | None = None) -> tuple[int, Any]:
        """HTTP status and JSON of the answer."""
        data = body if isinstance(body, str) else json.dumps(body or {})
        request = urllib.request.Request(f"{self.url}{path}", data.encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                text = response.read()
                return response.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def load(self, model: str) -> None:
        """Has a server with --model-control-mode explicit load the model, anew if it has it already."""
        status, answer = self.post(f"/v2/repository/models/{model}/load")
        assert status == 200, answer

    def unload(self, model: str) -> None:
        """The reverse. The model ends after its last request."""
        status, answer = self.post(f"/v2/repository/models/{model}/unload")
        assert status == 200, answer

    def wait_until_unloaded(self, model: str) -> None:
        wait_until(lambda: self._state(model) == "UNAVAILABLE", f"{model} is unloaded")

    def _state(self, model: str) -> str:
        """UNAVAILABLE also where the server knows no such model, or has never loaded it."""
        _, models = self.post("/v2/repository/index")
        return next((found.get("state", "UNAVAILABLE") for found in models if found["name"] == model), "UNAVAILABLE")

    def generate(self, model: str = "fly", **inputs: Any) -> dict[str, Any]:
        """POST /v2/models/MODEL/generate; the answer must be good."""
        status, answer = self.post(f"/v2/models/{model}/generate", inputs)
        assert status == 200, answer
        return answer

    def generate_stream(self, model: str = "fly", **inputs: Any) -> Iterator[dict[str, Any]]:
        """POST /v2/models/MODEL/generate_stream: one JSON object for each server-sent event."""
        body = json.dumps(inputs).encode()
        request = urllib.request.Request(f"{self.url}/v2/models/{model}/generate_stream", body, method="POST")
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            for line in response:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

    def metrics(self, name: str) -> dict[str, float]:
        """Samples of fly_trt's metric `name` by their labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        samples = {}
        for line in lines:
            if line.startswith(f"fly_trt:{name}{{"):
                labels, value = line.removeprefix(f"fly_trt:{name}").rsplit(" ", 1)
                samples[labels] = float(value)
        return samples

    def metric(self, name: str) -> float:
        """Sum of a metric's samples."""
        return sum(self.metrics(name).values())

    def num_aborts(self) -> float:
        """Requests that were ended before their last token."""
        ended = self.metrics("request_success_total")
        return sum(value for labels, value in ended.items() if 'finished_reason="abort"' in labels)

    def settle(self) -> None:
        """Until the server's metrics have stood still for longer than the model takes to bring news."""
        before = None
        while before != (now := (self.metric("generation_tokens_total"), self.num_aborts())):
            before = now
            time.sleep(SETTLE_SECONDS)

    def wait_for(self, name: str, value: float) -> None:
        """Until a metric has that value; the server gets a new one several times a second."""
        wait_until(lambda: self.metric(name) == value, f"{name} is {value}")

    def connect(self) -> triton.InferenceServerClient:
        """A gRPC connection for several streams, one after another."""
        return triton.InferenceServerClient(f"127.0.0.1:{self.grpc_port}")

    def stream(
        self,
        model: str = "fly",
        connection: triton.InferenceServerClient | None = None,
        *,
        wait: float = 0,
        **inputs: Any,
    ) -> "GrpcStream":
        """A request over a gRPC stream, on a connection of its own unless there is one. It waits in the queue for so
        many seconds at most; 0 is what the model allows."""
        closes = connection is None
        self._streams.append(GrpcStream(connection or self.connect(), model, inputs, wait=wait, closes=closes))
        return self._streams[-1]


class GrpcStream:
    """One request over a gRPC stream of its own. `text` and `token_ids` are what has come so far, `seconds` when, since
    the start."""

    def __init__(
        self, connection: triton.InferenceServerClient, model: str, inputs: dict[str, Any], *, wait: float, closes: bool
    ) -> None:
        self._started = time.perf_counter()
        self.seconds: list[float] = []
        self.responses: list[dict[str, np.ndarray]] = []
        self.error: InferenceServerException | None = None
        self._news: queue.Queue[None] = queue.Queue()
        self._done = threading.Event()
        self._is_closed = False
        self._client = connection
        self._closes_connection = closes
        self._client.start_stream(self._take)
        tensors = [_tensor(name, value) for name, value in inputs.items()]
        timeout = round(wait * 1e6) or None
        self._client.async_stream_infer(model, tensors, enable_empty_final_response=True, timeout=timeout)

    @property
    def text(self) -> str:
        return b"".join(response["text_output"][0] for response in self.responses).decode()

    @property
    def token_ids(self) -> list[int]:
        return [token for response in self.responses for token in response["output_ids"][0, 0].tolist()]

    def wait_for_response(self) -> None:
        self._news.get(timeout=REQUEST_SECONDS)

    def finish(self) -> Self:
        """Waits for the end of the request and closes the stream."""
        assert self._done.wait(REQUEST_SECONDS), "the stream has not ended"
        self._close()
        return self

    def disconnect(self) -> None:
        """What a client does that goes away."""
        self._close(cancel_requests=True)

    def _close(self, **how: bool) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._client.stop_stream(**how)
            if self._closes_connection:
                self._client.close()

    def _take(self, result: triton.InferResult | None, error: InferenceServerException | None) -> None:
        if result is None:
            self.error = error
            self._done.set()
        else:
            response = result.get_response()
            if response.outputs:
                self.seconds.append(time.perf_counter() - self._started)
                self.responses.append({output.name: result.as_numpy(output.name) for output in response.outputs})
            if response.parameters["triton_final_response"].bool_param:
                self._done.set()
        self._news.put(None)


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + REQUEST_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {REQUEST_SECONDS} s: {what}"
        time.sleep(0.02)


def _tensor(name: str, value: Any) -> triton.InferInput:
    """[1, d] of the type that the values have in Python; an array as it is."""
    array = value
    if not isinstance(value, np.ndarray):
        values = value if isinstance(value, list) else [value]
        array = np.array([values], TYPES[type(values[0])])
    tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
