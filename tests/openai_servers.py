"""Servers of the OpenAI API for tests: in a thread of this process, and as the command in a process of its own."""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from fly_trt import AsyncLLM
from fly_trt.serving.openai.app import make_app
from fly_trt.serving.openai.config import ServerConfig
from fly_trt.serving.openai.http.server import Address, serve
from fly_trt.serving.openai.pool import EnginePool

SECONDS = 60.0  # in which what must come has to come, on any machine

SLOW = """
import time
from fly_trt.cli.serve import main
from fly_trt.engines.onnxruntime import OnnxRuntimeEngine
run = OnnxRuntimeEngine.run
OnnxRuntimeEngine.run = lambda engine, step: (time.sleep(0.005), run(engine, step))[1]
main()
"""


def wait_until(is_true: Callable[[], Any], what: str = "") -> None:
    deadline = time.monotonic() + SECONDS
    while not is_true():
        assert time.monotonic() < deadline, f"still not true: {what}"
        time.sleep(0.005)


class Wire:
    """One connection, byte by byte."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(SECONDS)
        self.socket.connect(("127.0.0.1", port))

    def send(self, data: bytes, *, times: int = 1) -> Self:
        for _ in range(times):
            self.socket.sendall(data)
        return self

    def read(self) -> bytes:
        """Until the server closes."""
        parts = []
        try:
            while part := self.socket.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)

    def read_until(self, mark: bytes) -> bytes:
        found = b""
        while mark not in found:
            part = self.socket.recv(65536)
            assert part, found
            found += part
        return found

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def reset(self) -> None:
        """Goes without a word: the other side gets RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()


def post(path: str, body: bytes, *, headers: Sequence[str] = (), close: bool = True) -> bytes:
    """The bytes of a request with a JSON body."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: test",
        "Content-Type: application/json",
        *([f"Content-Length: {len(body)}"] if not any(h.lower().startswith("transfer-") for h in headers) else []),
        *(["Connection: close"] if close else []),
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class ThreadServer:
    """Serves `llms` in a thread until `stop`, which drains."""

    def __init__(self, llms: Sequence[AsyncLLM], *, queue_timeout: float | None = None, **config: Any) -> None:
        self.pool = EnginePool(llms, queue_timeout=queue_timeout)
        self.config = ServerConfig(**{"model_names": ("demo",), **config})
        self.app = make_app(self.pool, self.config)
        self.lifecycle = self.app.state.lifecycle
        self._urls: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        address = Address(port=0)
        self.exit_code = serve(self.app, self.pool, self.config, address, address.bind(), self._urls.put)

    def __enter__(self) -> Self:
        self._thread.start()
        self.url = self._urls.get(timeout=SECONDS)
        self.port = int(self.url.rpartition(":")[2])
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def wire(self, **settings: Any) -> Wire:
        return Wire(self.port, **settings)

    def stop(self) -> None:
        self.lifecycle.drain()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()


class ServeProcess:
    """`fly-serve` with a free port; `lines` has what it said on stderr."""

    def __init__(
        self, engine_dir: Path, *flags: str, environment: dict[str, str] | None = None, is_slow: bool = False
    ) -> None:
        """is_slow: no step is fast, so that a long answer is still under way when something else was done."""
        program = ["-c", SLOW] if is_slow else ["-m", "fly_trt.cli.serve"]
        command = [sys.executable, *program, str(engine_dir), "--port", "0", "--num-threads", "1"]
        self.process = subprocess.Popen(
            [*command, *flags], stderr=subprocess.PIPE, text=True, env=os.environ | (environment or {})
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def __enter__(self) -> Self:
        try:
            wait_until(lambda: self._ready_line() or self.process.poll() is not None, "ready")
            assert self._ready_line(), self.lines
        except BaseException:
            self.process.kill()
            raise
        self.url = re.search(r" at (\S+): ", self._ready_line())[1]
        self.port = int(self.url.rpartition(":")[2]) if self.url.startswith("http") else 0
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait(SECONDS)
        self._reader.join(SECONDS)

    def _ready_line(self) -> str:
        return next((line for line in self.lines if line.startswith("fly-serve: ") and " at " in line), "")

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wire(self, **settings: Any) -> Wire:
        return Wire(self.port, **settings)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code; everything that it said is in `lines` then."""
        code = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return code
