"""Audits of finished requests: which are drawn, where they wait, when they run, and what ends them.

The loop offers what has ended, the engine thread asks for steps: when nothing else runs, or beside what runs for a
bounded share of the time. A step is small, and what it needs of the caches is a slot that nobody else wants, so that no
request waits longer than for one. Nothing that goes wrong here is a request's: a step that fails ends its audit. It
knows requests and slots, and nothing of threads, or of who judges results.
"""

import logging
import time
from dataclasses import dataclass, replace

import numpy as np

from fly_trt.engines.base import Engine
from fly_trt.errors import EngineDeadError, one_line
from fly_trt.runtime.audit import AuditConfig, AuditCounts, AuditResult, LeftOut, OnResult
from fly_trt.runtime.breaker import DEFAULT_SETTING
from fly_trt.runtime.reading import ExactText, NotNumbersError, Reading
from fly_trt.runtime.request import Request
from fly_trt.runtime.slots import Loan, SlotTable
from fly_trt.text.tokenizer import Detokenizer
from fly_trt.tokens import IntArray

logger = logging.getLogger(__name__)

STEP_TOKENS = 64  # of an audit's step, at most: what a request that arrives may have to wait for
LEAST_STEP_TOKENS = 2  # a row says of its last token nothing
WINDOW_SECONDS = 2.0  # of steps, whose share audits may have saved up
MAX_QUEUED_TOKENS = 1 << 20  # of all that wait, 4 bytes each
MAX_LOANS = 20  # slots that an audit may lose before it is given up
MAX_FAILURES = 3  # steps in a row that fail before no more audits are made


@dataclass(slots=True, eq=False)
class _Case:
    """A drawn request, and how far its audit is. `tokens` int32: prompt and output."""

    tokens: np.ndarray
    result: AuditResult  # but for what the audit finds
    end_token_ids: frozenset[int]
    max_tokens: int
    detokenizer: Detokenizer | None  # that finds stop strings, where there are some
    shows_ends: bool
    wants_exact: bool
    reading: Reading | None = None
    exact: ExactText | None = None
    seconds: float = 0.0
    num_loans: int = 0

    @property
    def length(self) -> int:
        """Tokens that a slot holds of it."""
        return max(len(self.tokens), 0 if self.exact is None else self.exact.num_tokens)

    @property
    def prompt(self) -> IntArray:
        return self.tokens[: self.result.num_prompt_tokens].astype(np.int64)

    def ends(self, token: int, position: int) -> bool:
        """Whether the request would have ended with this token; as Request.commit has it, without min_tokens."""
        is_end = token in self.end_token_ids
        if self.detokenizer is not None and (self.shows_ends or not is_end) and self.detokenizer.push(token):
            return True
        return is_end or position + 1 >= self.max_tokens


