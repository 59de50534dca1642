"""What a request used and what speculation did for it, for answers and for the last chunk of a stream."""

from collections.abc import Sequence
from typing import Any

from fly_trt.acceptance import AcceptanceParams
from fly_trt.outputs import RequestMetrics
from fly_trt.params import SamplingParams, SpeculativeConfig
from fly_trt.serving.openai.answers.speculation import speculative_decoding_object
from fly_trt.verification import AcceptancePolicy


def usage_object(metrics: Sequence[RequestMetrics]) -> dict[str, Any]:
    """Of a request's prompts, each with all its completions. Only what the target verified counts as predicted."""
    prompt = sum(each.num_prompt_tokens for each in metrics)
    completion = sum(each.num_output_tokens for each in metrics)
    drafted = sum(each.num_draft_tokens for each in metrics)
    accepted = sum(each.num_accepted_tokens for each in metrics)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(each.num_cached_tokens for each in metrics)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


def metrics_object(
    metrics: Sequence[RequestMetrics], params: SamplingParams, config: SpeculativeConfig
) -> dict[str, Any]:
    """vLLM's object, null for several sequences, and beside it what vLLM has no field for."""
    total = metrics[0].merged(list(metrics[1:]))
    asked = params.num_speculative_tokens
    num_spec_tokens = 0 if config.method is None else config.num_speculative_tokens if asked is None else asked
    is_one = len(metrics) == params.n == 1
    found = speculative_decoding_object(total, num_spec_tokens, params.detailed_metrics) if is_one else None
    return {
        "speculative_decoding": found,
        "acceptance": _acceptance_name(params.acceptance_params.over(config)),
        "exact_because": total.exact_because,
        "guards": total.guards,
        "num_loosened_tokens": total.num_loosened_tokens,
        "num_saved_tokens": total.num_saved_tokens,
        "num_refused_loosenings_by_guard": total.num_refused_loosenings_by_guard,
        "num_draft_tokens_by_source": total.num_draft_tokens_by_source,
        "num_accepted_tokens_by_source": total.num_accepted_tokens_by_source,
    }


def _acceptance_name(acceptance: AcceptanceParams) -> str | None:
    rule = acceptance.acceptance
    return rule.name if isinstance(rule, AcceptancePolicy) else rule
