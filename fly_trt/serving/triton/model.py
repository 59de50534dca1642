"""The model that Triton's python backend runs: a thin adapter between its requests and AsyncLLM.

Triton starts one process for each instance and hands it one of these. `execute` only reads the requests; an event loop
of its own serves them, so requests of all clients share the runtime's in-flight batch. It knows Triton's python
backend API and nothing of tokens or engines.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from fly_trt.async_llm import AsyncLLM
from fly_trt.errors import Fault, FlyError, one_line
from fly_trt.serving.triton.configuration import ModelConfiguration
from fly_trt.serving.triton.metrics import TritonMetrics
from fly_trt.serving.triton.request import ClientRequest, ResponseWriter, read_request

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # how soon a client that went away is noticed
METRICS_SECONDS = 0.2
FINISH_SECONDS = 10.0
STOPPED = "the model was unloaded before this request was finished: send it again"
CANCELLED = "cancelled by the client"
SERVER_PROGRAM = "tritonserver"
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
# By name: where the server only asks for the model's configuration, there is no TritonError.
CODES = {Fault.CALLER: "INVALID_ARG", Fault.LOAD: "UNAVAILABLE", Fault.ENGINE: "INTERNAL"}


class ResponseStream:
    """The way back to one client. After the last response the server must not be asked about the request any more, so
    that one thread may send while another asks."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._wanted = frozenset(request.requested_output_names())
        self._lock = threading.Lock()
        self._is_open = True

    def send(self, tensors: dict[str, Any], *, is_last: bool) -> None:
        wanted = [pb_utils.Tensor(name, array) for name, array in tensors.items() if name in self._wanted]
        self._send(pb_utils.InferenceResponse(output_tensors=wanted), is_last=is_last)

    def fail(self, message: str, code: Any) -> None:
        try:
            self._send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)), is_last=True)
        except Exception:  # nobody is left to be told
            logger.exception("an error could not be sent: %s", message)

    def is_cancelled(self) -> bool:
        with self._lock:
            return bool(self._is_open and self._sender.is_cancelled())

    def _send(self, response: Any, *, is_last: bool) -> None:
        with self._lock:
            if self._is_open:
                self._is_open = not is_last
                self._sender.send(response, flags=FINAL if is_last else 0)


