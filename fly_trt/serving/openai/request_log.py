"""What a log says of the prompts that are sent to the engines: how long they were, and what was asked for.

Texts come into no log but where `log_texts` says so.
"""

import dataclasses
import logging
from collections.abc import Mapping
from enum import Enum
from typing import Any

from fly_trt.outputs import RequestOutput
from fly_trt.params import SamplingParams
from fly_trt.serving.openai.http.exchange import CURRENT
from fly_trt.text.prompts import Prompt

logger = logging.getLogger(__name__)


class RequestLog:
    """Notes of each prompt how long it was, and writes its parameters where `log_requests`. Is EnginePool.observe."""

    def __init__(self, *, log_requests: bool, log_texts: bool) -> None:
        self._log_requests = log_requests or log_texts
        self._log_texts = log_texts

    def __call__(self, prompt: Prompt, params: SamplingParams, output: RequestOutput | None) -> None:
        exchange = CURRENT.get()
        if output is not None and exchange is not None:
            exchange.num_prompt_tokens += len(output.prompt_token_ids)
            exchange.num_output_tokens += output.metrics.num_output_tokens
        if not self._log_requests:
            return
        request_id = None if exchange is None else exchange.request_id
        if output is None:
            logger.info("request %s: %s", request_id, describe_request(prompt, params, with_texts=self._log_texts))
        elif self._log_texts:
            texts = [completion.text for completion in output.outputs]
            logger.info("request %s: answered %r", request_id, texts)


def describe_request(prompt: Prompt, params: SamplingParams, *, with_texts: bool) -> str:
    """The prompt's size and what was asked for; of texts, schemas and words nothing but how many there are."""
    if with_texts:
        size = f"prompt {prompt!r}"
    elif isinstance(prompt, str):
        size = f"prompt of {len(prompt)} characters"
    else:
        size = f"prompt of {len(prompt['prompt_token_ids'])} tokens"
    parts = [f"{name}={_shown(value, with_texts)}" for name, value in _given(params).items()]
    return ", ".join([size, *parts])


def _given(params: SamplingParams) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(params) if field.init]
    values = {field.name: getattr(params, field.name) for field in fields}
    return {field.name: values[field.name] for field in fields if values[field.name] != field.default}


def _shown(value: Any, with_texts: bool) -> str:
    if with_texts or value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, Enum):
        return str(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        kept = {name: _named(name, one) for name, one in given.items() if one is not None}
        return "{" + ", ".join(f"{name}={one}" for name, one in kept.items()) + "}"
    if isinstance(value, (list, tuple, set, frozenset, Mapping)):
        return f"[{len(value)}]"
    return f"<{type(value).__name__}>"


def _named(name: str, value: Any) -> str:
    """Of settings that are names of rules the name; they were checked against the table of those that there are."""
    return str(value) if name in ("acceptance", "preset") and isinstance(value, str) else _shown(value, False)
