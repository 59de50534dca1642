"""Small documents of traces, as files have them."""

import json
from typing import Any


def token_of(**fields: Any) -> dict[str, Any]:
    """One token, plain but for what is given."""
    plain = {"kind": "plain", "source": None, "round": 0, "entropy": None, "token": "x", "token_id": 5, "choice": 5}
    return plain | {"choice_token": "x"} | fields


def request_of(*tokens: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """One request; tokens in rounds of their own unless they say otherwise."""
    numbered = [token_of(**({"round": at} | token)) for at, token in enumerate(tokens)]
    return {"name": "a request", "source": "LLM", "text": "", "tokens": numbered} | fields


def document_of(*tokens: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"format": "fly-trt trace", "version": 1, "requests": [request_of(*tokens, **fields)]}


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()
