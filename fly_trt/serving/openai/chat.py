"""/v1/chat/completions: a conversation, by the model's own template, answered n times."""

from typing import Any

from fly_trt.errors import RequestError
from fly_trt.outputs import CompletionOutput, RequestOutput
from fly_trt.params import SamplingParams
from fly_trt.serving.openai.generation import Writer, output_kind
from fly_trt.serving.openai.logprobs import ChatLogprobs, prompt_logprobs_object
from fly_trt.serving.openai.messages import template_messages
from fly_trt.serving.openai.pool import PooledEngine
from fly_trt.serving.openai.protocol import ChatCompletionRequest
from fly_trt.serving.openai.sampling import Defaults, chat_params
from fly_trt.serving.openai.token_text import TokenReader
from fly_trt.text.prompts import TokensPrompt

# What the template gets from other fields of a body.
OWN_VARIABLES = ("messages", "tools", "chat_template", "add_generation_prompt", "documents", "continue_final_message")


def read_chat(llm: PooledEngine, body: ChatCompletionRequest) -> TokensPrompt:
    """The prompt. Raises RequestError for what the template refuses."""
    variables = dict(body.chat_template_kwargs or {})
    if taken := sorted(variables.keys() & set(OWN_VARIABLES)):
        raise RequestError(f"chat_template_kwargs: {taken[0]!r} is a field of its own: leave it out")
    for name in ("chat_template", "add_generation_prompt", "documents"):
        if getattr(body, name) is not None:
            variables[name] = getattr(body, name)
    prompt: TokensPrompt = llm.render_chat(template_messages(body.messages), **variables)
    return prompt


def read_params(body: ChatCompletionRequest, defaults: Defaults) -> SamplingParams:
    for name in ("tools", "tool_choice", "response_format"):
        value = getattr(body, name)
        if value and value not in ("none", {"type": "text"}):
            raise RequestError(f"{name}: not supported: leave it out")
    return chat_params(body, defaults, output_kind=output_kind(body))


class ChatWriter(Writer):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    body: ChatCompletionRequest

    def __init__(
        self,
        llm: PooledEngine,
        reader: TokenReader,
        body: ChatCompletionRequest,
        params: SamplingParams,
        answer_id: str,
        model: str,
    ) -> None:
        super().__init__(llm, reader, body, params, answer_id, model)
        self._logprobs = None
        if params.logprobs is not None:
            as_token_ids = bool(body.return_tokens_as_token_ids)
            self._logprobs = ChatLogprobs(reader, params.logprobs, as_token_ids=as_token_ids)

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        return {"index": index, "message": message} | self._details(completion)

    def chunks(
        self, index: int, output: RequestOutput, completion: CompletionOutput, *, is_first: bool
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if is_first:
            delta = {"role": "assistant", "content": ""}
            found.append({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
        if completion.token_ids or completion.text or completion.finish_reason:
            text = {"content": completion.text} if completion.text else {}
            found.append({"index": index, "delta": text} | self._details(completion))
        return found

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs_object(output.prompt_logprobs)
        if self.body.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        return found

    def _details(self, completion: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._logprobs.of(completion.token_ids, completion.logprobs or ())
        return {
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        } | self.additions(completion.token_ids, completion)
