"""The routes of the server, and what answers them."""

from fastapi import FastAPI

from fly_trt.serving.openai.api import make_api_router
from fly_trt.serving.openai.bodies import JsonRoute
from fly_trt.serving.openai.config import ServerConfig
from fly_trt.serving.openai.errors import add_handlers
from fly_trt.serving.openai.lifecycle import Lifecycle
from fly_trt.serving.openai.operations import make_operations_router
from fly_trt.serving.openai.pool import EnginePool


def make_app(pool: EnginePool, config: ServerConfig) -> FastAPI:
    """The application that an ASGI server runs. `app.state.lifecycle` is how that one says that it stops."""
    app = FastAPI(title="fly-serve", root_path=config.root_path, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.route_class = JsonRoute
    app.state.lifecycle = lifecycle = Lifecycle(config.drain_timeout)
    add_handlers(app)
    app.include_router(make_operations_router(pool, config, lifecycle))
    app.include_router(make_api_router(pool, config))
    return app
