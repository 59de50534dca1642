"""The generation loop: plan, run, settle, for all running requests at once.

The loop is the only one that runs the target. What a step does is the scheduler's plan; what it says is taken here, row
by row: prompts advance, rounds are decided, tokens are committed, requests end. It knows requests, tokens and slots,
and nothing of files, threads or callers.
"""

import os
import time
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from fly_trt.drafting import Drafter, ReadsPrompts
from fly_trt.engines.base import Engine, Step
from fly_trt.errors import EngineError, FlyError
from fly_trt.runtime.audit import AuditConfig, OnResult
from fly_trt.runtime.auditor import Auditor
from fly_trt.runtime.feed import Feed
from fly_trt.runtime.invariants import check_invariants
from fly_trt.runtime.loosening import StepCosts
from fly_trt.runtime.metrics import Metrics
from fly_trt.runtime.request import Request
from fly_trt.runtime.round_records import round_counts
from fly_trt.runtime.rounds import Round
from fly_trt.runtime.sampler import token_logprobs
from fly_trt.runtime.scheduler import Scheduler, StepPlan
from fly_trt.runtime.slots import SlotTable
from fly_trt.runtime.speculation import Speculation
from fly_trt.text.tokenizer import piece_reader
from fly_trt.verification import EXACT, Verdict

WARM_UP_SECONDS = 1.0
CHECK_VARIABLE = "FLY_TRT_CHECK"  # "1" checks the invariants after every step


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Sizes in requests and tokens: num_slots rows at most of max_seq_len tokens, num_draft_tokens per round,
    max_num_tokens of prompts and again of verification per iteration, max_queue_size waiting requests. step_costs: what
    a loose request's windows cost, so that it opens them where they pay; None means always. spare_slot: one of the
    target's beyond num_slots, for whoever reads beside the requests."""

    num_slots: int
    max_seq_len: int
    num_draft_tokens: int
    max_num_tokens: int
    max_queue_size: int
    adaptive_draft_length: bool = False
    prefix_caching: bool = True
    step_costs: StepCosts | None = None
    spare_slot: int | None = None


