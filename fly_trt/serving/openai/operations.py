"""What is not generation: health, readiness, version, metrics, the breaker, the model's card, text to tokens and
back."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator
from starlette.responses import Response

from fly_trt import __version__
from fly_trt.async_llm import AsyncLLM
from fly_trt.service.admission import LONG_PROMPT
from fly_trt.serving.openai.config import ServerConfig
from fly_trt.serving.openai.http.bodies import JsonRoute
from fly_trt.serving.openai.http.errors import ApiError
from fly_trt.serving.openai.http.lifecycle import Lifecycle
from fly_trt.serving.openai.metrics import pool_registry
from fly_trt.serving.openai.pool import EnginePool
from fly_trt.serving.openai.requests.messages import developer_role, render_messages
from fly_trt.serving.openai.requests.protocol import Message, Tool
from fly_trt.serving.openai.requests.tool_calls.tools import read_tools
from fly_trt.text.chat import ChatTemplate

T = TypeVar("T")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None


class TokenizeRequest(_Body):
    """vLLM's: either a prompt or messages."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    tools: list[Tool] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _has_one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens goes with prompt: a chat template writes its own")
        return self


class DetokenizeRequest(_Body):
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FailFast()]


class ResetRequest(_Body):
    """setting: as the breaker names it; None is all that are tripped."""

    setting: str | None = None


def make_operations_router(pool: EnginePool, config: ServerConfig, lifecycle: Lifecycle) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)
    registry = pool_registry(pool)
    template = ChatTemplate(pool.llms[0].engine_dir / "tokenizer").source(has_tools=True)
    card = {
        "object": "model",
        "created": int(lifecycle.started_at),
        "owned_by": "fly-trt",
        "root": pool.manifest.name,
        "parent": None,
        "max_model_len": pool.llms[0].sizes.max_seq_len,
        "has_chat_template": bool(template),
        "setting": pool.llms[0].setting.as_dict(),
    }

    @router.get("/health")
    async def health() -> Response:
        """Whether the process does its work: it may be restarted when it does not."""
        if not pool.num_alive:
            pool.choose()  # raises what has ended them
        return JSONResponse({"status": "ok", "engines": pool.num_alive})

    @router.get("/ready")
    async def ready() -> Response:
        """Whether requests should be sent here."""
        lifecycle.check_open()
        pool.choose()
        return JSONResponse({"status": "ready"})

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/metrics")
    async def metrics() -> Response:
        """The text format whatever a scraper would rather have: in OpenMetrics the colon of the names is lost."""
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get("/breaker")
    async def breaker() -> dict[str, Any]:
        """What audits say of each setting, and whether it is exact for now, engine by engine."""
        states = [(number, state) for number, llm in enumerate(pool.llms) for state in llm.breaker_state()]
        return {"settings": [{"engine": number, **dataclasses.asdict(state)} for number, state in states]}

    @router.post("/breaker/reset")
    async def reset_breaker(body: ResetRequest) -> dict[str, Any]:
        """Makes settings that are exact loose again, on all engines."""
        config.check_model(body.model)
        if not config.allow_breaker_reset:
            message = "this server lets no client reset the breaker: start it with --allow-breaker-reset"
            raise ApiError(403, message, code="reset_not_allowed")
        return {"reset": pool.reset_breaker(body.setting)}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, **card} for name in config.model_names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return {"id": config.check_model(name), **card}

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        config.check_model(body.model)
        llm = pool.llms[0]
        token_ids = await _token_ids(llm, body, developer_role(template))
        strings = [llm.tokenizer.id_to_token(token) for token in token_ids] if body.return_token_strs else None
        return {
            "count": len(token_ids),
            "max_model_len": llm.sizes.max_seq_len,
            "tokens": token_ids,
            "token_strs": strings,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        config.check_model(body.model)
        tokenizer = pool.llms[0].tokenizer
        size = tokenizer.get_vocab_size()
        if (most := max(body.tokens, default=0)) >= size:
            raise ApiError(400, f"tokens: {most} is not a token id, expected 0 to {size - 1}", param="tokens")
        # decode would keep Python's lock
        texts = await _beside_the_loop(
            len(body.tokens), lambda: tokenizer.decode_batch([body.tokens], skip_special_tokens=False)
        )
        return {"prompt": texts[0]}

    return router


async def _token_ids(llm: AsyncLLM, body: TokenizeRequest, developer: str) -> list[int]:
    if body.messages is None:
        prompt, adds = body.prompt or "", body.add_special_tokens is not False
        return await _beside_the_loop(len(prompt), lambda: llm.tokenize(prompt, add_special_tokens=adds))
    tools = [tool.as_template_variable() for tool in read_tools([each.model_dump() for each in body.tools or ()])]
    own = {
        "add_generation_prompt": body.add_generation_prompt,
        "chat_template": body.chat_template,
        "tools": tools or None,
    }
    rendered = await render_messages(llm, body.messages, developer, own, body.chat_template_kwargs)
    return rendered["prompt_token_ids"]


async def _beside_the_loop(size: int, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if size > LONG_PROMPT else work()
