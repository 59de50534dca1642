"""One HTTP request and its answer: its id, what a log says of it, and what happens when a route breaks.

The outermost middleware. Texts come into no log but where `log_texts` says so: not in the line of a request, not in
that of an error.
"""

import logging
import re
import secrets
import time
import traceback
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fly_trt.serving.openai.http.errors import ApiError, fly_error_response
from fly_trt.serving.openai.http.lifecycle import Lifecycle

access_logger = logging.getLogger("fly_trt.access")
logger = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
MAX_PATH = 200  # characters of one in a log
MAX_CLIENT = 80  # likewise


@dataclass(slots=True)
class Exchange:
    """What is known of it so far."""

    request_id: str
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    status: int | None = None
    is_complete: bool = False
    log_texts: bool = False


CURRENT: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


class ExchangeMiddleware:
    """Gives each request an id, counts it, answers what broke with 500, and writes its line."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, *, log_texts: bool) -> None:
        self.app = app
        self._lifecycle = lifecycle
        self._log_texts = log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        exchange = Exchange(_request_id(Headers(scope=scope).get(REQUEST_ID)), log_texts=self._log_texts)
        scope.setdefault("state", {})["exchange"] = exchange

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = exchange.request_id
                exchange.status = message["status"]
            elif not message.get("more_body", False):
                exchange.is_complete = True
            await send(message)

        CURRENT.set(exchange)
        self._lifecycle.num_active += 1
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            log_failure(error)
            if exchange.status is None:
                await fly_error_response(_internal_error(exchange.request_id))(scope, receive, send_with_id)
        finally:
            self._lifecycle.num_active -= 1
            _log_access(scope, exchange, time.perf_counter() - started)


def log_failure(error: Exception) -> None:
    """Where the request that is being answered broke, without the error's message: that may repeat what was sent."""
    exchange = CURRENT.get()
    request_id, with_texts = (None, False) if exchange is None else (exchange.request_id, exchange.log_texts)
    what = repr(error) if with_texts else type(error).__name__
    lines = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s broke: %s\n%s", request_id, what, lines.rstrip())


def _request_id(given: str | None) -> str:
    """The client's where it can stand in a log and a header."""
    return given if given and SANE_ID.fullmatch(given) else secrets.token_hex(12)


def _internal_error(request_id: str) -> ApiError:
    message = f"the server broke at this request; its log says more under {request_id}"
    return ApiError(500, message, code="internal_error")


def _printable(text: str) -> str:
    """A proxy's X-Forwarded-For may be anything that a client made up."""
    return ascii(text)[1:-1][:MAX_CLIENT]


def _log_access(scope: Scope, exchange: Exchange, seconds: float) -> None:
    """One line. The path as it was sent, which is ASCII, and not its query."""
    path = scope.get("raw_path", b"").partition(b"?")[0].decode("ascii", "backslashreplace")[:MAX_PATH]
    client = scope.get("client")
    notes = [note for note in (scope["state"].get("error"), "" if exchange.is_complete else "client gone") if note]
    access_logger.info(
        "%s %s %s %s %.0f ms, %d+%d tokens, id %s%s",
        _printable(f"{client[0]}:{client[1]}") if client else "-",
        scope["method"],
        path,
        exchange.status or "-",
        1e3 * seconds,
        exchange.num_prompt_tokens,
        exchange.num_output_tokens,
        exchange.request_id,
        f" ({'; '.join(notes)})" if notes else "",
    )
