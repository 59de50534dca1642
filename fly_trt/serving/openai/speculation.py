"""What speculation did for a request, as vLLM's `metrics.speculative_decoding` object."""

from typing import Any

from fly_trt.outputs import RequestMetrics


def speculative_decoding_object(
    metrics: RequestMetrics, num_spec_tokens: int, detailed: bool = False
) -> dict[str, Any]:
    drafted, accepted = metrics.num_draft_tokens, metrics.num_accepted_tokens
    return {
        "mean_acceptance_length": metrics.mean_acceptance_length,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_histogram": list(metrics.acceptance_histogram),
        "num_spec_steps": metrics.num_spec_steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": num_spec_tokens,
    }
