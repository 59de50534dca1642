"""The routes that generate text: /v1/completions and /v1/chat/completions."""

import secrets

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fly_trt.errors import RequestError
from fly_trt.serving.openai import chat, completions
from fly_trt.serving.openai.answer_form import ToolCalling
from fly_trt.serving.openai.bodies import JsonRoute
from fly_trt.serving.openai.config import ServerConfig
from fly_trt.serving.openai.generation import respond
from fly_trt.serving.openai.pool import EnginePool
from fly_trt.serving.openai.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from fly_trt.serving.openai.sampling import Defaults
from fly_trt.serving.openai.token_text import TokenReader
from fly_trt.text.chat import ChatTemplate


def make_api_router(pool: EnginePool, config: ServerConfig) -> APIRouter:
    """Reads the model's defaults of sampling and its way to call tools once. Raises ConfigError where there is no such
    parser, or where they cannot be sampled with."""
    one = pool.llms[0]  # they are of the same directory
    template = ChatTemplate(one.engine_dir / "tokenizer").source(has_tools=True)
    calling = ToolCalling(config.tool_call_parser, template, one.tokenizer)
    router = APIRouter(route_class=JsonRoute)
    reader = TokenReader(one.tokenizer)
    defaults = Defaults.read(one.engine_dir, config.generation_config, config.override_generation_config)
    if config.spec_decode_metrics == "detailed":
        defaults = Defaults({**defaults.values, "detailed_metrics": True})
    has_metrics = config.spec_decode_metrics != "none"

    @router.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        model, llm = config.check_model(body.model), pool.choose()
        params = completions.read_params(body, defaults)
        writer = completions.CompletionWriter(llm, reader, body, params, _answer_id("cmpl", body), model)
        writer.has_metrics = has_metrics
        return await respond(request, completions.read_prompts(body.prompt), writer)

    @router.post("/v1/chat/completions")
    async def answer_chat(body: ChatCompletionRequest, request: Request) -> Response:
        model, llm = config.check_model(body.model), pool.choose()
        form = chat.read_form(body, calling)
        params = chat.read_params(body, defaults, form)
        writer = chat.ChatWriter(llm, reader, body, params, _answer_id("chatcmpl", body), model, form)
        writer.has_metrics = has_metrics
        try:
            return await respond(request, [chat.read_chat(llm, body, form)], writer)
        except RequestError as error:
            raise form.explain(error) from None

    return router


def _answer_id(kind: str, body: GenerationRequest) -> str:
    return f"{kind}-{body.request_id or secrets.token_hex(12)}"
