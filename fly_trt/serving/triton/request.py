"""A client's tensors as a prompt with SamplingParams, and outputs of the runtime as tensors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fly_trt.acceptance import AcceptanceParams, acceptance_settings
from fly_trt.errors import RequestError
from fly_trt.grammar import StructuredOutputs
from fly_trt.outputs import CompletionOutput, RequestOutput
from fly_trt.params import RequestOutputKind, SamplingParams, request_settings
from fly_trt.serving.triton.tensors import INPUTS
from fly_trt.text.prompts import Prompt

Array = npt.NDArray[Any]

ALIASES = {"min_length": "min_tokens", "random_seed": "seed"}
SAMPLING = {name: name for name in ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed")} | {
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "num_return_sequences": "n",
    "num_draft_tokens": "num_speculative_tokens",
}
# TensorRT-LLM's guided_decoding_guide_type as a field of StructuredOutputs; "json" is any JSON and has no guide.
GUIDES = {"json": "json", "json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}
# What Triton's frontends put among a request's parameters themselves.
PROTOCOL_PARAMETERS = frozenset(
    ("id", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output")
)
NO_END_ID = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientRequest:
    """What a client asked for. `includes_input`: the prompt precedes the output, in text and in ids. `pad_id` fills
    the ids of the shorter ones of several sequences; a negative one means 0."""

    prompt: Prompt
    params: SamplingParams
    includes_input: bool = False
    pad_id: int = 0

    @property
    def is_streamed(self) -> bool:
        return self.params.output_kind is RequestOutputKind.DELTA


def read_request(tensors: Mapping[str, Array], parameters: str, *, exclude_input_in_output: bool) -> ClientRequest:
    """The request that `tensors` of INPUTS' types say, each [1, d].

    parameters: the request's parameters as JSON; over HTTP every unknown name of the body becomes one. Raises
    RequestError or ConfigError for what cannot be served as asked.
    """
    _check_parameters(parameters)
    given = _read_tensors(tensors)
    is_streamed = given.pop("stream", False)
    excludes_input = given.pop("exclude_input_in_output", exclude_input_in_output)
    pad_id = given.pop("pad_id", 0)
    if given.pop("beam_width", 1) != 1:
        raise RequestError("beam_width: there is no beam search: use 1, or num_return_sequences for several samples")
    prompt = _prompt(given)
    own = {name: given.pop(name) for name in request_settings() if name in given}
    acceptance = {name: own.pop(name) for name in acceptance_settings() if name in own}
    settings = {target: given.pop(source) for source, target in SAMPLING.items() if source in given}
    params = SamplingParams(
        **_sampling(settings),
        **_end(given.pop("end_id", None)),
        stop=[word for word in given.pop("stop_words", ()) if word],
        bad_words=[word for word in given.pop("bad_words", ()) if word] or None,
        logprobs=0 if given.pop("return_log_probs", False) else None,
        structured_outputs=_guide(
            given.pop("guided_decoding_guide_type", None), given.pop("guided_decoding_guide", None)
        ),
        acceptance=AcceptanceParams(**acceptance) if acceptance else None,
        **own,
        output_kind=RequestOutputKind.DELTA if is_streamed else RequestOutputKind.FINAL_ONLY,
    )
    assert not given, given
    return ClientRequest(
        prompt=prompt, params=params, includes_input=not (excludes_input or is_streamed), pad_id=max(pad_id, 0)
    )


@dataclass(slots=True)
class ResponseWriter:
    """Turns a request's outputs into tensors, one after another."""

    request: ClientRequest
    tokenizer: Tokenizer
    _log_probs: list[float] = field(default_factory=list)
    _finish_reasons: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self._finish_reasons = dict.fromkeys(range(self.request.params.n), "")

    def tensors(self, output: RequestOutput) -> dict[str, Array]:
        """Of OUTPUTS by name. Of a streamed request they hold what is new; counts come with the last output."""
        num_sequences = self.request.params.n
        completions = [CompletionOutput(index, "", []) for index in range(num_sequences)]
        for completion in output.outputs:
            completions[completion.index] = completion
        texts = [completion.text for completion in completions]
        ids = [completion.token_ids for completion in completions]
        if self.request.includes_input:
            prompt = output.prompt
            if prompt is None:
                prompt = self.tokenizer.decode(output.prompt_token_ids)
            texts = [prompt + text for text in texts]
            ids = [output.prompt_token_ids + sequence for sequence in ids]
        tensors = {
            "text_output": _strings(texts),
            "output_ids": _padded(ids, self.request.pad_id, np.int32),
            "sequence_length": np.array([[len(sequence) for sequence in ids]], np.int32),
        }
        if self.request.params.logprobs is not None:
            tensors |= self._log_prob_tensors(completions)
        for completion in output.outputs:
            self._finish_reasons[completion.index] = completion.finish_reason or ""
        if output.finished:
            tensors |= _counts(output) | {
                "finish_reason": _strings(list(self._finish_reasons.values())),
                "exact_because": _strings([output.metrics.exact_because or ""]),
            }
        return tensors

    def _log_prob_tensors(self, completions: Sequence[CompletionOutput]) -> dict[str, Array]:
        """Of the output tokens; the cumulative ones since the start, also in a stream."""
        found = [
            [entry[token].logprob for token, entry in zip(c.token_ids, c.logprobs or (), strict=True)]
            for c in completions
        ]
        before = self._log_probs or [0.0] * len(completions)
        self._log_probs = [total + sum(values) for total, values in zip(before, found, strict=True)]
        return {
            "output_log_probs": _padded(found, 0.0, np.float32),
            "cum_log_probs": np.array([self._log_probs], np.float32),
        }


