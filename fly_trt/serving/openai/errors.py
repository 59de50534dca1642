"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from fastapi.responses import JSONResponse

from fly_trt.errors import Fault, FlyError, one_line

STATUS = {Fault.CALLER: 400, Fault.LOAD: 429, Fault.ENGINE: 503}


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def fly_error_response(error: FlyError) -> JSONResponse:
    status = STATUS[error.fault]
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(error_body(one_line(error), kind), status_code=status)
