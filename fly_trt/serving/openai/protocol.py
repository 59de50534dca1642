"""What clients send, as pydantic models. Unknown fields are refused by name."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    stream: bool = False


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str


class ChatCompletionRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
