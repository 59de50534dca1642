"""One sequence while it is served: what was asked, what is committed, and where its cache stands."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from fly_trt.drafting import DraftStop
from fly_trt.errors import FlyError
from fly_trt.grammar import GrammarMatcher
from fly_trt.outputs import CompletionOutput, FinishReason, RequestMetrics, RoundTrace, TokenLogprobs, TokenTrace
from fly_trt.params import SamplingParams
from fly_trt.runtime.draft_length import AcceptanceRate
from fly_trt.runtime.loosening import Loosening
from fly_trt.runtime.round_records import round_trace, token_traces
from fly_trt.runtime.rounds import Round
from fly_trt.runtime.sampler import Sampler
from fly_trt.text.tokenizer import Detokenizer
from fly_trt.tokens import FloatArray, IntArray, TokenSequence
from fly_trt.verification import AcceptancePolicy, Guards, Limits, Positions, Verdict


class RequestState(Enum):
    """WAITING -> PREFILL -> DECODE -> FINISHED; an abort or an error leads to FINISHED from anywhere."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """`sequence` is prompt and output; the target's cache holds `num_cached` tokens of it and of the draft after it.
    `end_token_ids` end the sequence; `stop_token_ids` are those of them that only this request has. `sampler` None
    means that the engine's argmax decides. `loosening` None means that every round has the request's `policy`.
    `guards`: where a loose policy is exact all the same; `limits`: these and what no request may loosen, from its first
    round on. `draft_stop`: where drafts of its rounds end early. `forced`:
    what its grammar forces next, None where nobody looked since the last round. `index` numbers the sequences of one
    prompt. Where it `is_spoilt` its cache may have what is not a number. `setting`: the name of its acceptance setting,
    by which audits judge it; None where nothing does."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    policy: AcceptancePolicy
    max_tokens: int
    end_token_ids: frozenset[int]
    stop_token_ids: frozenset[int]
    detokenizer: Detokenizer
    sequence: TokenSequence
    sampler: Sampler | None = None
    guards: Guards | None = None
    draft_stop: DraftStop | None = None
    index: int = 0
    setting: str | None = None
    state: RequestState = RequestState.WAITING
    slot: int = -1
    num_cached: int = 0
    is_spoilt: bool = False
    num_prefix_hits: int = 0
    round: Round | None = None
    acceptance_rate: AcceptanceRate | None = None
    loosening: Loosening | None = None
    limits: Limits | None = None
    forced: IntArray | None = None
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    trace: list[TokenTrace] = field(default_factory=list)
    rounds: list[RoundTrace] = field(default_factory=list)
    error: FlyError | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    arrival: float = field(default_factory=time.perf_counter)
    _asked_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._asked_at = self.arrival
        if self.params.detailed_metrics:
            self.metrics.per_step_drafted, self.metrics.per_step_accepted = [], []

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def grammar(self) -> GrammarMatcher | None:
        """Where its output stands in the grammar that it must follow, if there is one."""
        return self.sampler.grammar if self.sampler is not None else None

    @property
    def is_waiting(self) -> bool:
        return self.state is RequestState.WAITING

    @property
    def needs_logits(self) -> bool:
        return self.sampler is not None or self.params.logprobs is not None

    @property
    def needs_top(self) -> bool:
        """Whether the target's most probable tokens are wanted from the engine: a sampler has its own."""
        round_ = self.round
        return self.sampler is None and round_ is not None and (round_.policy.needs_top or round_.needs_top)

    @property
    def needs_prompt_logits(self) -> bool:
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_token_ids)

    @property
    def is_reading_prompt(self) -> bool:
        """Whether the target has not read all of the prompt that a prompt token follows."""
        return self.num_cached < len(self.prompt_token_ids) - 1

    @property
    def traces_full_entropy(self) -> bool:
        """Whether a trace was asked for under a policy whose gate looks at the whole vocabulary."""
        return self.params.speculation_trace and self.policy.use_full_entropy

    @property
    def num_context(self) -> int:
        """Committed tokens that the cache does not hold, at the start of a round; 0 within one."""
        return max(0, len(self.sequence) - self.num_cached) if self.round is None or not self.round.has_begun else 0

    @property
    def uncached(self) -> IntArray:
        """The committed tokens that the cache does not hold."""
        return self.sequence.tokens[self.num_cached :]

    @property
    def cached_tokens(self) -> IntArray:
        """The committed tokens that the target's cache holds."""
        return self.sequence.tokens[: self.num_cached]

    @property
    def held_tokens(self) -> IntArray:
        """All tokens that the target's cache holds, with those of an open round that are not committed."""
        if self.round is None or self.num_cached <= self.round.start:
            return self.cached_tokens
        fed = self.round.draft[: self.num_cached - self.round.start]
        return np.concatenate([self.sequence.tokens[: self.round.start], fed])

    @property
    def output_tokens(self) -> IntArray:
        return self.sequence.tokens[len(self.prompt_token_ids) :]

    def enter(self, state: RequestState) -> None:
        """The only place where the state changes."""
        self.state = state

    def hold(self, num_tokens: int) -> None:
        """The target's cache holds so many tokens of the sequence and of the draft after it: the only place where this
        changes."""
        self.num_cached = num_tokens

    def choose(self, logits: FloatArray, undecided: IntArray, draft: IntArray) -> Positions:
        """What its sampler says of the next positions; see `Sampler.choose`."""
        assert self.sampler is not None
        return self.sampler.choose(logits, self.output_tokens, undecided, draft)

    def commit(self, tokens: list[int], logprobs: list[TokenLogprobs] | None = None) -> int:
        """Emits tokens until the request ends and returns how many it took; the rest never existed for the caller."""
        self.sequence.append(np.array(tokens, np.int64))
        if not self.output_token_ids:
            self.metrics.time_to_first_token = time.perf_counter() - self.arrival
        for count, token in enumerate(tokens, start=1):
            self.output_token_ids.append(token)
            self.metrics.num_output_tokens += 1
            if logprobs is not None:
                self.logprobs.append(logprobs[count - 1])
            if self._ends_with(token):
                return count
        return len(tokens)

    def record_traces(self, round_: Round, verdict: Verdict, num_tokens: int, text: Callable[[int], str]) -> None:
        """How the `num_tokens` came to be that were committed of what a verdict adds to its round. text: of a token."""
        last = self.trace[-1].round if self.trace else -1
        self.trace += token_traces(
            round_,
            verdict,
            num_tokens,
            last if round_.num_committed else last + 1,
            of_vocabulary=self.traces_full_entropy,
            text=text,
        )

    def record_round_trace(self, round_: Round, num_kept: int) -> None:
        """What became of a round that has ended, of which `num_kept` draft tokens were emitted."""
        self.rounds.append(round_trace(round_, self.trace[-1].round, num_kept, self.policy.name))

    def seconds_since_tokens(self) -> float:
        """Seconds since this was asked last, which is where tokens are emitted, or since the request came."""
        before, self._asked_at = self._asked_at, time.perf_counter()
        return self._asked_at - before

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """Ends it for this reason, or for a stop string that came before and is found only now: in text that was held
        back until the end. An abort cuts nothing."""
        may_stop = reason != "abort" and self._may_stop
        if self.detokenizer.finish(may_stop=may_stop):
            reason, stop_reason = "stop", self.detokenizer.stop_string
        self._end(reason, stop_reason)

    def fail(self, error: FlyError) -> None:
        """Ends with an error instead of a text."""
        self.error = error
        self._end("abort", None)

    def completion(self, first_token: int = 0, first_character: int = 0, first_round: int = 0) -> CompletionOutput:
        """What was emitted, from a token, a character and a round on; text that may still become a stop string is not
        shown."""
        end = None if self.is_finished else self.detokenizer.streamable_length
        logprobs = None if self.params.logprobs is None else self.logprobs[first_token:]
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text[first_character:end],
            token_ids=self.output_token_ids[first_token:],
            logprobs=logprobs,
            trace=self.trace[first_token:] if self.params.speculation_trace else None,
            rounds=self.rounds[first_round:] if self.params.speculation_trace else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    @property
    def _may_stop(self) -> bool:
        return len(self.output_token_ids) > self.params.min_tokens

    def _end(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        self.enter(RequestState.FINISHED)
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.metrics.num_cached_tokens = self.num_prefix_hits
        self.metrics.latency = time.perf_counter() - self.arrival

    def _ends_with(self, token: int) -> bool:
        is_end = token in self.end_token_ids
        is_shown = not is_end or self.params.include_stop_str_in_output
        if is_shown and self.detokenizer.push(token, may_stop=self._may_stop):
            self.finish("stop", self.detokenizer.stop_string)
        elif is_end:
            self.finish("stop", token if token in self.stop_token_ids else None)
        elif len(self.output_token_ids) >= self.max_tokens:
            self.finish("length")
        return self.state is RequestState.FINISHED
