"""Who may come in: whoever has a key, as long as the server takes requests.

What an orchestrator, a scraper or a browser's first look needs is open to all, and stays open while a server drains.
"""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fly_trt.errors import FlyError
from fly_trt.serving.openai.http.errors import ApiError, fly_error_response, log_line
from fly_trt.serving.openai.http.lifecycle import Lifecycle

OPEN_PATHS = ("/", "/health", "/ready", "/version", "/metrics", "/favicon.ico")
OPEN_FOLDERS = ("/page/",)  # files of the playground, which are the same for everybody


class GateMiddleware:
    """Refuses requests without one of `api_keys`, where there are any, and all but the open paths during a drain."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, *, api_keys: Sequence[str], root_path: str) -> None:
        self.app = app
        self._root_path = root_path.rstrip("/")
        self._lifecycle = lifecycle
        self._digests = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self._root_path  # which the router takes off, where a proxy has left it on
            try:
                if not _is_open(_without(self._root_path, scope["path"])):
                    self._lifecycle.check_open()
                    self._check_key(Headers(scope=scope).get("authorization"))
            except FlyError as error:
                scope["state"]["error"] = log_line(error)
                await refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check_key(self, given: str | None) -> None:
        if not self._digests:
            return
        scheme, _, key = (given or "").partition(" ")
        digest = _digest(key.strip(" \t").encode("latin-1"))  # the bytes that were sent
        # All of them, each in constant time: how long it takes says nothing of a key.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            what = "no API key" if given is None else "a wrong API key"
            raise ApiError(401, f"{what}: send Authorization: Bearer KEY", code="invalid_api_key")


async def refuse(error: FlyError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers and ends the connection: what is left of the body is not read."""

    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
        await send(message)

    await fly_error_response(error)(scope, receive, send_and_close)


def _without(root_path: str, path: str) -> str:
    """As the router sees the path."""
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        return path[len(root_path) :]
    return path


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
