"""The routes that generate text: /v1/completions and /v1/chat/completions."""

import asyncio
import logging

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fly_trt.errors import RequestError
from fly_trt.serving.openai.answers import chat, completions
from fly_trt.serving.openai.answers.generation import Shared, respond
from fly_trt.serving.openai.config import ServerConfig
from fly_trt.serving.openai.http.bodies import JsonRoute
from fly_trt.serving.openai.pool import EnginePool
from fly_trt.serving.openai.requests.answer_form import ToolCalling
from fly_trt.serving.openai.requests.messages import developer_role
from fly_trt.serving.openai.requests.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from fly_trt.serving.openai.requests.sampling import Defaults
from fly_trt.text.chat import ChatTemplate
from fly_trt.text.token_text import TokenReader

logger = logging.getLogger(__name__)


def make_api_router(pool: EnginePool, config: ServerConfig) -> APIRouter:
    """Reads the model's defaults of sampling and its way to call tools once. Raises ConfigError where there is no such
    parser, or where they cannot be sampled with."""
    one = pool.llms[0]  # they are of the same directory
    template = ChatTemplate(one.engine_dir / "tokenizer").source(has_tools=True)
    calling = ToolCalling(config.tool_call_parser, template, one.tokenizer)
    router = APIRouter(route_class=JsonRoute)
    defaults = Defaults.read(one.engine_dir, config.generation_config, config.override_generation_config)
    if one.audits is not None and defaults.is_sampled:
        logger.warning(
            "audits judge greedy answers alone: requests that do not ask for temperature 0 are sampled and left out: "
            """--override-generation-config '{"temperature": 0}' makes those greedy that ask for nothing"""
        )
    shared = Shared(
        reader=TokenReader(one.tokenizer),
        defaults=defaults,
        spec_decode_metrics=config.spec_decode_metrics,
        developer=developer_role(template),
    )

    @router.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        model, llm = config.check_model(body.model), pool.choose()
        params = completions.read_params(body, shared)
        writer = completions.CompletionWriter(llm, shared, body, params, _answer_id("cmpl", body, request), model)
        prompts = completions.read_prompts(body.prompt)
        completions.check_number(prompts, params, llm)
        return await respond(request, prompts, writer)

    @router.post("/v1/chat/completions")
    async def answer_chat(body: ChatCompletionRequest, request: Request) -> Response:
        model, llm = config.check_model(body.model), pool.choose()
        form = chat.read_form(body, calling)
        params = chat.read_params(body, shared, form)
        writer = chat.ChatWriter(llm, shared, body, params, _answer_id("chatcmpl", body, request), model, form)
        prompt = await chat.read_chat(llm, body, form, shared.developer)
        try:
            return await respond(request, [prompt], writer)
        except RequestError as error:
            raise await asyncio.to_thread(form.explain, error, llm.compile_grammar) from None

    return router


def _answer_id(kind: str, body: GenerationRequest, request: Request) -> str:
    """By which the request is found in the log."""
    return f"{kind}-{body.request_id or request.state.exchange.request_id}"
