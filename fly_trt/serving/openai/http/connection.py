"""One connection of uvicorn's with two limits that uvicorn has not: on the time in which a request's head must have
come, and on the time that a client may leave an answer unread.

It knows HTTP/1.1 as h11 does, and nothing of what is asked or answered.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fly_trt.serving.openai.http.errors import error_body

HEAD_SECONDS = 30.0


def connection_class(write_timeout: float, head_timeout: float = HEAD_SECONDS) -> type[H11Protocol]:
    """uvicorn makes one for each connection.

    write_timeout: in seconds; a connection whose buffer has been full for that long is cut, so that its request ends.
    head_timeout: of the first request from when the connection was made, of later ones from their first byte.
    """

    class Connection(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head_timer = self.loop.call_later(head_timeout, self._cut)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head_timer()
            self.resume_writing()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._awaits_head():
                if self._head_timer is None:
                    self._head_timer = self.loop.call_later(head_timeout, self._cut)
            else:
                self._stop_head_timer()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._write_timer is None:
                self._write_timer = self.loop.call_later(write_timeout, self._cut)

        def resume_writing(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP gets an answer in the shape of all others."""
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.close()  # in the middle of an answer
                return
            body = json.dumps(error_body(msg, "invalid_request_error", code="bad_http")).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _awaits_head(self) -> bool:
            """Whether a part of a head is there."""
            return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

        def _stop_head_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _cut(self) -> None:
            self.transport.abort()

    return Connection
