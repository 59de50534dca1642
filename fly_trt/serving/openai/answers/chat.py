"""/v1/chat/completions: a conversation, by the model's own template, answered n times."""

from typing import Any

from fly_trt.outputs import CompletionOutput, RequestOutput
from fly_trt.params import SamplingParams
from fly_trt.serving.openai.answers.generation import Shared, Writer
from fly_trt.serving.openai.answers.logprobs import ChatLogprobs, prompt_logprobs_object
from fly_trt.serving.openai.pool import PooledEngine
from fly_trt.serving.openai.requests.answer_form import AnswerForm, AnswerReader, ToolCalling
from fly_trt.serving.openai.requests.messages import render_messages
from fly_trt.serving.openai.requests.protocol import ChatCompletionRequest
from fly_trt.serving.openai.requests.sampling import chat_params
from fly_trt.serving.openai.requests.tool_calls import Delta, collect
from fly_trt.text.prompts import TokensPrompt


def read_form(body: ChatCompletionRequest, calling: ToolCalling) -> AnswerForm:
    """Raises ApiError for tools and formats that are not to be had."""
    choice = body.tool_choice
    return calling.read(
        tools=[tool.model_dump() for tool in body.tools or ()],
        tool_choice=choice if choice is None or isinstance(choice, str) else choice.model_dump(),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=body.response_format,
        has_structured_outputs=body.structured_outputs is not None,
    )


async def read_chat(llm: PooledEngine, body: ChatCompletionRequest, form: AnswerForm, developer: str) -> TokensPrompt:
    """The prompt. Raises RequestError for what the template refuses."""
    own = {name: getattr(body, name) for name in ("chat_template", "add_generation_prompt", "documents")}
    own |= form.template_variables
    return await render_messages(llm.llm, body.messages, developer, own, body.chat_template_kwargs)


def read_params(body: ChatCompletionRequest, shared: Shared, form: AnswerForm) -> SamplingParams:
    return chat_params(body, shared.defaults, **shared.sampling(body), **form.sampling)


class ChatWriter(Writer):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    body: ChatCompletionRequest

    def __init__(
        self,
        llm: PooledEngine,
        shared: Shared,
        body: ChatCompletionRequest,
        params: SamplingParams,
        answer_id: str,
        model: str,
        form: AnswerForm,
    ) -> None:
        super().__init__(llm, shared, body, params, answer_id, model)
        self._form = form
        self._readers: dict[int, AnswerReader] = {}  # by the choice's index
        self._logprobs = None
        if params.logprobs is not None:
            as_token_ids = bool(body.return_tokens_as_token_ids)
            self._logprobs = ChatLogprobs(shared.reader, params.logprobs, as_token_ids=as_token_ids)

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        deltas = self._read(index, completion)
        message = {"role": "assistant", **_message(deltas), "refusal": None}
        return {"index": index, "message": message} | self._details(index, completion)

    def chunks(
        self, index: int, output: RequestOutput, completion: CompletionOutput, *, is_first: bool
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if is_first:
            found.append(_chunk(index, {"role": "assistant", "content": ""}))
            if self.body.return_token_ids:
                found[0]["prompt_token_ids"] = output.prompt_token_ids
        if completion.token_ids or completion.text or completion.finish_reason:
            deltas = self._read(index, completion)
            found += [_chunk(index, _delta(delta)) for delta in deltas] or [_chunk(index, {})]
            found[-1] |= self._details(index, completion)
        return found

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs_object(output.prompt_logprobs)
        if self.body.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        return found

    def _read(self, index: int, completion: CompletionOutput) -> list[Delta]:
        """What is new in a choice."""
        reader = self._readers.get(index) or self._readers.setdefault(index, self._form.new_reader())
        return reader.read(completion.text, is_last=completion.finish_reason is not None)

    def _details(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._logprobs.of(completion.token_ids, completion.logprobs or ())
        return {
            "logprobs": logprobs,
            "finish_reason": self._readers[index].finish_reason(completion.finish_reason),
            "stop_reason": completion.stop_reason,
        } | self.additions(completion.token_ids, completion)


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _message(deltas: list[Delta]) -> dict[str, Any]:
    content, calls = collect(deltas)
    if not calls:
        return {"content": content}
    functions = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
    return {"content": content or None, "tool_calls": functions}


def _delta(delta: Delta) -> dict[str, Any]:
    """As a chunk has it: a call's first piece has its id and name, later ones more of its arguments."""
    if delta.index is None:
        return {"content": delta.content}
    if delta.id is None:
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.arguments}}]}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}
