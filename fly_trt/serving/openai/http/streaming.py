"""Answers that end when their client goes away: whole ones, and streams of server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fly_trt.errors import FlyError
from fly_trt.serving.openai.http.errors import body_of, error_body

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED_REQUEST = 499  # nginx's number, for the access log: nobody reads it
# ASCII alone: some clients take U+2028 and the like for the end of a line.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def to_json(value: Any) -> bytes:
    return _encode(value).encode("ascii")


def json_response(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), media_type="application/json", headers=headers)


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises. When the client goes away first, work is cancelled and has ended when
    ClientGoneError is raised."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `first` and then what `events` yields, each of them one or several whole events, and DONE. An error in the
    middle is the last event. However it ends, `events` is closed when it has ended."""

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            with contextlib.suppress(ClientGoneError):
                await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        end = {"type": "http.response.body", "body": b"", "more_body": False}
        async with contextlib.aclosing(_to_the_end(self._events)) as events:
            try:
                async for body in events:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            except Exception:  # is logged as that of any other request
                await send(end)
                raise
        await send(end)


async def _to_the_end(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        async for some in events:
            yield some
    except FlyError as error:
        yield event(to_json(body_of(error))) + DONE
    except Exception:
        yield event(to_json(error_body("the server broke at this request", "server_error"))) + DONE
        raise
    else:
        yield DONE