@dataclass(slots=True, eq=False)
class _Served:
    """A request in the runtime."""

    request_id: str
    stream: ResponseStream
    task: asyncio.Task[None] | None = None
    reason: str = CANCELLED  # why it is ended early


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the engines. Raises TritonModelException with the runtime's one line."""
        _log_to_triton()
        self._name, version = args["model_name"], args["model_version"]
        try:
            self._configuration = ModelConfiguration.read(
                json.loads(args["model_config"]),
                Path(args["model_repository"]) / version,
                args["model_instance_kind"],
                int(args["model_instance_device_id"]),
                args["model_instance_name"],
            )
            self._llm = AsyncLLM(
                self._configuration.engine_dir,
                speculative_config=self._configuration.speculative_config,
                **self._configuration.settings,
            )
        except FlyError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        logger.info("%s: %s", args["model_instance_name"], self._llm.setting)
        self._llm.warm_up_grammars()
        labels = {"model": self._name, "version": version, "instance": args["model_instance_name"]}
        self._metrics: TritonMetrics | None = None
        try:
            self._metrics = TritonMetrics(self._llm.registry, labels)
        except pb_utils.TritonModelException as error:
            logger.warning("no metrics: %s", error)
        self._served: dict[str, _Served] = {}
        self._num_requests = 0
        self._is_stopping = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._threads = [
            threading.Thread(target=self._loop.run_forever, name="fly-trt responses", daemon=True),
            threading.Thread(target=self._watch, name="fly-trt watch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Takes the requests over; their responses come as the runtime makes them."""
        for request in requests:
            stream = ResponseStream(request)
            try:
                asked = self._read(request)
            except FlyError as error:
                stream.fail(str(error), _code(error))
                continue
            except Exception as error:
                logger.exception("a request could not be read")
                stream.fail(f"the request could not be read: {one_line(error)}", pb_utils.TritonError.INTERNAL)
                continue
            self._num_requests += 1
            served = _Served(str(self._num_requests), stream)
            serving = self._serve(asked, served, self._queue_timeout(request))
            asyncio.run_coroutine_threadsafe(serving, self._loop)

    def is_ready(self) -> bool:
        """Asked by servers from 26.03 on: False once the engine cannot run any more."""
        try:
            self._llm.check_health()
        except FlyError:
            return False
        return True

    def finalize(self) -> None:
        """Ends what is still served with an error and releases the engines."""
        self._is_stopping.set()
        self._threads[1].join()
        try:
            self._llm.shutdown()  # every open request gets its last output
        except FlyError:  # those of an engine that does not answer any more are ended below
            logger.exception("the engine could not be released")
        asyncio.run_coroutine_threadsafe(self._finish_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._threads[0].join()
        self._loop.close()
        if self._metrics is not None:
            self._update_metrics()
            self._metrics.close()

    def _read(self, request: Any) -> ClientRequest:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        excludes_input = self._configuration.exclude_input_in_output
        return read_request(tensors, request.parameters(), exclude_input_in_output=excludes_input)

    def _queue_timeout(self, request: Any) -> float | None:
        limits = [self._configuration.queue_timeout]
        if self._configuration.allows_own_timeout:
            limits.append(request.timeout() / 1e6)
        return min((seconds for seconds in limits if seconds), default=None)

    async def _serve(self, asked: ClientRequest, served: _Served, queue_timeout: float | None) -> None:
        stream = served.stream
        served.task = asyncio.current_task()
        self._served[served.request_id] = served
        try:
            writer = ResponseWriter(asked, self._llm.tokenizer)
            outputs = self._llm.generate(asked.prompt, asked.params, served.request_id, queue_timeout=queue_timeout)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if any(completion.finish_reason == "abort" for completion in output.outputs):
                        stream.fail(STOPPED, pb_utils.TritonError.UNAVAILABLE)
                    else:
                        stream.send(writer.tensors(output), is_last=output.finished)
        except asyncio.CancelledError:
            codes = pb_utils.TritonError
            stream.fail(served.reason, codes.CANCELLED if served.reason == CANCELLED else codes.UNAVAILABLE)
        except FlyError as error:
            if self._is_stopping.is_set():
                stream.fail(STOPPED, pb_utils.TritonError.UNAVAILABLE)
            else:
                stream.fail(str(error), _code(error))
        except Exception as error:
            logger.exception("a request failed")
            stream.fail(f"the request failed: {one_line(error)}", pb_utils.TritonError.INTERNAL)
        finally:
            del self._served[served.request_id]

    async def _finish_tasks(self) -> None:
        tasks = {served.task for served in self._served.values() if served.task is not None}
        if not tasks:
            return
        _, stuck = await asyncio.wait(tasks, timeout=FINISH_SECONDS)
        for served in list(self._served.values()):  # of an engine that does not answer any more
            served.reason = STOPPED
        for task in stuck:
            task.cancel()
        if stuck:
            await asyncio.wait(stuck)

    def _watch(self) -> None:
        """Ends requests whose clients went away, keeps the metrics up to date, and ends the server when the engine
        cannot run any more. A thread, because asking the server takes a message there and back."""
        updated, is_alive = 0.0, True
        while not self._is_stopping.wait(POLL_SECONDS):
            for served in list(self._served.values()):
                try:
                    self._end_if_cancelled(served)
                except Exception:  # of one request; it must not keep the others from being looked at
                    logger.exception("request %s: cannot be watched", served.request_id)
            if time.monotonic() - updated > METRICS_SECONDS:
                updated = time.monotonic()
                self._update_metrics()
            if is_alive and not self.is_ready():
                is_alive = False
                self._end_server()

    def _end_server(self) -> None:
        """Without an engine every request fails, and a server that does not ask `is_ready` goes on saying that all is
        well. It has no other means: a process of a model that ends is not started again, and unloading is refused
        outside of the explicit mode (release 2.51 then hangs). So the server ends, for what watches it to start it
        again; a program that only embeds a server is left alone."""
        server = os.getppid()
        is_program = Path(f"/proc/{server}/comm").read_text().strip() == SERVER_PROGRAM
        deed = "the server ends" if is_program else "load the model again"
        logger.error("model %s: its engine cannot run any more: %s", self._name, deed)
        if is_program:
            os.kill(server, signal.SIGTERM)

    def _end_if_cancelled(self, served: _Served) -> None:
        if served.stream.is_cancelled() and served.task is not None:
            self._loop.call_soon_threadsafe(served.task.cancel)

    def _update_metrics(self) -> None:
        try:
            if self._metrics is not None:
                self._metrics.update()
        except Exception:
            logger.exception("the server does not take the metrics")


class _TritonHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logger = pb_utils.Logger
        levels = {logging.INFO: logger.INFO, logging.WARNING: logger.WARNING}
        level = levels.get(record.levelno, logger.ERROR if record.levelno > logging.WARNING else logger.VERBOSE)
        logger.log(self.format(record), level)


def _log_to_triton() -> None:
    """The runtime's log in the server's."""
    package = logging.getLogger("fly_trt")
    package.setLevel(logging.INFO)
    if not package.handlers:
        package.addHandler(_TritonHandler())


def _code(error: FlyError) -> Any:
    return getattr(pb_utils.TritonError, CODES[error.fault])
