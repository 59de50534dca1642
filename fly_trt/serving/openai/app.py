"""The routes of the server, and what stands before them."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from fly_trt.serving.openai.answers.generation import EXACT_BECAUSE
from fly_trt.serving.openai.api import make_api_router
from fly_trt.serving.openai.config import ServerConfig
from fly_trt.serving.openai.http.bodies import JsonRoute
from fly_trt.serving.openai.http.errors import add_handlers
from fly_trt.serving.openai.http.exchange import REQUEST_ID, ExchangeMiddleware
from fly_trt.serving.openai.http.gate import GateMiddleware
from fly_trt.serving.openai.http.lifecycle import Lifecycle
from fly_trt.serving.openai.http.limits import LimitsMiddleware
from fly_trt.serving.openai.operations import make_operations_router
from fly_trt.serving.openai.page import make_page_router
from fly_trt.serving.openai.pool import EnginePool
from fly_trt.serving.openai.request_log import RequestLog


def make_app(pool: EnginePool, config: ServerConfig) -> FastAPI:
    """The application that an ASGI server runs. `app.state.lifecycle` is how that one says that it stops."""
    # Without redirects: they would name whatever host and scheme the request came with.
    app = FastAPI(title="fly-serve", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.router.route_class = JsonRoute
    app.state.lifecycle = lifecycle = Lifecycle(config.drain_timeout)
    pool.observe = RequestLog(log_requests=config.log_requests, log_texts=config.log_texts)
    add_handlers(app)
    _add_middleware(app, config, lifecycle)
    app.include_router(make_operations_router(pool, config, lifecycle))
    app.include_router(make_api_router(pool, config))
    app.include_router(make_page_router())
    return app


def _add_middleware(app: FastAPI, config: ServerConfig, lifecycle: Lifecycle) -> None:
    """The last one that is added is the first that sees a request."""
    app.add_middleware(LimitsMiddleware, max_body_bytes=config.max_body_bytes, body_timeout=config.body_timeout)
    app.add_middleware(GateMiddleware, lifecycle=lifecycle, api_keys=config.api_keys, root_path=config.root_path)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, EXACT_BECAUSE, "Retry-After"],
        )
    app.add_middleware(ExchangeMiddleware, lifecycle=lifecycle, log_texts=config.log_texts)
