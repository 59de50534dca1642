"""What speculation did for a request, as vLLM's `metrics.speculative_decoding` object.

It has vLLM's fields and no others, so that who reads vLLM's responses reads these: AIPerf compares its sums and drops
an object where they do not agree. It knows the runtime's counts and nothing of HTTP.
Source: https://docs.vllm.ai/en/stable/features/speculative_decoding/acceptance_metrics/
"""

from typing import Any

from fly_trt.outputs import RequestMetrics


def speculative_decoding_object(
    metrics: RequestMetrics, num_spec_tokens: int, detailed: bool = False
) -> dict[str, Any] | None:
    """Of a request of one sequence; None without speculation, where num_spec_tokens is 0.

    A step is a round with a draft, accepted are the draft tokens that were emitted, drafted those that the target
    verified. Tokens that a grammar forces are drafted beyond num_spec_tokens; the object then says the longest draft
    instead. Without any step the mean length is 1: each step of the target emitted one token. detailed: also the
    arrays of steps, of a request that asked for detailed_metrics."""
    by_length = metrics.acceptance_by_draft_length
    longest = max(num_spec_tokens, *by_length) if by_length else num_spec_tokens
    if not longest:
        return None
    histogram = metrics.acceptance_histogram
    drafted, accepted = metrics.num_draft_tokens, metrics.num_accepted_tokens
    found: dict[str, Any] = {
        "mean_acceptance_length": metrics.mean_acceptance_length or 1.0,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_histogram": histogram + [0] * (longest + 1 - len(histogram)),
        "acceptance_histogram_by_draft_length": {str(length): by_length[length] for length in sorted(by_length)},
        "num_spec_steps": metrics.num_spec_steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": longest,
    }
    if detailed:
        found["per_step_accepted"] = metrics.per_step_accepted or []
        found["per_step_drafted"] = metrics.per_step_drafted or []
    return found
