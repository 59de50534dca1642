"""From a body to SamplingParams: OpenAI's defaults, the model's own over them, and what the body says over both.

The model's own are those of generation_config.json in the engine directory, as `vllm serve --generation-config auto`
takes them; they are read once, when the server starts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fly_trt.acceptance import AcceptanceParams, acceptance_settings
from fly_trt.errors import ConfigError, RequestError
from fly_trt.params import MAX_LOGPROBS, SamplingParams, request_settings
from fly_trt.serving.openai.requests.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest

NO_CONFIG = "vllm"  # vLLM's name for its own defaults
TEMPERATURE = 1.0
COMPLETION_TOKENS = 16
MAX_DIGITS = 10  # of a token id
# Of a generation_config.json, by the name that they have here; everything else in it is not about sampling, or is the
# engine's own (its end tokens).
GENERATION_CONFIG = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
ACCEPTANCE = {*acceptance_settings(), "fly_entropy_top_k"}
REJECTION_SAMPLE_METHODS = {"fly": {"acceptance": "fly", "preset": "vllm"}, "standard": {"acceptance": "exact"}}
PLAIN = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "bad_words",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
    "num_speculative_tokens",
    "speculation_trace",
    "structured_outputs",
    *(name for name in request_settings() if name not in ACCEPTANCE),
)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request has where its body says nothing, by the names of SamplingParams."""

    values: Mapping[str, Any]

    @classmethod
    def read(cls, engine_dir: Path, generation_config: str, override: Mapping[str, Any]) -> "Defaults":
        """generation_config: "auto" is the engine directory's, "vllm" leaves it out, anything else is a folder that has
        one. override: over it, by the same names. Raises ConfigError for what cannot be sampled with."""
        values: dict[str, Any] = {"temperature": TEMPERATURE}
        if generation_config != NO_CONFIG:
            is_own = generation_config == "auto"
            path = (engine_dir if is_own else Path(generation_config)) / "generation_config.json"
            values |= _known(_read(path, may_be_missing=is_own), str(path))
        unknown = sorted(override.keys() - GENERATION_CONFIG.keys())
        if unknown:
            known = ", ".join(GENERATION_CONFIG)
            raise ConfigError(f"override_generation_config: unknown field {unknown[0]!r}: expected one of {known}")
        return cls(values | _known(override, "override_generation_config"))

    @property
    def is_sampled(self) -> bool:
        """Whether a request that says nothing is."""
        return bool(self.values["temperature"] > 0)


def _read(path: Path, *, may_be_missing: bool) -> dict[str, Any]:
    if may_be_missing and not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: not readable ({error}): mend it, or serve with generation_config {NO_CONFIG}"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _known(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    values = {ours: config[name] for name, ours in GENERATION_CONFIG.items() if config.get(name) is not None}
    try:
        SamplingParams(**values)
    except RequestError as error:
        raise ConfigError(f"{source}: {error}: mend it, or override it") from None
    return values


def completion_params(body: CompletionRequest, defaults: Defaults, **more: Any) -> SamplingParams:
    """`more`: fields of SamplingParams that the caller decides. Raises FlyError for what cannot be served."""
    fallback = {"max_tokens": COMPLETION_TOKENS, **defaults.values}
    return _params(body, fallback, {"max_tokens": body.max_tokens, "logprobs": body.logprobs} | more)


def chat_params(body: ChatCompletionRequest, defaults: Defaults, **more: Any) -> SamplingParams:
    """As completion_params; an answer may have as many tokens as max_seq_len leaves."""
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise RequestError("max_tokens and max_completion_tokens: the same setting: give one of them")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(f"top_logprobs {body.top_logprobs}: has no effect without logprobs: add logprobs=true")
    if not 0 <= (body.top_logprobs or 0) <= MAX_LOGPROBS:
        raise RequestError(f"top_logprobs {body.top_logprobs}: expected 0 to {MAX_LOGPROBS}")
    fallback = {"max_tokens": None, **defaults.values}
    own = {
        "max_tokens": next(iter(limits), None),
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
    return _params(body, fallback, own | more)


def _params(body: GenerationRequest, fallback: Mapping[str, Any], own: Mapping[str, Any]) -> SamplingParams:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: has no effect without stream: add stream=true")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs: not in a stream: leave out stream")
    given = {name: getattr(body, name) for name in PLAIN} | dict(own)
    acceptance = {name: value for name in ACCEPTANCE if (value := getattr(body, name)) is not None}
    if body.rejection_sample_method is not None:
        acceptance = {**REJECTION_SAMPLE_METHODS[body.rejection_sample_method], **acceptance}
    if body.logit_bias is not None:
        given["logit_bias"] = {_token_id(token): bias for token, bias in body.logit_bias.items()}
    if acceptance:
        given["acceptance"] = AcceptanceParams(**acceptance)
    return SamplingParams(**{**fallback, **{name: value for name, value in given.items() if value is not None}})


def _token_id(token: str) -> int:
    if not (token.isascii() and token.isdigit() and len(token) <= MAX_DIGITS):
        raise RequestError(f"logit_bias {token[:MAX_DIGITS]!r}: expected a token id, such as '42'")
    return int(token)
