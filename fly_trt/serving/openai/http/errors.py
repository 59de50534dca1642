"""Errors in OpenAI's shape, {"error": {"message", "type", "param", "code"}}, whatever went wrong.

It knows which status an error has. A message may repeat what a client sent, so that it goes to the client alone; logs
have `log_line`, which repeats nothing.
"""

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fly_trt.errors import Fault, FlyError, QueueFullError, one_line

STATUS = {Fault.CALLER: 400, Fault.LOAD: 429, Fault.ENGINE: 503}
RETRY_SECONDS = {429: 1, 503: 5}
KINDS = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
UNION_BRANCH = re.compile(r"[a-z]+\[.*\]|str|int|float|bool|[A-Z]\w*")  # how pydantic names what it has tried
MAX_ERRORS = 3
MAX_MESSAGE = 1000  # characters: a message may repeat what was sent
WHOLE = "the body"


class ApiError(FlyError):
    """What is answered with a status of its own. `kind` is OpenAI's "type", by default the status' usual one; param is
    the field that is wrong, code what a program can tell it by. retry_after: seconds, None for the status' usual."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind or kind_of(status)
        self.param = param
        self.code = code
        self.retry_after = RETRY_SECONDS.get(status) if retry_after is None else retry_after


def kind_of(status: int) -> str:
    return KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")


def as_api_error(error: FlyError) -> ApiError:
    """Any error that is raised on purpose, with its status."""
    if isinstance(error, ApiError):
        return error
    status = STATUS[error.fault]
    code = None
    if status == 429:
        code = "queue_full" if isinstance(error, QueueFullError) else "queue_timeout"
    return ApiError(status, one_line(error), code=code)


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}..."
    return {"error": {"message": _encodable(message), "type": kind, "param": _encodable(param), "code": code}}


def body_of(error: FlyError) -> dict[str, Any]:
    """For the last event of a stream that fails after it began."""
    known = as_api_error(error)
    return error_body(one_line(known), known.kind, param=known.param, code=known.code)


def fly_error_response(error: FlyError) -> JSONResponse:
    known = as_api_error(error)
    headers = {} if known.retry_after is None else {"Retry-After": str(known.retry_after)}
    if known.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(known), status_code=known.status, headers=headers)


def log_line(error: BaseException) -> str:
    """What a log may say of an error: nothing that a client sent."""
    if isinstance(error, ApiError):
        return f"{type(error).__name__} {error.status} {error.code or error.kind}"
    if isinstance(error, FlyError) and error.fault is not Fault.CALLER:
        return f"{type(error).__name__}: {one_line(error)}"
    return type(error).__name__


def model_not_found(asked: str, names: Sequence[str]) -> ApiError:
    message = f"the model {asked!r} does not exist: expected {' or '.join(map(repr, names))}"
    return ApiError(404, message, param="model", code="model_not_found")


def add_handlers(app: FastAPI) -> None:
    """Everything that a route raises, and what no route answers, in OpenAI's shape."""

    @app.exception_handler(FlyError)
    async def answer_fly_error(request: Request, error: FlyError) -> Response:
        request.state.error = log_line(error)
        return fly_error_response(error)

    @app.exception_handler(RequestValidationError)
    async def answer_validation_error(request: Request, error: RequestValidationError) -> Response:
        request.state.error = "validation"
        return fly_error_response(_validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def answer_http_exception(request: Request, error: HTTPException) -> Response:
        response = fly_error_response(_http_error(request, error))
        response.headers.update(error.headers or {})
        return response


def _http_error(request: Request, error: HTTPException) -> ApiError:
    path = _encodable(request.url.path)
    if error.status_code == 404:
        return ApiError(404, f"no such path: {request.method} {path}", code="unknown_url")
    if error.status_code == 405:
        return ApiError(405, f"{path} does not take {request.method}", code="method_not_allowed")
    return ApiError(error.status_code, _encodable(str(error.detail)))


def _validation_error(errors: Sequence[Any]) -> ApiError:
    """Names the fields and what was expected, never the values, which may be long."""
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        names = list(dict.fromkeys(_field(error["loc"]) for error in unknown))
        what = ", ".join(names[:MAX_ERRORS]) + (", ..." if len(names) > MAX_ERRORS else "")
        message = f"unknown field{'s' if len(names) > 1 else ''} {what}: leave out what this server does not know"
        return ApiError(400, message, param=names[0], code="unknown_parameter")
    by_field: dict[str, list[str]] = {}
    for error in errors:
        said = by_field.setdefault(_field(error["loc"]), [])
        text = error["msg"].removeprefix("Value error, ")
        if (text := text[:1].lower() + text[1:]) not in said:
            said.append(text)
    lines = [f"{name}: {', or '.join(said[:MAX_ERRORS])}" for name, said in by_field.items()]
    message = "; ".join(lines[:MAX_ERRORS]) or "the request is not valid"
    missing = {error["type"] for error in errors} == {"missing"}
    code = "missing_required_parameter" if missing else "invalid_value"
    param = next((name for name in by_field if name != WHOLE), None)
    return ApiError(400, message, param=param, code=code)


def _field(location: Sequence[Any]) -> str:
    """As a client would write it: messages[0].content."""
    parts = list(location[1:] if location and location[0] in ("body", "query", "path", "header") else location)
    text = ""
    for index, part in enumerate(parts):
        if isinstance(part, int):
            text += f"[{part}]"
        elif index == 0:
            text = str(part)
        elif not UNION_BRANCH.fullmatch(part):
            text += f".{part}"
    return text[:200] or WHOLE


def _encodable(text: Any) -> Any:
    """Half of a surrogate pair, which JSON may have, is not to be sent."""
    return text.encode(errors="backslashreplace").decode() if isinstance(text, str) else text
