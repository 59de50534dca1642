"""The process for the engines, and the thread that takes its responses."""

import asyncio
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

from ..llmapi.utils import AsyncQueue
from ..sampling_params import SamplingParams
from .result import GenerationResult
from .utils import RequestError

WORKER = Path(__file__).with_name("worker.py")


class GenerationExecutor:
    """Its pipe to the worker is one thread's: the first that sends a request."""

    def __init__(self, arguments: dict) -> None:
        from .. import MPI_ENVIRONMENT

        passed = {name: value for name, value in os.environ.items() if name.startswith(("TRTLLM", "TLLM"))}
        self._results: dict[int, GenerationResult] = {}
        self._next_id = 1
        self.most_open = 0
        self.sent: list[SamplingParams] = []
        self.num_responses: list[int] = []  # of each request, in their order
        self._error_queue: queue.Queue = queue.Queue()
        self._sender: int | None = None
        self.doing_shutdown = False
        self._worker = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=MPI_ENVIRONMENT | passed | {"PYTHONPATH": os.environ["STAND_IN_PYTHONPATH"]},
        )
        if (signal := self._read()) != {"ready": True}:
            self._worker.kill()
            raise RuntimeError("Executor worker returned error") from RuntimeError(str(signal))
        self._dispatcher = threading.Thread(target=self._dispatch, daemon=True)
        self._dispatcher.start()

    @property
    def worker_pid(self) -> int:
        return self._worker.pid

    @property
    def num_open(self) -> int:
        """Requests whose last response has not come."""
        return len(self._results)

    def submit(self, prompt_token_ids: list[int], params: SamplingParams) -> GenerationResult:
        assert all(type(token) is int for token in prompt_token_ids)
        self.handle_background_error()
        result = GenerationResult(self._next_id, params, self)
        self._next_id += 1
        self._results[result.request_id] = result
        self.num_responses.append(0)
        self.most_open = max(self.most_open, len(self._results))
        names = ("max_tokens", "end_id", "stop_token_ids", "ignore_eos", "temperature", "top_k", "top_p")
        wanted = {name: getattr(params, name) for name in names}
        self.sent.append(params)
        self._send({"id": result.request_id, "prompt": prompt_token_ids, **wanted})
        return result

    def abort_request(self, request_id: int) -> None:
        self._send({"cancel": request_id})

    def is_shutdown(self) -> bool:
        return self.doing_shutdown

    def handle_background_error(self, error: str | Exception | None = None) -> None:
        """A text is one request's error; an exception ends everything."""
        if isinstance(error, str):
            raise RequestError(error)
        if error is None and not self._error_queue.empty():
            error = self._error_queue.get()
        if error is not None:
            self.shutdown()
            raise error

    def shutdown(self) -> None:
        if self.doing_shutdown:
            return
        self.doing_shutdown = True
        for request_id in list(self._results):
            self._send({"cancel": request_id})
        self._send({"quit": True})
        self._worker.wait()
        self._dispatcher.join()
        with contextlib.suppress(BrokenPipeError):
            self._worker.stdin.close()
        self._worker.stdout.close()

    def _send(self, message: dict) -> None:
        self._sender = self._sender or threading.get_ident()
        assert self._sender == threading.get_ident(), "a socket of another thread"
        try:
            self._worker.stdin.write(json.dumps(message) + "\n")
            self._worker.stdin.flush()
        except BrokenPipeError:
            pass  # as a socket whose other end is gone

    def _read(self) -> object:
        line = self._worker.stdout.readline()
        return json.loads(line) if line else None

    def _dispatch(self) -> None:
        while (batch := self._read()) is not None:
            told: list[AsyncQueue] = []
            for response in batch:
                result = self._results[response["id"]]
                self.num_responses[result.request_id - 1] += 1
                result.queue.put_nowait(response)
                if isinstance(result.queue, AsyncQueue):
                    told.append(result.queue)
                if response.get("is_final") or "error" in response:
                    del self._results[response["id"]]
            if told and told[0].loop.is_running():  # all loops are one

                async def notify(queues: tuple[AsyncQueue, ...] = tuple(told)) -> None:
                    for waiting in queues:
                        waiting.notify()

                asyncio.run_coroutine_threadsafe(notify(), told[0].loop)
        if not self.doing_shutdown:
            self._error_queue.put(RuntimeError("worker process died"))
