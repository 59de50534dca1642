"""What a chat's messages are for a template: texts, roles, and tool calls with their arguments as objects."""

import asyncio
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fly_trt.async_llm import AsyncLLM
from fly_trt.errors import RequestError
from fly_trt.service.admission import LONG_PROMPT
from fly_trt.serving.openai.requests.protocol import Message, ToolCall
from fly_trt.text.prompts import TokensPrompt

TEXT_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}


# What the template gets from other fields of a body.
OWN_VARIABLES = ("messages", "tools", "chat_template", "add_generation_prompt", "documents", "continue_final_message")


async def render_messages(
    llm: AsyncLLM,
    messages: Sequence[Message],
    developer: str,
    own: Mapping[str, Any],
    chat_template_kwargs: Mapping[str, Any] | None,
) -> TokensPrompt:
    """The prompt; a long one is made beside the event loop. developer: see developer_role. own: the variables of the
    template that other fields of the body say, None where they do not. Raises RequestError for what it refuses."""
    given = dict(chat_template_kwargs or {})
    if taken := sorted(given.keys() & set(OWN_VARIABLES)):
        raise RequestError(f"chat_template_kwargs: {taken[0]!r} is a field of its own: give it there")
    given |= {name: value for name, value in own.items() if value is not None}
    found = template_messages(messages, developer)
    render = functools.partial(llm.render_chat, found, **given)
    is_long = sum(len(message["content"]) for message in found) > LONG_PROMPT
    return await asyncio.to_thread(render) if is_long else render()


def developer_role(template: str) -> str:
    """The role that a template knows OpenAI's newer name of the system as."""
    return "developer" if "developer" in template else "system"


def template_messages(messages: Sequence[Message], developer: str) -> list[Any]:
    """developer: see developer_role. Raises RequestError, with the message's number, for what no text model reads."""
    roles = {"developer": developer}
    return [
        _template_message(f"messages[{number}]", message, roles.get(message.role, message.role))
        for number, message in enumerate(messages)
    ]


def _template_message(name: str, message: Message, role: str) -> dict[str, Any]:
    found: dict[str, Any] = {"role": role, "content": _text(name, message)}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        if message.role != "assistant":
            raise RequestError(f"{name}.tool_calls: of role {message.role!r}, expected assistant")
        found["tool_calls"] = [
            _tool_call(f"{name}.tool_calls[{number}]", call) for number, call in enumerate(message.tool_calls)
        ]
    return found


def _text(name: str, message: Message) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return message.refusal or ""
        raise RequestError(f"{name}.content: missing for role {message.role!r}: expected a text")
    return "".join(_part(f"{name}.content[{number}]", part) for number, part in enumerate(content))


def _part(name: str, part: dict[str, Any]) -> str:
    kind = part.get("type")
    key = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise RequestError(f"{name}.type {kind!r}: this model reads texts alone: expected 'text'")
    text = part.get(key)
    if not isinstance(text, str) or part.keys() - {"type", key}:
        raise RequestError(f"{name}: expected {{'type': {kind!r}, {key!r}: '...'}}")
    return text


def _tool_call(name: str, call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}.function.arguments: not JSON ({error}): send what the model called with") from None
    return {
        "type": "function",
        "id": call.id,
        "function": {"name": call.function.name, "arguments": arguments},
    }
