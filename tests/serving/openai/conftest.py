"""Servers of the OpenAI API that run in a thread of the test process, over real engines."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI

from fly_trt import AsyncLLM
from fly_trt.serving.openai.app import make_app
from fly_trt.serving.openai.config import ServerConfig
from fly_trt.serving.openai.pool import EnginePool

MODEL = "demo"
START_SECONDS = 60.0


@dataclass
class RunningServer:
    """base_url: scheme, host and port. llm: what it serves, to look at its metrics."""

    base_url: str
    llm: AsyncLLM
    pool: EnginePool
    app: FastAPI
    api_key: str = "none"
    _clients: list[OpenAI] = field(default_factory=list)

    @property
    def client(self) -> OpenAI:
        """The official package's, which tries nothing twice. One for all tests of a server: making one takes 50 ms."""
        if not self._clients:
            self._clients.append(OpenAI(base_url=f"{self.base_url}/v1", api_key=self.api_key, max_retries=0))
        return self._clients[0]

    def async_client(self) -> AsyncOpenAI:
        """For one event loop; close it."""
        return AsyncOpenAI(base_url=f"{self.base_url}/v1", api_key=self.api_key, max_retries=0)


@contextlib.contextmanager
def run_server(
    engine_dir: Path, *, llm_settings: Mapping[str, Any] | None = None, **config: Any
) -> Iterator[RunningServer]:
    """A server on a free port, until the block is left. config: of ServerConfig; llm_settings: of AsyncLLM."""
    llm = AsyncLLM(engine_dir, **(llm_settings or {}))
    try:
        settings = ServerConfig(**{"model_names": (MODEL,), **config})
        pool = EnginePool([llm])
        app = make_app(pool, settings)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            try:
                _wait_until_started(server, thread)
                url = f"http://127.0.0.1:{listening.getsockname()[1]}"
                yield RunningServer(url, llm, pool, app, (*settings.api_keys, "none")[0])
            finally:
                server.should_exit = True
                thread.join()
    finally:
        llm.shutdown()


def _wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.005)


StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def server() -> Iterator[StartServer]:
    """server(engine_dir, **config): a RunningServer, the same one for the same arguments; they end with the module."""
    with contextlib.ExitStack() as stack:
        running: dict[str, RunningServer] = {}

        def start(engine_dir: Path, **config: Any) -> RunningServer:
            key = repr((engine_dir, sorted(config.items())))
            if key not in running:
                running[key] = stack.enter_context(run_server(engine_dir, **config))
            return running[key]

        yield start


@pytest.fixture(scope="module")
def demo(server: StartServer, demo_engine: Path) -> RunningServer:
    """The demo pair, served as `fly-serve` does by default."""
    return server(demo_engine)


@pytest.fixture(scope="module")
def steady(server: StartServer, demo_engine: Path) -> RunningServer:
    """The demo pair, with drafts whose lengths do not depend on how fast the machine is."""
    return server(demo_engine, llm_settings={"speculative_config": {"adaptive_draft_length": False}})
