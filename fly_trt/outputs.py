"""What a request returns: text, tokens, why it ended, and what speculation did for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]
ExactBecause = Literal["breaker"]


class Logprob(NamedTuple):
    """Natural logarithm of a token's probability, its rank (1 is the most probable), and its text."""

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""By token id: the token at one position and the most probable ones."""


TokenKind = Literal["matched", "loosened", "correction", "bonus", "plain"]


class TokenTrace(NamedTuple):
    """How one output token came to be, where a request asked for its `speculation_trace`.

    kind: "matched", a draft token that is the target's own choice; "loosened", one that stands although it is not;
    "correction", the target's token in place of a rejected draft token; "bonus", its token after a draft that stood as
    a whole; "plain", where nothing was drafted. source: where a draft token came from, as in
    RequestMetrics.num_accepted_tokens_by_source; None for the target's own. round: the number of the round, from 0,
    also of rounds without a draft; a round is one step of the target, but where the load cut it into several.

    entropy: of the target's distribution there, after penalties, temperature and truncation where the request has
    them, in nats: of its entropy_top_k most probable tokens (the engine's number, not renormalised), or of the whole
    vocabulary under a policy whose gate looks at that. None where the draft token there was one that must not come, or
    the target said nothing that is a number. choice: the target's own choice, a
    token id, which differs from the token exactly where that is loosened. rejected: at a correction, the draft token
    that it took the place of.

    reason: all of it in words, as the rule of the round has it. gate: the entropy in nats below which that rule is
    exact. num_agreed: where draft and target differ, how many tokens in a row agreed after it, of those that the rule
    waits for. guard: the setting that turned down what the rule would have loosened. None where a rule has no such
    thing. top: the target's most probable tokens there with their natural log-probabilities, of the processed
    distribution where the request has one; None where the engine does not name them.

    Of a request that ends, tokens matched and loosened are what its metrics count as accepted, also by source; an abort
    in the middle of a round leaves that round out of the metrics."""

    kind: TokenKind
    source: str | None
    round: int
    entropy: float | None
    choice: int
    rejected: int | None = None
    reason: str = ""
    gate: float | None = None
    num_agreed: int | None = None
    guard: str | None = None
    top: list[tuple[int, float]] | None = None


class RoundTrace(NamedTuple):
    """What one round of a request drafted, what stood, and what it cost, where the request asked for a trace.

    number: as TokenTrace.round has it. num_draft, num_accepted, num_loosened: draft tokens verified, emitted, and
    emitted although the target had chosen another. asked: the request's rule. policy: the one that decided the round,
    which is "exact" while a loose request's windows are closed. rejected: the draft tokens that did not stand, verified
    or not. num_steps: of the target. draft_seconds, verification_seconds: the request's share of what drafting and
    those steps took, which is one of as many as requests were in them, num_rows at most. The first round's steps read
    the end of the prompt as well.
    """

    number: int
    num_draft: int
    num_accepted: int
    num_loosened: int
    asked: str
    policy: str
    rejected: list[int]
    num_steps: int
    num_rows: int
    draft_seconds: float
    verification_seconds: float


class RoundCounts(NamedTuple):
    """Draft tokens of one round: verified, emitted, and emitted although the target had chosen another; the first two
    also by source. num_saved: emitted from the first loosened one on, that is those that exact verification of the same
    draft would not have accepted. refused_by: the guard that turned down a loosening, which ended the round; None where
    none did."""

    num_draft: int
    num_accepted: int
    num_loosened: int
    drafted_by_source: Mapping[str, int]
    accepted_by_source: Mapping[str, int]
    num_saved: int = 0
    refused_by: str | None = None


def add_counts(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


@dataclass(slots=True)
class RequestMetrics:
    """Counts of one request, over all its sequences; times in seconds. Only tokens that were emitted count as accepted.

    A spec step is one round: a draft, and what became of it; a round without a draft is none. acceptance_histogram[a]
    is the number of rounds that emitted `a` draft tokens, acceptance_by_draft_length[k][a] the same of those that had
    `k` verified. per_step_drafted, per_step_accepted: both numbers by round, where a request of one sequence asked for
    detailed_metrics. num_draft_tokens_by_source, num_accepted_tokens_by_source: of those that a "model" chose and
    of copies, by "lookup" of the sequence's own text or from the "corpus" of others' outputs, and of those that a
    "grammar" forced. num_cached_tokens: prompt tokens whose cache was reused. exact_because: why a loose request was
    decoded exactly, from the beginning or from somewhere on: "breaker", its setting was tripped; None, it was not.

    num_loosened_tokens: emitted draft tokens that were not the target's own choice. num_saved_tokens: of each round the
    emitted draft tokens from its first loosened one on, that is those that exact verification of the same draft would
    not have accepted in that step. num_refused_loosenings_by_guard: draft tokens that the rule had let stand, or had
    opened its window for, and a guard had not, by the guard's setting (of several the first, in the order exact_first,
    exact_token_ids, max_loosened_per_100, exact_within). guards: those in force, the server's and the request's
    together, by setting; empty where none is, as for an exact request.
    """

    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_loosened_tokens: int = 0
    num_spec_steps: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    acceptance_by_draft_length: dict[int, list[int]] = field(default_factory=dict)
    per_step_drafted: list[int] | None = None
    per_step_accepted: list[int] | None = None
    num_draft_tokens_by_source: dict[str, int] = field(default_factory=dict)
    num_accepted_tokens_by_source: dict[str, int] = field(default_factory=dict)
    num_saved_tokens: int = 0
    num_refused_loosenings_by_guard: dict[str, int] = field(default_factory=dict)
    guards: Mapping[str, Any] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    exact_because: ExactBecause | None = None
    time_to_first_token: float | None = None
    latency: float | None = None

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted tokens per round, 0 without rounds: vLLM's formula, which adds the target's own token
        (correction or bonus) also for the last round, where an accepted end-of-sequence leaves it out of the text."""
        return 1 + self.num_accepted_tokens / self.num_spec_steps if self.num_spec_steps else 0.0

    def record_round(self, counts: "RoundCounts") -> None:
        num_accepted = counts.num_accepted
        self.num_spec_steps += 1
        self.num_draft_tokens += counts.num_draft
        self.num_accepted_tokens += num_accepted
        self.num_loosened_tokens += counts.num_loosened
        self.num_saved_tokens += counts.num_saved
        if counts.refused_by is not None:
            add_counts(self.num_refused_loosenings_by_guard, {counts.refused_by: 1})
        add_counts(self.num_draft_tokens_by_source, counts.drafted_by_source)
        add_counts(self.num_accepted_tokens_by_source, counts.accepted_by_source)
        missing = num_accepted + 1 - len(self.acceptance_histogram)
        self.acceptance_histogram.extend([0] * missing)
        self.acceptance_histogram[num_accepted] += 1
        of_length = self.acceptance_by_draft_length.setdefault(counts.num_draft, [0] * (counts.num_draft + 1))
        of_length[num_accepted] += 1
        if self.per_step_drafted is not None and self.per_step_accepted is not None:
            self.per_step_drafted.append(counts.num_draft)
            self.per_step_accepted.append(num_accepted)

    def merged(self, others: "list[RequestMetrics]") -> "RequestMetrics":
        """A copy that includes the other sequences of the same prompt; times are the first token's and the last
        one's."""
        total = replace(
            self,
            acceptance_histogram=list(self.acceptance_histogram),
            acceptance_by_draft_length={k: list(rounds) for k, rounds in self.acceptance_by_draft_length.items()},
            per_step_drafted=None if others or self.per_step_drafted is None else list(self.per_step_drafted),
            per_step_accepted=None if others or self.per_step_accepted is None else list(self.per_step_accepted),
            num_draft_tokens_by_source=dict(self.num_draft_tokens_by_source),
            num_accepted_tokens_by_source=dict(self.num_accepted_tokens_by_source),
            num_refused_loosenings_by_guard=dict(self.num_refused_loosenings_by_guard),
        )
        for other in others:
            total.num_draft_tokens += other.num_draft_tokens
            total.num_accepted_tokens += other.num_accepted_tokens
            total.num_loosened_tokens += other.num_loosened_tokens
            total.num_saved_tokens += other.num_saved_tokens
            add_counts(total.num_refused_loosenings_by_guard, other.num_refused_loosenings_by_guard)
            total.num_spec_steps += other.num_spec_steps
            total.num_output_tokens += other.num_output_tokens
            total.exact_because = total.exact_because or other.exact_because
            add_counts(total.num_draft_tokens_by_source, other.num_draft_tokens_by_source)
            add_counts(total.num_accepted_tokens_by_source, other.num_accepted_tokens_by_source)
            missing = len(other.acceptance_histogram) - len(total.acceptance_histogram)
            total.acceptance_histogram.extend([0] * missing)
            for accepted, count in enumerate(other.acceptance_histogram):
                total.acceptance_histogram[accepted] += count
            for length, rounds in other.acceptance_by_draft_length.items():
                of_length = total.acceptance_by_draft_length.setdefault(length, [0] * (length + 1))
                for accepted, count in enumerate(rounds):
                    of_length[accepted] += count
            firsts = [t for t in (total.time_to_first_token, other.time_to_first_token) if t is not None]
            total.time_to_first_token = min(firsts, default=None)
            if total.latency is not None:
                total.latency = None if other.latency is None else max(total.latency, other.latency)
        return total


@dataclass(slots=True)
class CompletionOutput:
    """One completion. finish_reason None means that it still runs; stop_reason is the stop string or stop token id
    that ended it, None for the model's own end-of-sequence. logprobs and trace have one entry per token where asked
    for, and rounds then one for each round that has ended."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    trace: list[TokenTrace] | None = None
    rounds: list[RoundTrace] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the tokens' log-probabilities, None unless logprobs were asked for."""
        if self.logprobs is None:
            return None
        return sum(entry[token].logprob for token, entry in zip(self.token_ids, self.logprobs, strict=True))


@dataclass(slots=True)
class RequestOutput:
    """`outputs` has one entry per completion (n); prompt_logprobs one per prompt token, None for the first."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
