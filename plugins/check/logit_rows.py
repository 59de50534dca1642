"""Rows of logits in each type that models give, and what EntropyGate has to find in them, in float64."""

import numpy as np

from kernel_library import Array

HIGHEST_MAXIMUM = 5e8  # EntropyGate's limit
ANY_TOKEN = -1  # where a row has no softmax


def encode(values: Array, dtype: str) -> Array:
    """float [...] as the type that a model would give: float32, float16, or the uint16 bits of bfloat16."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def decode(logits: Array) -> Array:
    """The float64 values of what encode() made."""
    if logits.dtype == np.uint16:
        return (logits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return logits.astype(np.float64)


def entropy_gate(logits: Array, next_tokens: Array, top_k: int) -> dict[str, Array]:
    """What EntropyGate has to find, in float64: logits [R, V], next_tokens [R]."""
    values = decode(logits)
    lowest = -6e4 if logits.dtype == np.float16 else -HIGHEST_MAXIMUM
    with np.errstate(invalid="ignore"):  # the maximum is NaN if there is one
        has_no_softmax = ~((values.max(-1) >= lowest) & (values.max(-1) <= HIGHEST_MAXIMUM))
    usable = np.where(has_no_softmax[:, None], 0.0, values)
    shifted = usable - usable.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    probs = np.exp(log_probs)
    parts = -probs * np.where(probs > 0, log_probs, 0.0)
    order = np.argsort(-usable, axis=-1, kind="stable")[:, :top_k]
    vocab_size = values.shape[1]
    is_token = (next_tokens >= 0) & (next_tokens < vocab_size)
    token = np.clip(next_tokens, 0, vocab_size - 1)[:, None]
    found = {
        "entropy": parts.sum(-1),
        "entropy_topk": np.take_along_axis(parts, order, -1).sum(-1),
        "argmax_logprob": log_probs.max(-1),
        "token_logprob": np.where(is_token, np.take_along_axis(log_probs, token, -1)[:, 0], np.nan),
    }
    found = {name: np.where(has_no_softmax, np.nan, result) for name, result in found.items()}
    found["top_ids"] = np.where(has_no_softmax[:, None], ANY_TOKEN, order)
    found["top_logprobs"] = np.where(has_no_softmax[:, None], np.nan, np.take_along_axis(log_probs, order, -1))
    return {"argmax": values.argmax(-1), **found}  # NumPy's argmax is the first NaN if there is one
