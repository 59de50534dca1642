"""The generation loop: schedule -> prefill -> draft -> verify -> commit, for all running requests at once.

The loop is the only one that runs the engines. It knows requests, tokens and slots, and nothing of files, threads or
callers. Each call of `step` prefills under a token budget and then takes one verification step over all active slots; a
row of it carries drafts to verify or, while its prompt is not finished, the next chunk of it.
"""

import time
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from fly_trt.drafting import Drafter, DraftRow
from fly_trt.engines.base import Engine, Step
from fly_trt.errors import EngineError, FlyError
from fly_trt.runtime.draft_length import SURE, AcceptanceRate, DraftLength
from fly_trt.runtime.loosening import Loosening, StepCosts
from fly_trt.runtime.metrics import Metrics
from fly_trt.runtime.request import Request, RequestState
from fly_trt.runtime.rounds import Round
from fly_trt.runtime.sampler import NO_CHOICE, token_logprobs
from fly_trt.runtime.scheduler import Scheduler
from fly_trt.runtime.slots import SlotTable
from fly_trt.tokens import FloatArray, IntArray
from fly_trt.verification import Verdict
from fly_trt.verification.policy import EXACT

# Logits of a whole prompt chunk are large: V = 128 k and 64 tokens are 33 MB. A longer prompt that needs the logits of
# its last token only is read without any up to there.
MAX_LOGITS_CHUNK = 64
MIN_PREFILL_CHUNK = 16
MAX_USUAL_CONTEXT = 2
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Sizes in requests and tokens: num_slots rows at most of max_seq_len tokens, num_draft_tokens per round,
    max_num_tokens of prompts and again of verification per iteration, max_queue_size waiting requests. step_costs: what
    a loose request's windows cost, so that it opens them where they pay; None means always."""

    num_slots: int
    max_seq_len: int
    num_draft_tokens: int
    max_num_tokens: int
    max_queue_size: int
    adaptive_draft_length: bool = False
    prefix_caching: bool = True
    step_costs: StepCosts | None = None


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
        self.num_slots = config.num_slots
        self._target = target
        self._drafter = drafter
        self._max_num_tokens = config.max_num_tokens
        self._max_seq_len = config.max_seq_len
        self._tokenizer = tokenizer
        self._metrics = metrics or Metrics()
        self._num_draft_tokens = config.num_draft_tokens if drafter is not None else 0
        has_costs = drafter is not None and not drafter.is_free  # free drafts cost nothing where they do not stand
        self._step_costs = config.step_costs if has_costs else None
        self.draft_length = DraftLength(self._num_draft_tokens, adaptive=config.adaptive_draft_length)
        slots = SlotTable(config.num_slots, target, drafter, prefix_caching=config.prefix_caching)
        self.scheduler = Scheduler(slots, config.max_queue_size)
        self._row_tokens = 1  # of the last verification step
        self._changed: dict[Request, None] = {}
        self._may_shrink = False

    def add(self, requests: list[Request]) -> None:
        self.scheduler.add(requests)

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
        rows = self.scheduler.schedule()
        self._prefill(rows)
        self._remove_finished()
        rows = self.scheduler.schedule() if any(r.is_finished for r in rows) else rows
        decoding = [request for request in rows if request.state is RequestState.DECODE]
        if not self._changed.keys() >= set(decoding):  # what a prompt's own step emitted is delivered first
            num_context = max(1, *(request.num_context for request in decoding))  # an open round feeds one token more
            self._row_tokens = self._verify(rows, self._choose_draft_length(decoding, num_context, len(rows)))
        self._remove_finished()
        if self._may_shrink:
            self._may_shrink = False
            self.scheduler.slots.trim()
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
        if self._drafter is not None:
            self._drafter.propose([DraftRow(0, token, 1)])
            self._drafter.reset()

    def warm_up(self) -> None:
        """Measures steps of some shapes, so that the first requests are served at a known cost. Stops when it has taken
        WARM_UP_SECONDS: a large model gets fewer shapes."""
        started = time.perf_counter()
        full = self._num_draft_tokens + 1
        token = np.zeros(1, np.int64)
        for num_rows in sorted({1, min(4, self.num_slots), self.num_slots}):
            for num_tokens in (1, 1, full, full):  # the first run of a shape is not measured
                if num_rows * num_tokens > self._max_num_tokens or time.perf_counter() - started > WARM_UP_SECONDS:
                    return
                step = self._target.step(0, num_rows, num_tokens)
                for row in range(num_rows):
                    step.set_row(row, 0, token)
                self._run(step)
            if self._drafter is not None:
                for _ in range(SURE + 1):
                    self._propose([DraftRow(slot, token, 2) for slot in range(num_rows)])
                    for slot in range(num_rows):
                        self._drafter.release(slot)

    def _choose_draft_length(self, rows: list[Request], num_context: int, num_rows: int) -> int:
        fits = self._num_fitting(num_rows, num_context)
        rates = [self._rate(request) for request in rows]
        limits = [self._draft_limit(request) for request in rows]
        unread = 0
        if self._drafter is not None:
            drafting = (request for request, limit in zip(rows, limits, strict=True) if limit)
            unread = sum(self._drafter.num_unread(request.slot, len(request.sequence)) for request in drafting)
        # What pays in the long step of a prompt need not pay in those that follow it.
        num_usual = min(num_context, MAX_USUAL_CONTEXT)
        length = self.draft_length.choose([rate.value for rate in rates], limits, num_usual, unread)
        if not length and any(limits):
            may_draft = [rate for rate, limit in zip(rates, limits, strict=True) if limit]
            for rate in may_draft:
                rate.fade()
            if self.draft_length.rest():
                may_draft[0].forget()  # one tries: all would have to catch up
        return min(fits, length)

    def _num_fitting(self, num_rows: int, num_context: int) -> int:
        """Draft tokens that a step of so many rows has room for."""
        return max(0, self._max_num_tokens // num_rows - num_context)

    def _draft_limit(self, request: Request) -> int:
        """Draft tokens that a round of the request has at most."""
        asked = request.params.num_speculative_tokens
        return self._num_draft_tokens if asked is None else min(asked, self._num_draft_tokens)

    def _rate(self, request: Request) -> AcceptanceRate:
        if request.acceptance_rate is None:
            request.acceptance_rate = AcceptanceRate(self.draft_length.usual_rate)
        return request.acceptance_rate

    def _prefill(self, rows: list[Request]) -> None:
        """Prompts that are too long to ride with the others get steps of their own, oldest first, within the budget
        of tokens that the running requests leave."""
        prefilling = [request for request in rows if request.state is RequestState.PREFILL]
        num_decoding = len(rows) - len(prefilling)
        budget = self._max_num_tokens - num_decoding * self._row_tokens
        for request in sorted(prefilling, key=lambda request: request.arrival):
            self.scheduler.slots.reuse_prefix(request)
            remaining = len(request.sequence) - request.num_cached
            if num_decoding and remaining <= self._row_tokens:
                continue
            limit = MAX_LOGITS_CHUNK if request.params.prompt_logprobs is not None else budget
            chunk = min(remaining, limit, budget)
            if request.needs_logits and MAX_LOGITS_CHUNK < chunk == remaining:
                chunk -= 1
            is_first = not num_decoding and budget == self._max_num_tokens
            if chunk < min(remaining, MIN_PREFILL_CHUNK) and not is_first:
                return
            budget -= chunk
            if chunk < remaining:
                self._run_chunk(request, chunk)
                continue
            alone = len(rows) == 1
            request.state = RequestState.DECODE
            self._verify([request], self._choose_draft_length([request], chunk, 1) if alone else 0)
            num_decoding += 1

    def _run_chunk(self, request: Request, num_tokens: int) -> None:
        step = self._target.step(request.slot, 1, num_tokens, with_logits=request.needs_prompt_logits)
        step.set_row(0, request.num_cached, request.sequence.tokens[request.num_cached :][:num_tokens])
        self._run(step)
        self._take(request, step, 0, num_tokens)

    def _verify(self, rows: list[Request], num_draft: int) -> int:
        """One step over `rows`, which own consecutive slots: decoding rows verify about `num_draft` draft tokens.
        Returns the tokens of a row."""
        num_tokens = self._plan(rows, num_draft)
        self._draft(rows, num_tokens)
        with_logits = any(request.needs_logits or request.needs_prompt_logits for request in rows)
        step = self._target.step(rows[0].slot, len(rows), num_tokens, with_logits=with_logits)
        fed = [self._fill(step, row, request, num_tokens) for row, request in enumerate(rows)]
        self._run(step)
        for row, request in enumerate(rows):
            self._take(request, step, row, fed[row])
        return num_tokens

    def _plan(self, rows: list[Request], num_draft: int) -> int:
        """Starts the rounds that are due and returns the tokens of each row: what the longest decoding row needs."""
        for request in rows:
            if request.state is RequestState.DECODE and request.round is None:
                request.round = self._new_round(request, num_draft)
        if self._drafter is not None and self._drafter.is_free:
            self._draft(rows, num_draft)  # before the step is sized: there may be less to verify
        num_tokens = 1
        for request in rows:
            if request.round is not None:
                context = request.num_context
                # A window is verified in one step: one token at a time would cost a step each.
                window = min(request.round.num_window, self._num_fitting(len(rows), context))
                wanted = max(num_draft if context else num_draft + 1, window)
                num_tokens = max(num_tokens, context + min(request.round.num_missing, wanted))
        for request in rows:
            remaining = len(request.sequence) - request.num_cached
            if request.state is RequestState.PREFILL and remaining <= num_tokens:
                request.state = RequestState.DECODE
                request.round = self._new_round(request, min(num_draft, num_tokens - remaining))
        return num_tokens

    def _new_round(self, request: Request, num_draft: int) -> Round:
        """An exact verdict does not depend on the round's length, a loose one does. A request that pauses its windows
        is decoded exactly, and the last round of the pause ends where the pause does."""
        length, limit, policy = len(request.sequence), self._draft_limit(request), request.policy
        if not policy.is_loose:
            return Round(length, min(num_draft, limit), policy)
        if self._step_costs is None:
            return Round(length, limit, policy)
        if request.loosening is None:
            request.loosening = Loosening(self._step_costs, policy.lookahead, limit, length)
        if (pause := request.loosening.resume_at - length) > 0:
            return Round(length, min(num_draft, limit, pause - 1), EXACT)
        return Round(length, limit, policy if request.loosening.is_open else EXACT, is_evidence=True)

    def _draft(self, rows: list[Request], num_tokens: int) -> None:
        """Makes the draft tokens that the step feeds, and of a loose round one more to compare with the last choice."""
        asked: list[tuple[Request, int]] = []
        for request in rows:
            if (round_ := request.round) is None or self._drafter is None:
                continue
            end = round_.end
            if not self._drafter.is_free:
                end = min(end, round_.num_fed + num_tokens - request.num_context + 1)
            if end > len(round_.draft):
                asked.append((request, end - round_.num_committed))
        if not asked or self._drafter is None:
            return
        proposals = self._propose([DraftRow(r.slot, r.sequence.tokens, count) for r, count in asked])
        for (request, count), proposal in zip(asked, proposals, strict=True):
            round_ = request.round
            assert round_ is not None
            draft = np.concatenate([round_.draft[: round_.num_committed], proposal])
            round_.set_draft(draft, round_.num_committed + count, is_whole=self._drafter.is_free)

    def _propose(self, rows: list[DraftRow]) -> list[IntArray]:
        assert self._drafter is not None
        unread = max(self._drafter.num_unread(row.slot, len(row.tokens)) for row in rows)
        self._drafter.prepare(rows)
        prepared, started = self._drafter.num_preparations, time.perf_counter()
        proposals = self._drafter.propose(rows)
        # What was read at length has brought its first draft tokens already.
        if self._drafter.num_preparations == prepared and unread <= MAX_USUAL_CONTEXT:
            longest = max(row.num_tokens for row in rows)
            self.draft_length.observe_drafting(len(rows), longest, time.perf_counter() - started)
        return proposals

    def _fill(self, step: Step, row: int, request: Request, num_tokens: int) -> int:
        """Writes one row of the step and returns how many tokens it has."""
        round_ = request.round
        context = request.sequence.tokens[request.num_cached :][:num_tokens]
        if round_ is None:
            step.set_row(row, request.num_cached, context)
            return len(context)
        if len(round_.choices):
            count = 1 if round_.is_careful else num_tokens
            draft = round_.draft[round_.num_fed : min(round_.num_fed + count, round_.end)]
            step.set_row(row, request.num_cached, draft, policy=round_.policy)  # which says what the gate looks at
            return len(draft)
        draft = round_.draft[: 0 if round_.is_careful else min(num_tokens - len(context), round_.end)]
        step.set_row(row, request.num_cached, context, draft, round_.policy)
        return len(context) + len(draft)

    def _take(self, request: Request, step: Step, row: int, num_fed: int) -> None:
        """Takes what a step says of one row. What goes wrong here is this request's: the others go on."""
        try:
            if np.isnan(step.entropy_topk[row, :num_fed]).any():
                self._target.clear_slot(request.slot, request.num_cached)
                if request.round is not None and num_fed > max(1, request.num_context):
                    request.round.is_careful = True  # the draft tokens may be to blame
                    return
                if request.round is None or not request.round.num_window:  # part of the sequence
                    raise _not_numbers(request)
            if request.round is None:
                self._advance_prompt(request, step, row, num_fed)
            else:
                self._settle(request, request.round, step, row, num_fed)
        except FlyError as error:
            request.fail(error)
            self._changed[request] = None

    def _settle(self, request: Request, round_: Round, step: Step, row: int, num_fed: int) -> None:
        """Takes a step's outputs for one decoding row, decides what they decide, and commits it."""
        begin = request.num_context - 1 if not len(round_.choices) else 0
        positions = slice(begin, num_fed)
        logits = None if step.logits is None else step.logits[row, positions]
        if request.needs_prompt_logits:
            self._collect_prompt_logprobs(request, step, row, num_fed)
        is_whole = not len(round_.choices) and num_fed - begin == round_.num_draft + 1
        request.num_cached += num_fed
        if is_whole and request.sampler is None and self._engine_decides(request, round_):
            round_.add(step.argmax[row, positions], _gates(round_, step, row, positions), logits)
            verdict = Verdict(int(step.num_accepted[row]), int(step.next_token[row]))
        else:
            choices, gates = self._choices(request, round_, step, row, positions, logits)
            wanted = None if logits is None or request.params.logprobs is None else logits[: len(choices)]
            round_.add(choices, gates, wanted)
            request.num_cached = min(request.num_cached, round_.start + round_.num_fed)  # a sampler may choose fewer
            verdict = round_.verdict(self._never_loosened(request))
        self._commit(request, round_, verdict)

    def _engine_decides(self, request: Request, round_: Round) -> bool:
        """Whether the head's verdict holds: it does not know the stop tokens that only this request has."""
        return not request.stop_token_ids or not round_.policy.is_loose

    def _never_loosened(self, request: Request) -> frozenset[int]:
        return request.end_token_ids | self._target.info.stop_token_ids

    def _choices(
        self, request: Request, round_: Round, step: Step, row: int, positions: slice, logits: FloatArray | None
    ) -> tuple[IntArray, FloatArray]:
        if request.sampler is None:
            gates = _gates(round_, step, row, positions).copy()
            return np.where(np.isnan(gates), NO_CHOICE, step.argmax[row, positions]), gates
        assert logits is not None
        verified = len(round_.choices)
        undecided = round_.draft[round_.num_committed : verified]
        return request.sampler.choose(logits, request.output_tokens, undecided, round_.draft[verified:])

    def _commit(self, request: Request, round_: Round, verdict: Verdict) -> None:
        before = round_.num_committed
        tokens = round_.draft[before : verdict.num_accepted].tolist()
        if verdict.next_token is not None:
            tokens.append(verdict.next_token)
            request.num_cached = min(request.num_cached, round_.start + verdict.num_accepted)
        logprobs = None
        if request.params.logprobs is not None and tokens:
            rows = round_.logits[before : before + len(tokens)]
            logprobs = token_logprobs(rows, request.params.logprobs, np.array(tokens), self._tokenizer)
        num_emitted = request.commit(tokens, logprobs) if tokens else 0
        kept = before + min(num_emitted, verdict.num_accepted - before)
        round_.num_committed = verdict.num_accepted
        self._metrics.record_emission(request, num_emitted)
        if num_emitted:
            self._changed[request] = None
        if verdict.next_token is None and not request.is_finished:
            round_.logits = round_.logits.copy()  # the step's buffers are used again
        else:
            self._end_round(request, round_, kept, was_rejected=verdict.num_accepted < round_.end)

    def _end_round(self, request: Request, round_: Round, num_kept: int, *, was_rejected: bool) -> None:
        request.round = None
        num_verified = min(len(round_.draft), len(round_.choices))
        if num_verified:
            num_loosened = round_.num_loosened(num_kept)
            request.metrics.record_round(num_verified, num_kept, num_loosened)
            self._metrics.record_round(num_verified, num_kept, num_loosened)
            for seen_by in (self._rate(request).observe, self.draft_length.observe_round):
                seen_by(round_.num_committed, was_rejected)
        if request.loosening is not None and round_.is_evidence and not request.is_finished:
            request.loosening.observe(round_.evidence(self._never_loosened(request)), len(request.sequence))

    def _advance_prompt(self, request: Request, step: Step, row: int, num_tokens: int) -> None:
        if request.needs_prompt_logits:
            self._collect_prompt_logprobs(request, step, row, num_tokens)
        request.num_cached += num_tokens

    def _collect_prompt_logprobs(self, request: Request, step: Step, row: int, num_tokens: int) -> None:
        """Position t of the step predicts prompt token num_cached + t + 1."""
        assert step.logits is not None
        assert request.params.prompt_logprobs is not None
        following = request.sequence.tokens[request.num_cached + 1 : len(request.prompt_token_ids)][:num_tokens]
        logits = step.logits[row, : len(following)]
        found = token_logprobs(logits, request.params.prompt_logprobs, following, self._tokenizer)
        request.prompt_logprobs += found if request.prompt_logprobs else [None, *found]

    def _run(self, step: Step) -> None:
        prepared, started = self._target.num_preparations, time.perf_counter()
        self._target.run(step)
        if self._target.num_preparations == prepared:
            self.draft_length.target_cost.observe(step.input_ids.size, time.perf_counter() - started)

    def _remove_finished(self) -> None:
        for request in self._changed:
            if request.is_finished and request.slot >= 0:
                self._remove(request)

    def _remove(self, request: Request) -> None:
        self._may_shrink |= request.slot >= 0
        self.scheduler.remove(request)
        self._metrics.record_end(request)

    def _take_changed(self) -> list[Request]:
        changed, self._changed = list(self._changed), {}
        self._set_load()
        return changed

    def _set_load(self) -> None:
        self._metrics.set_load(self.scheduler, self._max_seq_len)


def _not_numbers(request: Request) -> EngineError:
    return EngineError(
        f"request {request.request_id}: the target's logits after {len(request.sequence)} tokens are not numbers: a "
        "float16 engine overflows where one of --dtype bfloat16 or float32 does not; with those, look at the "
        "checkpoint's weights"
    )


def _gates(round_: Round, step: Step, row: int, positions: slice) -> FloatArray:
    """The entropy that the round's policy asked for."""
    entropy = step.entropy if round_.policy.use_full_entropy else step.entropy_topk
    return entropy[row, positions]
