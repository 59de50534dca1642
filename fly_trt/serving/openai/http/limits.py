"""How much a client may send, and how long it may take. A body is read as a whole before a route sees it."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fly_trt.serving.openai.http.errors import ApiError, log_line
from fly_trt.serving.openai.http.gate import refuse

DISCARD_FACTOR = 8  # of what is too long so much is read, so that a client that sends first sees the answer


class _ClientGoneError(Exception):
    """It went before it had sent everything."""


class LimitsMiddleware:
    """max_body_bytes: of a body, whatever its Content-Length says. body_timeout: seconds in which it has to arrive."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, body_timeout: float) -> None:
        self.app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except _ClientGoneError:
            return
        except ApiError as error:
            scope["state"]["error"] = log_line(error)
            await refuse(error, scope, receive, send)
        else:
            await self.app(scope, _replaying(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        announced = headers.get("content-length", "")
        if announced and "transfer-encoding" in headers:
            raise ApiError(400, "both Content-Length and Transfer-Encoding: send one of them", code="bad_http")
        limit, most = self._max_body_bytes, DISCARD_FACTOR * self._max_body_bytes
        if announced.isdecimal() and int(announced[:20]) > most:
            raise self._too_long()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_timeout):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise _ClientGoneError
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size <= limit:
                        chunks.append(chunk)
                    else:
                        chunks.clear()
                    if size > most or (size > limit and not message.get("more_body", False)):
                        raise self._too_long()
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            seconds = f"{self._body_timeout:g} s"
            raise ApiError(408, f"the body did not arrive within {seconds}", code="request_timeout") from None

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max_body_bytes} bytes", code="request_too_large")


def _replaying(body: bytes, receive: Receive) -> Receive:
    """`receive` from the beginning: the body, then what comes after it, which is the end of the connection."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
