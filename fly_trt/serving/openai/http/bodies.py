"""Bodies as JSON: what is not JSON is refused here, before a model of pydantic sees it.

It knows nothing of the fields. Of a key that comes twice the last one counts, as everywhere in Python.
"""

import json
import math
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from fly_trt.serving.openai.http.errors import ApiError

MAX_DEPTH = 100
MAX_VALUES = 50_000
LONG_LISTS = ("prompt", "tokens")  # whose routes look at them once, and report one error
TOO_DEEP = f"the body is nested too deeply: at most {MAX_DEPTH} levels"


class JsonRoute(APIRoute):
    """A route whose body, where it has one, is JSON: APIRouter(route_class=JsonRoute).

    A body of any other content type is refused: a page in somebody's browser may send those here without being asked.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_json(request: Request) -> Response:
            _check_content_type(request.headers.get("content-type"))
            _check_content_encoding(request.headers.get("content-encoding", "identity"))
            return await handle(_JsonRequest(request, parse_json(await request.body())))

        return handle_json


class _JsonRequest(Request):
    """A request whose body has been parsed."""

    def __init__(self, request: Request, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._body = b"read already"  # FastAPI parses what is not empty
        self._value = value

    async def json(self) -> Any:
        return self._value


def parse_json(body: bytes) -> Any:
    """Raises ApiError for what RFC 8259 does not know, for numbers that no double holds, and for what is nested too
    deeply to be read."""
    if not body.strip():
        raise _malformed("the body is empty: expected a JSON object")
    try:
        value = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _malformed(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _malformed(TOO_DEEP) from None
    except ValueError:  # an int of more digits than Python reads
        raise _malformed("the body has a number with too many digits") from None
    has_many = body.count(b"[") + body.count(b"{") > MAX_DEPTH or body.count(b",") > MAX_VALUES // 2
    if has_many:  # else it is neither deep nor long
        _check_shape(value)
    return value


def _check_shape(value: Any) -> None:
    """Whatever reads the value later may use a frame of the stack for each level, and say of each part that it is
    wrong, which takes seconds for a million of them."""
    level = [value]
    if isinstance(value, dict):
        level = [{key: child for key, child in value.items() if key not in LONG_LISTS}]
    depth = num_values = 0
    while level:
        if depth > MAX_DEPTH:
            raise _malformed(TOO_DEEP)
        containers = [item for item in level if isinstance(item, (dict, list))]
        num_values += sum(map(len, containers))
        if num_values > MAX_VALUES:
            raise _malformed(f"the body has more than {MAX_VALUES} values, besides those of a prompt")
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
        depth += 1


def _malformed(message: str) -> ApiError:
    return ApiError(400, message, code="malformed_json")


def _check_content_type(given: str | None) -> None:
    message = Message()
    message["content-type"] = given or ""
    kind = message.get_content_type() if given else "none"
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise ApiError(415, f"content type {kind}: expected application/json", code="unsupported_content_type")


def _check_content_encoding(given: str) -> None:
    if given.strip().lower() != "identity":
        raise ApiError(415, f"content encoding {given}: send the body as it is", code="unsupported_content_encoding")


def _read_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _malformed(f"the body has the number {text[:20]}, which is beyond all doubles")
    return value


def _refuse(text: str) -> NoReturn:
    raise _malformed(f"the body has {text}, which is no JSON")


_DECODER = json.JSONDecoder(parse_float=_read_float, parse_constant=_refuse)