class Auditor:
    """Audits over the target and the slots of one loop. `is_shared`: others write to the caches between two turns.
    on_result takes each result, in the engine thread. One thread uses it; any thread reads `counts`."""

    def __init__(
        self,
        config: AuditConfig,
        on_result: OnResult,
        *,
        target: Engine,
        slots: SlotTable,
        max_seq_len: int,
        max_num_tokens: int,
        is_shared: bool = False,
    ) -> None:
        self.config = config
        self.counts = AuditCounts()
        self._on_result = on_result
        self._target = target
        self._slots = slots
        self._max_seq_len = max_seq_len
        self._max_num_tokens = max_num_tokens
        self._size = max(LEAST_STEP_TOKENS, min(STEP_TOKENS, max_num_tokens, max_seq_len))
        self._is_shared = is_shared
        self._queue: list[_Case] = []
        self._num_queued_tokens = 0
        self._case: _Case | None = None
        self._loan: Loan | None = None
        self._num_failures = 0
        self._longest = 0  # tokens that a slot held for an audit since the caches were trimmed for requests
        self._credit = 0.0  # seconds that audits may take beside what runs

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do, and a slot for it."""
        if self._case is None and not self._queue:
            return False
        has_loan = self._loan is not None and not self._loan.is_over
        return has_loan or self._slots.can_lend

    @property
    def has_share(self) -> bool:
        """Whether the share of the time allows a step while requests run."""
        return self._credit > 0

    def earn(self, seconds: float) -> None:
        """Requests had steps of so many seconds."""
        share = self.config.share
        self._credit = min(self._credit + seconds * share / (1 - share), share * WINDOW_SECONDS)

    def offer(self, request: Request) -> None:
        """A request has ended. Runs no engine."""
        self.counts.num_finished += 1
        number = self.counts.num_finished
        if not self.config.draws(number) or self._num_failures >= MAX_FAILURES:
            return
        self.counts.num_drawn += 1
        reason = self._reason_against(request)
        if reason is not None:
            self.counts.left_out[reason] += 1
            return
        case = _case_of(request, wants_exact=self.config.draws_exact(number))
        self._queue.append(case)
        self._num_queued_tokens += len(case.tokens)
        while len(self._queue) > self.config.max_queue_size or self._num_queued_tokens > MAX_QUEUED_TOKENS:
            dropped = self._queue.pop(self.config.draws_place(number, len(self._queue)))
            self._num_queued_tokens -= len(dropped.tokens)
            self.counts.left_out["dropped"] += 1
        self._count_waiting()

    def step(self, *, is_beside: bool = False) -> None:
        """One step of an audit. is_beside: requests run, which it takes a share of the time from; what is longer than
        all that they need of the caches then waits. Raises EngineDeadError, and what reading the caches of running
        requests again raises after a step that failed."""
        started = time.perf_counter()
        case, is_over = self._next_case(self._slots.num_room + STEP_TOKENS if is_beside else None), False
        if case is None:
            return
        try:
            loan = self._borrow(case)
            if loan is not None:
                is_over = self._advance(case, loan)
                self._num_failures = 0
                self._longest = max(self._longest, loan.num_tokens)
                if is_over and not self._queue:
                    self.make_way()
        except EngineDeadError:
            raise
        except NotNumbersError as error:
            logger.warning("request %s is not audited: %s", case.result.request_id, error)
            self._leave_out("faulty")
        except Exception as error:
            logger.exception("a step of an audit failed, and ends the audit")
            self._fail(one_line(error))
        finally:
            self._charge(case, time.perf_counter() - started, is_beside=is_beside)
        if is_over and self._case is case:
            self._finish(case)

    def make_way(self) -> None:
        """Requests are to run, or no audit is: the caches shrink to what requests need. Raises what the engines
        raise."""
        if self._longest > self._slots.num_room + STEP_TOKENS:
            self._slots.trim()
        self._longest = 0

    def leave_turn(self) -> None:
        """Others may write to the caches from now on, where they are shared."""
        if self._is_shared and self._loan is not None:
            self._loan.is_over = True

    def _reason_against(self, request: Request) -> LeftOut | None:
        """Why a request is not audited."""
        if request.error is not None:
            return "failed"
        if request.finish_reason == "abort":
            return "aborted"
        if not request.policy.is_loose or request.metrics.exact_because is not None:
            return "exact"
        if request.params.temperature > 0:
            return "sampled"
        if request.grammar is not None:
            return "structured"
        if request.sampler is not None:
            return "changed_scores"
        if len(request.prompt_token_ids) + len(request.output_token_ids) > self.config.max_tokens:
            return "too_long"
        return None

    def _next_case(self, room: int | None) -> _Case | None:
        """The one that is under way, or the newest: its prompt is likely to be in a cache still. With `room` for so
        many tokens none that is longer: one that is under way waits again."""
        if self._case is not None and (room is None or self._case.length <= room):
            return self._case
        fitting = (at for at in reversed(range(len(self._queue))) if room is None or self._queue[at].length <= room)
        if (newest := next(fitting, None)) is None:
            return None
        case = self._queue.pop(newest)
        self._num_queued_tokens -= len(case.tokens)
        if self._case is not None:
            self._queue.append(self._case)
            self._num_queued_tokens += len(self._case.tokens)
        if self._loan is not None:
            self._loan.is_over = True
        self._case = case
        self._count_waiting()
        return case

    def _borrow(self, case: _Case) -> Loan | None:
        """A slot for the case, one with the prompt where another slot holds it; None where there is none, and where the
        case lost too many."""
        if self._loan is not None and not self._loan.is_over:
            return self._loan
        if case.num_loans == MAX_LOANS:
            self._leave_out("dropped")
            return None
        case.num_loans += 1
        self._loan = self._slots.lend(case.prompt)
        return self._loan

    def _advance(self, case: _Case, loan: Loan) -> bool:
        """Runs one step of the case; whether that was the last."""
        if case.reading is None:
            case.reading = Reading(case.tokens.astype(np.int64), case.result.num_prompt_tokens, self._size)
        if case.exact is not None:
            case.exact.step(self._target, loan)
        else:
            case.reading.step(self._target, loan)
        if case.reading.is_done and case.exact is None and case.wants_exact:
            case.exact = ExactText(case.reading, case.ends, self._max_seq_len, self._size)
        return case.reading.is_done if case.exact is None else case.exact.is_done

    def _finish(self, case: _Case) -> None:
        reading, exact = case.reading, case.exact
        assert reading is not None
        self._case = None
        self.counts.num_audited += 1
        result = replace(
            case.result,
            num_differing=reading.num_differing,
            parted_at=reading.parted_at,
            log_likelihood=reading.log_likelihood,
            best_log_likelihood=reading.best_log_likelihood,
            seconds=case.seconds,
            exact=None if exact is None else exact.comparison(),
            prompt_token_ids=case.prompt,
            token_ids=reading.tokens[reading.num_prompt :],
        )
        try:
            self._on_result(result)
        except Exception:  # whoever judges audits ends neither them nor requests
            logger.exception("request %s: what takes the results of audits failed", result.request_id)

    def _leave_out(self, reason: LeftOut) -> None:
        self._case = None
        self.counts.left_out[reason] += 1

    def _fail(self, reason: str) -> None:
        """Nobody knows what the caches hold: those that run have to have theirs again."""
        self._leave_out("faulty")
        self._num_failures += 1
        if self._num_failures == MAX_FAILURES:
            logger.error("%d steps of audits in a row failed (%s): no more audits are made", MAX_FAILURES, reason)
            self.counts.left_out["dropped"] += len(self._queue)
            self._queue.clear()
            self._count_waiting()
        self._slots.read_again(self._max_num_tokens)

    def _charge(self, case: _Case, seconds: float, *, is_beside: bool) -> None:
        case.seconds += seconds
        self.counts.seconds += seconds
        if is_beside:
            self.counts.seconds_beside += seconds
            self._credit -= seconds

    def _count_waiting(self) -> None:
        self.counts.num_waiting = len(self._queue)


def _case_of(request: Request, *, wants_exact: bool) -> _Case:
    params, detokenizer = request.params, None
    if wants_exact and params.stop_strings:
        detokenizer = request.detokenizer.anew(request.prompt_token_ids)
    return _Case(
        tokens=np.array([*request.prompt_token_ids, *request.output_token_ids], np.int32),
        result=AuditResult(
            request_id=request.request_id,
            index=request.index,
            acceptance=request.policy.name,
            setting=request.setting or DEFAULT_SETTING,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_tokens=len(request.output_token_ids),
            num_loosened=request.metrics.num_loosened_tokens,
            finished_at=time.time(),
        ),
        end_token_ids=request.end_token_ids,
        max_tokens=request.max_tokens,
        detokenizer=detokenizer,
        shows_ends=params.include_stop_str_in_output,
        wants_exact=wants_exact,
    )
