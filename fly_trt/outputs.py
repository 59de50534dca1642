"""What a request returns: text, tokens, why it ended, and what speculation did for it."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True)
class RequestMetrics:
    """Counts of one request; times in seconds. Only tokens that were emitted count as accepted.

    acceptance_histogram[a] is the number of verification steps that emitted `a` draft tokens.
    """

    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_loosened_tokens: int = 0
    num_spec_steps: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    time_to_first_token: float | None = None
    latency: float | None = None

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted tokens per verification step, 0 without steps: vLLM's formula, which adds the target's own token
        (correction or bonus) also for the last step, where an accepted end-of-sequence leaves it out of the text."""
        return 1 + self.num_accepted_tokens / self.num_spec_steps if self.num_spec_steps else 0.0

    def record_step(self, num_draft: int, num_accepted: int, num_loosened: int) -> None:
        self.num_spec_steps += 1
        self.num_draft_tokens += num_draft
        self.num_accepted_tokens += num_accepted
        self.num_loosened_tokens += num_loosened
        missing = num_accepted + 1 - len(self.acceptance_histogram)
        self.acceptance_histogram.extend([0] * missing)
        self.acceptance_histogram[num_accepted] += 1


@dataclass(slots=True)
class CompletionOutput:
    """One completion. finish_reason None means that it still runs; stop_reason is the stop string or stop token id
    that ended it, None for the model's own end-of-sequence."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)
