"""The routes of the server, and what answers them."""

import secrets
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from fly_trt.errors import FlyError
from fly_trt.serving.openai.completions import complete
from fly_trt.serving.openai.config import ServerConfig
from fly_trt.serving.openai.errors import fly_error_response
from fly_trt.serving.openai.pool import EnginePool
from fly_trt.serving.openai.protocol import CompletionRequest


def make_app(pool: EnginePool, config: ServerConfig) -> FastAPI:
    """The application that an ASGI server runs."""
    app = FastAPI(title="fly-serve", root_path=config.root_path, docs_url=None, redoc_url=None)

    @app.exception_handler(FlyError)
    async def answer(_: Request, error: FlyError) -> JSONResponse:
        return fly_error_response(error)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> dict[str, Any]:
        return await complete(pool.choose(), body, f"cmpl-{secrets.token_hex(12)}", config.model_names[0])

    return app