class GenerationLoop:
    """Serves requests with a target engine and, where there is one, a drafter."""

    def __init__(
        self,
        target: Engine,
        drafter: Drafter | None,
        config: LoopConfig,
        tokenizer: Tokenizer,
        metrics: Metrics | None = None,
    ) -> None:
        self._config = config
        self._target = target
        self._tokenizer = tokenizer
        self._metrics = metrics or Metrics()
        self._metrics.set_cache(config.num_slots * config.max_seq_len)
        self.speculation = Speculation(
            drafter,
            config.num_draft_tokens,
            is_adaptive=config.adaptive_draft_length,
            step_costs=config.step_costs,
            stop_token_ids=target.info.stop_token_ids,
            has_top_tokens=target.info.has_top_tokens,
        )
        self.scheduler = Scheduler(
            SlotTable(
                config.num_slots,
                target,
                drafter,
                prefix_caching=config.prefix_caching,
                spare_slot=config.spare_slot,
            ),
            self.speculation,
            max_num_tokens=config.max_num_tokens,
            max_queue_size=config.max_queue_size,
            has_positions=target.info.has_positions,
        )
        self._prompt_reader = self.speculation.prompt_reader
        self._most_verified = config.num_slots * (self.speculation.num_draft_tokens + 1)  # tokens of a step
        self._changed: dict[Request, None] = {}
        self._may_shrink = False
        self._auditor: Auditor | None = None
        self._piece = piece_reader(tokenizer)
        self._step_seconds = 0.0
        self._is_checked = os.environ.get(CHECK_VARIABLE) == "1"

    def add(self, requests: list[Request]) -> None:
        self.scheduler.add(requests)

    def audit(self, config: AuditConfig, on_result: OnResult, *, is_shared: bool = False) -> Auditor:
        """From now on offers what ends to audits over the same target and slots, which somebody has to step."""
        self._auditor = Auditor(
            config,
            on_result,
            target=self._target,
            slots=self.scheduler.slots,
            max_seq_len=self._config.max_seq_len,
            max_num_tokens=self._config.max_num_tokens,
            is_shared=is_shared,
        )
        return self._auditor

    def has_requests(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do: requests to serve, or caches that may shrink."""
        return self.has_requests() or self._may_shrink

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_free_places(self) -> int:
        return self.scheduler.num_free_places

    @property
    def is_admitting(self) -> bool:
        return self.scheduler.is_admitting

    @is_admitting.setter
    def is_admitting(self, value: bool) -> None:
        self.scheduler.is_admitting = value

    def step(self) -> list[Request]:
        """One iteration over all running requests; returns those that emitted tokens or ended."""
        for plan in self.scheduler.plan(self._changed):
            step = self._run(plan)
            self._settle(plan, step)
        if self._may_shrink:
            self._may_shrink = False
            self.scheduler.slots.trim()
        if self._is_checked:
            check_invariants(self.scheduler)
        return self._take_changed()

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is. What it has emitted stays. Runs no engine."""
        if not request.is_finished:
            request.finish("abort")
            self._remove(request)
            self._set_load()

    def fail_running(self, reason: str) -> list[Request]:
        """After a step that raised: ends the requests that were in it, each with an EngineError, and forgets what the
        caches hold. Those that wait go on waiting. Returns what `step` would have. Runs no engine."""
        for request in self.scheduler.slots.active:
            if not request.is_finished:
                name = f"request {request.request_id}"
                request.fail(EngineError(f"{name}: the step that it was in failed ({reason}): send it again"))
            self._changed[request] = None  # also one that had just ended
        self._remove_finished()
        self.scheduler.slots.forget()
        return self._take_changed()

    def probe(self) -> None:
        """Runs one token in the first slot of target and draft, while no request is running. Raises what they raise."""
        token = np.zeros(1, np.int64)
        step = self._target.step(0, 1, 1)
        step.set_row(0, 0, token)
        self._target.run(step)
        self.speculation.probe(token)

    def warm_up(self) -> None:
        """Measures steps of some shapes, so that the first requests are served at a known cost. Stops when it has taken
        WARM_UP_SECONDS: a large model gets fewer shapes."""
        started = time.perf_counter()
        num_slots, full = self._config.num_slots, self.speculation.num_draft_tokens + 1
        token = np.zeros(1, np.int64)
        for num_rows in sorted({1, min(4, num_slots), num_slots}):
            for num_tokens in (1, 1, full, full):  # the first run of a shape is not measured
                is_late = time.perf_counter() - started > WARM_UP_SECONDS
                if num_rows * num_tokens > self._config.max_num_tokens or is_late:
                    return
                step = self._target.step(0, num_rows, num_tokens)
                for row in range(num_rows):
                    step.set_row(row, 0, token)
                self._run_timed(step)
            self.speculation.warm_up(num_rows, token)

    def _run(self, plan: StepPlan) -> Step:
        step = self._target.step(
            plan.first_slot,
            len(plan.rows),
            plan.num_tokens,
            num_positions=plan.num_positions,
            with_logits=plan.with_logits,
            with_top=plan.with_top,
        )
        for row, (request, feed) in enumerate(plan.rows):
            policy = EXACT if request.round is None else request.round.policy  # which says what the gate looks at
            step.set_row(row, request.num_cached, feed.context, feed.draft, policy, first=feed.heard_from)
        self._run_timed(step)
        return step

    def _run_timed(self, step: Step) -> None:
        prepared, started = self._target.num_preparations, time.perf_counter()
        self._target.run(step)
        self._step_seconds = time.perf_counter() - started
        # A prompt's step costs less than a verification of as many tokens, which speaks of them all.
        size, is_verification = step.input_ids.size, step.num_positions == step.input_ids.shape[1]
        if self._target.num_preparations == prepared and (is_verification or size > self._most_verified):
            self.speculation.draft_length.target_cost.observe(size, self._step_seconds)

    def _settle(self, plan: StepPlan, step: Step) -> None:
        """Takes what a step says, row by row. What goes wrong with a row is its request's: the others go on."""
        for row, (request, feed) in enumerate(plan.rows):
            try:
                heard = step.at(row, feed.heard_from, feed.num_tokens)
                if np.isnan(step.entropy_topk[row, heard]).any() and self._is_undone(request, feed):
                    continue
                if request.needs_prompt_logits:
                    self._collect_prompt_logprobs(request, step, row, feed.num_tokens)
                if self._prompt_reader is not None:
                    _read_prompt(self._prompt_reader, request, feed, step, row)
                request.hold(request.num_cached + feed.num_tokens)
                if request.round is not None:
                    self._decide(request, request.round, feed, step, row)
            except FlyError as error:
                request.fail(error)
                self._changed[request] = None
        self._remove_finished()

    def _is_undone(self, request: Request, feed: Feed) -> bool:
        """After a row with something that is not a number, which must not stay in the cache: whether the row counts as
        never run, since its draft tokens may be to blame. Raises EngineError where the sequence itself is.

        A chunk of a prompt that nobody wants to hear of is no reason to end a request, since it is the load that cuts
        it: what is not a number reaches the prompt's end, wherever it is cut, or, through a model's windows, does not.
        """
        if request.round is None and not feed.is_wanted:
            request.is_spoilt = True
            return False
        self._target.clear_slot(request.slot, request.num_cached)
        if request.round is not None and feed.takes_risks:
            request.round.feed_less()
            return True
        if request.round is None or not request.round.num_window:
            raise _not_numbers(request)
        return False

    def _decide(self, request: Request, round_: Round, feed: Feed, step: Step, row: int) -> None:
        """Takes a step's outputs for one decoding row, and commits what they decide."""
        before = round_.num_committed
        if round_.costs is not None:
            round_.costs.add_step(self._step_seconds, len(step.num_context))
        verdict = round_.take(
            feed,
            step,
            row,
            request.choose if request.sampler is not None else None,
            head_stops=self._target.info.stop_token_ids,
            keeps_logits=request.params.logprobs is not None,
        )
        request.hold(round_.num_held(verdict))
        num_emitted = before + self._commit(request, round_, verdict)
        round_.num_committed = verdict.num_accepted
        if verdict.next_token is None and not request.is_finished:
            round_.go_on()
        else:
            self._end_round(request, round_, num_emitted)

    def _commit(self, request: Request, round_: Round, verdict: Verdict) -> int:
        """Emits what the verdict adds, and returns how many tokens that is: less where the request ends before."""
        before = round_.num_committed
        tokens = round_.draft[before : verdict.num_accepted].tolist()
        if verdict.next_token is not None:
            tokens.append(verdict.next_token)
        if not tokens:
            return 0
        logprobs = None
        if request.params.logprobs is not None:
            rows = round_.logits[before : before + len(tokens)]
            logprobs = token_logprobs(rows, request.params.logprobs, np.array(tokens), self._tokenizer)
        is_first = not request.output_token_ids
        num_emitted = request.commit(tokens, logprobs)
        if request.params.speculation_trace:
            request.record_traces(round_, verdict, num_emitted, self._piece)
        self._metrics.record_tokens(num_emitted, request.seconds_since_tokens(), is_first=is_first)
        self._changed[request] = None
        return num_emitted

    def _end_round(self, request: Request, round_: Round, num_emitted: int) -> None:
        """num_emitted: tokens of the round, the target's own among them, that the request took."""
        request.round = None
        if round_.evidence.num_known:
            counts = round_counts(round_, num_emitted)
            request.metrics.record_round(counts)
            self._metrics.record_round(counts, request.policy.name)
        num_kept = min(num_emitted, round_.num_committed)
        if round_.costs is not None:
            request.record_round_trace(round_, num_kept)
        self.speculation.end_round(request, round_, num_kept)

    def _collect_prompt_logprobs(self, request: Request, step: Step, row: int, num_tokens: int) -> None:
        """Position t of the step predicts prompt token num_cached + t + 1."""
        assert step.logits is not None
        assert request.params.prompt_logprobs is not None
        following = request.sequence.tokens[request.num_cached + 1 : len(request.prompt_token_ids)][:num_tokens]
        logits = step.logits[row, step.at(row, 0, len(following))]
        found = token_logprobs(logits, request.params.prompt_logprobs, following, self._tokenizer)
        request.prompt_logprobs += found if request.prompt_logprobs else [None, *found]

    def _remove_finished(self) -> None:
        for request in self._changed:
            if request.is_finished and request.slot >= 0:
                self._remove(request)

    def _remove(self, request: Request) -> None:
        self._may_shrink |= request.slot >= 0
        self.scheduler.remove(request)
        self._metrics.record_end(request.finish_reason or "abort", request.metrics.latency or 0.0)
        if request.metrics.exact_because is not None:
            self._metrics.record_made_exact()
        if request.num_cached:  # it was admitted
            self._metrics.record_prompt(len(request.prompt_token_ids), request.num_prefix_hits)
        if self._auditor is not None:
            self._auditor.offer(request)

    def _take_changed(self) -> list[Request]:
        changed, self._changed = list(self._changed), {}
        self._set_load()
        return changed

    def _set_load(self) -> None:
        running = self.scheduler.running
        capacity = self._config.num_slots * self._config.max_seq_len
        usage = sum(request.num_cached for request in running) / capacity
        self._metrics.set_load(len(running), len(self.scheduler.waiting), usage)


def _read_prompt(reader: ReadsPrompts, request: Request, feed: Feed, step: Step, row: int) -> None:
    """Shows a drafter what a row says of the prompt tokens that it has."""
    start = request.num_cached
    count = min(len(feed.context), len(request.prompt_token_ids) - 1 - start)
    if count <= 0:
        return
    positions = step.at(row, 0, count)
    of_tokens = step.token_logprob[row, positions].copy()
    if count == feed.num_tokens:
        of_tokens[-1] = np.nan  # what follows is no part of the row
    tokens = request.sequence.tokens
    of_choices = step.argmax_logprob[row, positions]
    reader.read_prompt(request.slot, tokens, start, step.argmax[row, positions], of_choices, of_tokens)


def _not_numbers(request: Request) -> EngineError:
    return EngineError(
        f"request {request.request_id}: the target's logits after {len(request.sequence)} tokens are not numbers: a "
        "float16 engine overflows where one of --dtype bfloat16 or float32 does not; with those, look at the "
        "checkpoint's weights"
    )
