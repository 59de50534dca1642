"""Runs the application in uvicorn, in one process, until a signal ends it.

The first SIGTERM or Ctrl-C drains: what is under way is answered, and everything new is refused with 503. The second
one, or the end of the drain's time, ends answers with an error. It knows nothing of requests.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from fly_trt.errors import ConfigError
from fly_trt.serving.openai.config import ServerConfig
from fly_trt.serving.openai.http.connection import connection_class
from fly_trt.serving.openai.http.lifecycle import Lifecycle
from fly_trt.serving.openai.pool import EnginePool

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 30  # more than clients keep theirs, so that it is they who close
LAST_SECONDS = 3  # for connections that have to be closed after the last answer
TICK_SECONDS = 0.1
BACKLOG = 2048
SIGNAL_EXIT = 128  # and the signal's number


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a server listens: at host and port, 0 for a free one, or at a Unix socket. The files are of TLS;
    with ssl_ca_certs a client needs a certificate of one of these."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None

    def __post_init__(self) -> None:
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                raise ConfigError(f"{name}: has no effect without ssl_certfile: add it, or leave it out")

    def bind(self) -> socket.socket | None:
        """Takes the address, at which nobody is answered before the server runs, and reads the files of TLS once. None
        for a Unix socket, which uvicorn makes. Raises OSError for what cannot be listened at and ConfigError for files
        of TLS that cannot be used."""
        self._check_tls()
        if self.uds is not None:
            _check_uds(Path(self.uds))
            return None
        try:
            infos = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            return _bound(*infos[0])
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self.host}:{self.port}") from None

    def _check_tls(self) -> None:
        if self.ssl_certfile is None:
            return
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, self.ssl_keyfile_password)
            if self.ssl_ca_certs is not None:
                context.load_verify_locations(self.ssl_ca_certs)
        except (OSError, ValueError) as error:
            files = ", ".join(filter(None, (self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs)))
            raise ConfigError(f"TLS: {files}: {error}") from None

    def url(self, bound: socket.socket | None) -> str:
        if bound is None:
            return f"unix:{self.uds}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.ssl_certfile else 'http'}://{host}:{bound.getsockname()[1]}"


def _check_uds(path: Path) -> None:
    """Raises OSError where a socket cannot be made in place of what is there: no folder, a file, another server's."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not path.exists():
        return
    if not path.is_socket():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.connect(str(path))
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), str(path))


def _bound(family: int, kind: int, protocol: int, _: str, where: Any) -> socket.socket:
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(where)
    except OSError:
        bound.close()
        raise
    return bound


class Server(uvicorn.Server):
    """uvicorn's with a drain in two steps. `exit_code` after it ran: 0 when everybody was answered."""

    def __init__(
        self, config: uvicorn.Config, pool: EnginePool, lifecycle: Lifecycle, when_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._pool = pool
        self._lifecycle = lifecycle
        self._when_ready = when_ready
        self._signal: int = signal.SIGTERM

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In the main thread, between any two of its instructions: it only takes note."""
        self._signal = sig
        if self._lifecycle.is_draining:
            self._lifecycle.stop()
        self._lifecycle.drain()

    async def main_loop(self) -> None:
        """Looks after the signals ten times a second, as uvicorn's does."""
        ticks = 0
        has_told = False
        while not self._lifecycle.is_drained:
            await self.on_tick(ticks)
            await asyncio.sleep(TICK_SECONDS)
            ticks += 1
            if self._lifecycle.is_draining and not has_told:
                has_told = True
                logger.info("drains: %d requests are under way", self._lifecycle.num_active)
            if self._lifecycle.is_late or self._lifecycle.is_stopping:
                await self._cut_short()
                return

    async def _cut_short(self) -> None:
        """Has what is under way end with an error, and waits a moment until that was sent."""
        logger.warning("stops: %d requests are cut short", self._lifecycle.num_active)
        self.exit_code = SIGNAL_EXIT + self._signal
        deadline = asyncio.get_running_loop().time() + LAST_SECONDS
        while not self._lifecycle.is_drained and asyncio.get_running_loop().time() < deadline:
            await self._pool.cut_short()
            await asyncio.sleep(TICK_SECONDS)


def serve(
    app: FastAPI,
    pool: EnginePool,
    config: ServerConfig,
    address: Address,
    bound: socket.socket | None,
    when_ready: Callable[[str], None],
) -> int:
    """Serves at what the address `bound` until a signal, and returns the exit code. when_ready is told the URL."""
    uvicorn_config = uvicorn.Config(
        app,
        uds=address.uds,
        http=connection_class(config.write_timeout),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
        ssl_certfile=address.ssl_certfile,
        ssl_keyfile=address.ssl_keyfile,
        ssl_keyfile_password=address.ssl_keyfile_password,
        ssl_ca_certs=address.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_NONE if address.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    )
    server = Server(uvicorn_config, pool, app.state.lifecycle, lambda: when_ready(address.url(bound)))
    try:
        server.run(sockets=None if bound is None else [bound])
    finally:
        if address.uds is not None:
            Path(address.uds).unlink(missing_ok=True)
    return server.exit_code
