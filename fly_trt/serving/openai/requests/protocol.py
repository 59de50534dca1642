"""What clients send, as pydantic models: OpenAI's fields, vLLM's beside them, and the settings of acceptance and
drafting as they are declared. Wrong types and unknown names are refused with the field's name. What a value means, and
whether it can be served, is decided elsewhere.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from fly_trt.params import request_settings
from fly_trt.settings import Setting

REQUEST_ID = r"^[A-Za-z0-9_.:-]{1,128}$"

# What would change the answer and is not there, by name: why, and the values that ask for nothing.
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "best_of": ("there is no choice among completions: use n", (1,)),
    "suffix": ("text is only continued: leave it out", ("",)),
    "use_beam_search": ("there is no beam search: use n and a temperature", (False,)),
    "length_penalty": ("there is no beam search: leave it out", (1, 1.0)),
    "priority": ("requests are served in the order in which they come: leave it out", (0,)),
    "truncate_prompt_tokens": ("prompts are not cut: shorten it", ()),
    "allowed_token_ids": ("use structured_outputs or logit_bias", ()),
    "continue_final_message": ("the template is applied to whole messages: use /v1/completions", (False,)),
    "functions": ("use tools", ([],)),
    "function_call": ("use tool_choice", ("none",)),
    "modalities": ("answers are texts: leave it out", (["text"],)),
    "audio": ("answers are texts: leave it out", ()),
    "prediction": ("drafts come from the engine's own drafter: leave it out", ()),
    "reasoning_effort": ("give it in chat_template_kwargs where the model's template reads it", ()),
    "verbosity": ("give it in chat_template_kwargs where the model's template reads it", ()),
    "web_search_options": ("there is no search: leave it out", ()),
    "store": ("answers are not kept: leave it out", (False,)),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _type_of(declared: Setting) -> Any:
    return list[declared.kind] | None if declared.is_list else declared.kind | None  # type: ignore[name-defined]


def _refusing(why: str, neutral: tuple[Any, ...]) -> Any:
    def check(value: Any) -> Any:
        if value is not None and value not in neutral:
            raise ValueError(f"not supported: {why}")
        return value

    return Annotated[Any, AfterValidator(check)]


_FIELDS: dict[str, Any] = {
    **{name: (_type_of(declared), None) for name, declared in request_settings().items()},
    **{name: (_refusing(*refused), None) for name, refused in REFUSED.items()},
}
_Declared: Any = create_model("_Declared", __base__=_Strict, **_FIELDS)


class StreamOptions(_Strict):
    """include_usage: a last chunk says what the request used. continuous_usage_stats: every chunk does."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # nothing is padded


class GenerationRequest(_Declared):  # type: ignore[misc]
    """What /v1/completions and /v1/chat/completions have in common. None means as by default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: Annotated[str, Field(pattern=REQUEST_ID)] | None = None

    rejection_sample_method: Literal["fly", "standard"] | None = None
    fly_entropy_top_k: int | None = None
    num_speculative_tokens: int | None = None
    speculation_trace: bool | None = None

    # Without a meaning here, and without harm.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


def _is_flat(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is kind for value in values)


def _check_prompt(prompt: Any) -> Any:
    """In one look: a union of lists would report each of 10,000 items four times."""
    is_one = isinstance(prompt, str) or _is_flat(prompt, int)
    is_list = isinstance(prompt, list) and bool(prompt)
    if not (is_one or _is_flat(prompt, str) or (is_list and all(_is_flat(each, int) for each in prompt))):
        raise ValueError("expected a text, a list of token ids, or a non-empty list of texts or of lists of token ids")
    return prompt


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[Any, AfterValidator(_check_prompt)]
    echo: bool | None = None
    logprobs: int | None = None


class FunctionCall(_Strict):
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """A call that the assistant made in an earlier message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # where a client kept the pieces of a stream


class Message(_Strict):
    """One message of a conversation, also one that was an answer before."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionTool(_Strict):
    """parameters: a JSON Schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(_Strict):
    name: str


class NamedTool(_Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    documents: list[dict[str, Any]] | None = None