def _counts(output: RequestOutput) -> dict[str, Array]:
    metrics = output.metrics
    counts = {
        "num_input_tokens": len(output.prompt_token_ids),
        "num_output_tokens": metrics.num_output_tokens,
        "total_draft_tokens": metrics.num_draft_tokens,
        "total_accepted_draft_tokens": metrics.num_accepted_tokens,
        "total_loosened_tokens": metrics.num_loosened_tokens,
        "total_saved_tokens": metrics.num_saved_tokens,
        "total_refused_loosenings": sum(metrics.num_refused_loosenings_by_guard.values()),
    }
    rate = metrics.num_accepted_tokens / metrics.num_draft_tokens if metrics.num_draft_tokens else 0.0
    return {name: np.array([[count]], np.int32) for name, count in counts.items()} | {
        "acceptance_rate": np.array([[rate]], np.float32),
        "guards": np.array([[json.dumps(metrics.guards).encode()]], np.object_),
    }


def _check_parameters(parameters: str) -> None:
    """A misspelt name must not be taken for a default. Names with a hyphen are HTTP headers that an operator had
    forwarded."""
    known = [spec.name for spec in INPUTS]
    for name in json.loads(parameters or "{}"):
        meant = name.replace("-", "_")
        if meant in known:
            raise RequestError(f"{name!r} is a parameter of this request: send it as the input {meant}")
        if name not in PROTOCOL_PARAMETERS and name.isidentifier() and not name.startswith("triton_"):
            raise RequestError(f"unknown input {name!r}: expected one of {', '.join(known)}")


def _read_tensors(tensors: Mapping[str, Array]) -> dict[str, Any]:
    """Python values by name, of older names under the newer ones."""
    given: dict[str, Any] = {}
    for spec in INPUTS:
        if spec.name not in tensors:
            continue
        values = [_value(spec.name, item) for item in tensors[spec.name].reshape(-1)]
        name = ALIASES.get(spec.name, spec.name)
        if name in given:
            raise RequestError(f"{spec.name}: the same as {name}: give one of them")
        given[name] = values if spec.is_list else values[0]
    return given


def _value(name: str, item: Any) -> Any:
    if isinstance(item, bytes):
        try:
            return item.decode()
        except UnicodeError as error:
            raise RequestError(f"{name}: not UTF-8 text ({error}): convert it") from None
    # Shortest decimals: 0.3 in float32 is the 0.3 of a Python caller, so both get the same tokens.
    return float(str(item)) if isinstance(item, np.floating) else item.item() if isinstance(item, np.generic) else item


def _prompt(given: dict[str, Any]) -> Prompt:
    text, token_ids = given.pop("text_input", None), given.pop("input_ids", None)
    if (text is None) == (token_ids is None):
        got = "neither" if text is None else "both"
        raise RequestError(f"a prompt is text_input or input_ids, got {got}: give one of them")
    return text if token_ids is None else {"prompt_token_ids": token_ids}


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """TensorRT-LLM's conventions: top_p 0 is off, and top_k, top_p or min_p without a temperature sample at 1."""
    if settings.get("top_p") == 0:
        del settings["top_p"]
    truncates = settings.get("top_k", 0) > 1 or settings.get("top_p", 1) < 1 or settings.get("min_p", 0) > 0
    if "temperature" not in settings and truncates:
        settings["temperature"] = 1.0
    return settings


def _end(end_id: int | None) -> dict[str, Any]:
    """end_id stands for the model's own end-of-sequence tokens."""
    if end_id is None:
        return {}
    return {"ignore_eos": True, "stop_token_ids": None if end_id == NO_END_ID else [end_id]}


def _guide(guide_type: str | None, guide: str | None) -> StructuredOutputs | None:
    guide = guide or None
    if guide_type is None and guide is None:
        return None
    if guide_type not in GUIDES:
        raise RequestError(f"guided_decoding_guide_type {guide_type!r}: expected one of {', '.join(GUIDES)}")
    if (guide is None) != (guide_type == "json"):
        how = "has no guide: leave it out, or use json_schema" if guide else "needs a guided_decoding_guide"
        raise RequestError(f"guided_decoding_guide_type {guide_type!r}: {how}")
    return StructuredOutputs.from_dict({GUIDES[guide_type]: guide or True})


def _strings(texts: Sequence[str]) -> Array:
    return np.array([text.encode() for text in texts], np.object_)


def _padded(rows: Sequence[Sequence[float]], fill: float, dtype: type[np.generic]) -> Array:
    """[1, rows, longest row]."""
    array = np.full((1, len(rows), max(map(len, rows))), fill, dtype)
    for index, row in enumerate(rows):
        array[0, index, : len(row)] = row
    return array
