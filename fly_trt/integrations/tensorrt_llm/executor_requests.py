"""What a request of fly-trt is as a request of TensorRT-LLM's C++ Executor, and what cannot be one.

The rule is in the target's engine: it raises the logits of draft tokens that it lets pass, and the runtime accepts a
draft token iff it is the token that it samples of them. So there is one rule for all requests, and whatever looks at
logits, or changes them after the engine, would look at something else than fly-trt promises: such a setting is refused
by its name.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fly_trt.drafting import NO_STOP
from fly_trt.errors import RequestError
from fly_trt.runtime.request import Request
from fly_trt.runtime.sampler import draw_seed
from fly_trt.tokens import IntArray
from fly_trt.verification import EXACT, MIN_TEMPERATURE, AcceptancePolicy

OF_REWRITTEN_LOGITS = "the engine's logits are rewritten where a draft token is let pass"
AFTER_THE_RULE = "TensorRT-LLM would apply it after the rule has looked at the logits"
REFUSED: dict[str, tuple[object, str]] = {
    "logprobs": (None, OF_REWRITTEN_LOGITS),
    "prompt_logprobs": (None, OF_REWRITTEN_LOGITS),
    "presence_penalty": (0, AFTER_THE_RULE),
    "frequency_penalty": (0, AFTER_THE_RULE),
    "repetition_penalty": (1, AFTER_THE_RULE),
    "logit_bias": (None, AFTER_THE_RULE),
    "bad_words": (None, AFTER_THE_RULE),
    "speculation_trace": (False, "TensorRT-LLM does not say what its target chose"),
    "draft_stop": (NO_STOP, "a round has as many draft tokens as it asks for"),
    "draft_stop_threshold": (None, "a round has as many draft tokens as it asks for"),
}
SEEDS = 1 << 64


class RequestForms:
    """`bindings` is `tensorrt_llm.bindings.executor`. policy: the rule that the target was built with, EXACT where it
    lets nothing pass; stop_token_ids: those that it never loosens."""

    def __init__(self, bindings: Any, policy: AcceptancePolicy, stop_token_ids: frozenset[int]) -> None:
        self._bindings = bindings
        self._policy = policy
        self._stop_token_ids = stop_token_ids
        self._greedy = bindings.SamplingConfig(top_k=1)

    def check(self, request: Request, num_draft: int) -> None:
        """Raises RequestError for what cannot be had, by the name of the setting. num_draft: draft tokens a round."""
        params = request.params
        for name, (usual, reason) in REFUSED.items():
            if (value := getattr(params, name)) not in (usual, None, {}, [], ()):
                raise RequestError(f"{name} {value!r}: cannot be had of TensorRT-LLM engines, {reason}: leave it out")
        if params.structured_outputs is not None:
            raise RequestError(
                f"structured_outputs: cannot be had of TensorRT-LLM engines, {AFTER_THE_RULE}: leave it out, or build "
                "for backend tensorrt"
            )
        if params.min_tokens and request.end_token_ids:
            raise RequestError(
                f"min_tokens {params.min_tokens}: cannot be had of TensorRT-LLM engines, to which each round is a "
                "request of its own: leave it out, or add ignore_eos=True"
            )
        if request.guards is not None:
            raise RequestError(
                "exact_first, exact_token_ids, exact_within, max_loosened_per_100: cannot be had of TensorRT-LLM "
                "engines, whose rule is built in: leave them out"
            )
        if not num_draft:
            return  # without drafts no rule has anything to decide
        if exact_or(request.policy) != self._policy:
            raise RequestError(
                f"acceptance {rule_name(request.policy)}: the engine was built with {rule_name(self._policy)}: leave "
                "it out, rebuild with that rule, or ask for num_speculative_tokens=0, which is exact"
            )
        if self._policy.is_loose and (unknown := sorted(request.stop_token_ids - self._stop_token_ids)):
            raise RequestError(
                f"stop_token_ids {unknown}: the engine was built never to loosen {sorted(self._stop_token_ids)} alone: "
                "leave them out, use stop, or rebuild with them in the checkpoint's generation_config.json"
            )

    def target(
        self, request: Request, draft: Sequence[int], max_tokens: int, seed: int, *, is_first: bool, streams: bool
    ) -> Any:
        """Asks for what becomes of a draft after all committed tokens, or without one for the next tokens."""
        length = len(request.sequence)
        sampling = self._sampling(request, (seed % SEEDS, request.index, length))
        return self._request(request.sequence.tokens, draft, max_tokens, sampling, measures=is_first, streams=streams)

    def draft(self, context: IntArray, guess: Sequence[int], max_tokens: int) -> Any:
        """Asks for the draft model's most probable tokens after `context`, of which the first ones may be `guess`."""
        return self._request(context, guess, max_tokens, self._greedy)

    def _request(
        self,
        tokens: IntArray,
        draft: Sequence[int],
        max_tokens: int,
        sampling: Any,
        *,
        measures: bool = False,
        streams: bool = False,
    ) -> Any:
        bindings = self._bindings
        # No end_id: where a sequence ends is for the one to say that knows all its end tokens and stop strings.
        return bindings.Request(
            input_token_ids=tokens.tolist(),
            max_tokens=max_tokens,
            streaming=streams,
            sampling_config=sampling,
            output_config=bindings.OutputConfig(exclude_input_from_output=True, return_perf_metrics=measures),
            external_draft_tokens_config=bindings.ExternalDraftTokensConfig(tokens=list(draft)) if draft else None,
        )

    def _sampling(self, request: Request, entropy: tuple[int, int, int]) -> Any:
        params = request.params
        if params.temperature < MIN_TEMPERATURE:
            return self._greedy
        # Each round is a request of its own, whose random numbers begin anew with its seed.
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        return self._bindings.SamplingConfig(
            top_k=max(0, params.top_k),
            top_p=params.top_p,
            min_p=params.min_p or None,
            temperature=params.temperature,
            seed=seed,
        )


def seed_of(request: Request) -> int:
    """The request's own, or one that is drawn."""
    return draw_seed() if request.params.seed is None else request.params.seed


def exact_or(policy: AcceptancePolicy) -> AcceptancePolicy:
    """A rule that lets nothing pass is the exact one, whatever its name."""
    return policy if policy.is_loose else EXACT


def rule_name(policy: AcceptancePolicy) -> str:
    """For errors: its numbers, where it has some."""
    return repr(policy) if policy.is_loose else EXACT.name
