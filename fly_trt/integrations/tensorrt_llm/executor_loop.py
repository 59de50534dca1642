"""The loop that drives TensorRT-LLM's C++ Executors: it asks, waits for answers of either, and commits what they say.

TensorRT-LLM batches what runs at the same time; so all running requests have a part of their round in flight at once,
each on its own, and none waits for another. It knows requests and rounds, and nothing of how engines are loaded.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from fly_trt.drafting.ngram import NgramIndex
from fly_trt.errors import EngineDeadError, EngineError, FlyError, QueueFullError, one_line
from fly_trt.integrations.tensorrt_llm.executor_client import Answer, ExecutorClient, Mailbox
from fly_trt.integrations.tensorrt_llm.executor_requests import RequestForms, seed_of
from fly_trt.integrations.tensorrt_llm.executor_rounds import Flight, RoundSettings
from fly_trt.runtime.metrics import Metrics
from fly_trt.runtime.request import Request, RequestState

WAIT_SECONDS = 0.05  # of a step for an answer: what the engine thread does between two steps waits no longer
PROBE_SECONDS = 60.0
LOST = ("CANCELLED", "TIMED_OUT")


class ExecutorLoop:
    """An OwnExecutor over the target's executor and, where a model drafts, the draft's. `mailbox` is that of both.
    num_slots: requests that run at once; max_queue_size: those that may wait; release: shuts the executors down."""

    def __init__(
        self,
        target: ExecutorClient,
        draft: ExecutorClient | None,
        mailbox: Mailbox,
        forms: RequestForms,
        settings: RoundSettings,
        metrics: Metrics,
        *,
        num_slots: int,
        max_queue_size: int,
        release: Callable[[], None],
    ) -> None:
        self.is_admitting = True
        self._release = release
        self._target = target
        self._draft = draft
        self._mailbox = mailbox
        self._forms = forms
        self._settings = settings
        self._metrics = metrics
        self._num_slots = num_slots
        self._max_queue_size = max_queue_size
        self._lock = threading.Lock()  # guards the queue, which others add to
        self._waiting: deque[Request] = deque()
        self._flights: dict[Request, Flight] = {}
        self._asked: dict[tuple[ExecutorClient, int], Flight] = {}
        self._changed: dict[Request, None] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._flights or self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._flights)

    @property
    def num_free_places(self) -> int:
        return max(0, self._max_queue_size - len(self._waiting))

    def check(self, request: Request) -> None:
        """Raises RequestError for what cannot be had, by the name of the setting."""
        self._forms.check(request, self._num_draft(request))

    def add(self, requests: list[Request]) -> None:
        """Queues all of the requests or none. Raises QueueFullError when they do not fit."""
        with self._lock:
            if len(requests) > self.num_free_places:
                raise QueueFullError(
                    f"the queue is full: {len(self._waiting)} requests wait and max_queue_size is "
                    f"{self._max_queue_size}: try again later, or serve with a larger max_queue_size"
                )
            self._waiting.extend(requests)
        self._mailbox.wake()

    def step(self) -> list[Request]:
        """Asks for what is due, takes what has been answered, and asks for what that makes due, before anybody is told:
        the GPU need not wait for that. Returns the requests that emitted tokens or ended."""
        self._admit()
        self._ask()
        for answer in self._mailbox.take(WAIT_SECONDS if self._asked else 0.0):
            self._take(answer)
        self._ask()
        self._set_load()
        changed, self._changed = list(self._changed), {}
        return changed

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is, on both executors. What it has emitted stays."""
        if not request.is_finished:
            request.finish("abort")
            self._remove(request)
            self._set_load()

    def fail_running(self, reason: str) -> list[Request]:
        """After a step that raised: ends the requests that run, each with an EngineError. Those that wait go on
        waiting. Returns what `step` would have."""
        for request in list(self._flights):
            name = f"request {request.request_id}"
            request.fail(EngineError(f"{name}: the step that it was in failed ({reason}): send it again"))
            self._changed[request] = None
            self._remove(request)
        changed, self._changed = list(self._changed), {}
        return changed

    def probe(self) -> None:
        """Has each executor say one token, while no request is running. Raises what is wrong with one that does not."""
        for client in filter(None, (self._draft, self._target)):
            request_id = client.enqueue([self._forms.draft(np.zeros(1, np.int64), [], 1)])[0]
            deadline = time.monotonic() + PROBE_SECONDS
            while time.monotonic() < deadline:
                said = [a for a in self._mailbox.take(WAIT_SECONDS) if (a.client, a.request_id) == (client, request_id)]
                if failed := next((answer.error for answer in said if answer.error), None):
                    raise EngineDeadError(f"TensorRT-LLM's executor of the {client.name} fails at one token ({failed})")
                if any(answer.is_final for answer in said):
                    break
            else:
                raise EngineDeadError(
                    f"TensorRT-LLM's executor of the {client.name} did not answer for {PROBE_SECONDS:g} s"
                )

    def close(self) -> None:
        """Shuts the executors down. Each goes on until what it runs has ended: so that is cancelled."""
        for client, request_id in self._asked:
            with contextlib.suppress(EngineDeadError):
                client.cancel(request_id)
        self._release()

    def _num_draft(self, request: Request) -> int:
        asked, limit = request.params.num_speculative_tokens, self._settings.num_draft_tokens
        return limit if asked is None else min(asked, limit)

    def _admit(self) -> None:
        while self.is_admitting and len(self._flights) < self._num_slots:
            with self._lock:
                if not self._waiting:
                    return
                request = self._waiting.popleft()
            request.enter(RequestState.PREFILL)
            lookup = self._settings.lookup
            index = None if lookup is None else NgramIndex(*lookup[:2])
            self._flights[request] = Flight(request, self._num_draft(request), seed_of(request), index)

    def _ask(self) -> None:
        """Enqueues what is due; that of one executor together, so that it begins in one batch."""
        due: dict[ExecutorClient, list[tuple[Flight, object]]] = {}
        for flight in [flight for flight in self._flights.values() if flight.piece is None]:
            try:
                client, form = self._form(flight)
            except Exception as error:  # the library refuses an argument: it is this request's
                self._fail(flight, EngineError(f"request {flight.request.request_id}: {one_line(error)}"))
                continue
            due.setdefault(client, []).append((flight, form))
        for client, asked in due.items():
            ids = client.enqueue([form for _, form in asked])
            self._asked |= {(client, at): flight for at, (flight, _) in zip(ids, asked, strict=True)}

    def _form(self, flight: Flight) -> tuple[ExecutorClient, object]:
        piece = flight.piece = flight.next_piece(self._settings)
        if not piece.is_verification:
            assert self._draft is not None
            return self._draft, self._forms.draft(piece.context, piece.draft, piece.max_tokens)
        form = self._forms.target(
            flight.request,
            piece.draft,
            piece.max_tokens,
            flight.seed,
            is_first=flight.is_first,
            streams=not flight.num_draft,
        )
        return self._target, form

    def _take(self, answer: Answer) -> None:
        """What goes wrong with an answer is its request's: the others go on."""
        flight = self._asked.get((answer.client, answer.request_id))
        if flight is None:
            return  # of a request that was aborted
        if answer.is_final:
            del self._asked[answer.client, answer.request_id]
        try:
            self._check(flight, answer)
            if flight.piece is not None and not flight.piece.is_verification:
                flight.take_draft(answer.tokens, self._settings)
            elif flight.num_draft:
                self._decide(flight, answer)
            elif answer.tokens:
                self._commit(flight, answer.tokens)
        except FlyError as error:
            self._fail(flight, error)
        if answer.is_final:
            flight.piece = None
        if flight.request.is_finished:
            self._remove(flight.request)

    def _check(self, flight: Flight, answer: Answer) -> None:
        name, executor = f"request {flight.request.request_id}", f"TensorRT-LLM's executor of the {answer.client.name}"
        if answer.error is not None:
            raise EngineError(f"{name}: {executor} failed ({answer.error}): send it again")
        if answer.reason in LOST:
            raise EngineError(f"{name}: {executor} gave it up ({answer.reason}): send it again")
        if not flight.num_draft and answer.is_final and not answer.tokens:
            raise EngineError(f"{name}: {executor} ended it early: send it again")
        flight.num_reused_blocks = max(flight.num_reused_blocks, answer.num_reused_blocks)

    def _decide(self, flight: Flight, answer: Answer) -> None:
        num_accepted = flight.take_verdict(answer.tokens)
        num_kept = min(self._commit(flight, answer.tokens), num_accepted)
        has_draft = bool(flight.draft)
        counts = flight.end_round(num_kept, self._settings.source)
        if has_draft:
            flight.request.metrics.record_round(counts)
            self._metrics.record_round(counts, flight.request.policy.name)

    def _commit(self, flight: Flight, tokens: list[int]) -> int:
        request = flight.request
        is_first = flight.is_first
        if is_first:
            request.enter(RequestState.DECODE)
        num_emitted = request.commit(tokens)
        if not request.is_finished:
            request.hold(len(request.sequence) - 1)
        self._metrics.record_tokens(num_emitted, request.seconds_since_tokens(), is_first=is_first)
        self._changed[request] = None
        return num_emitted

    def _fail(self, flight: Flight, error: FlyError) -> None:
        flight.request.fail(error)
        self._changed[flight.request] = None
        self._remove(flight.request)

    def _remove(self, request: Request) -> None:
        """Takes out a request that has ended, and what is in flight for it on either executor."""
        flight = self._flights.pop(request, None)
        if flight is None:
            with self._lock:
                if request not in self._waiting:
                    return
                self._waiting.remove(request)
        else:
            for client, request_id in [key for key, asked in self._asked.items() if asked is flight]:
                del self._asked[client, request_id]
                client.cancel(request_id)
            num_prompt = len(request.prompt_token_ids)
            request.num_prefix_hits = min(num_prompt, flight.num_reused_blocks * self._target.tokens_per_block)
            request.metrics.num_cached_tokens = request.num_prefix_hits
            self._metrics.record_prompt(num_prompt, request.num_prefix_hits)
        self._metrics.record_end(request.finish_reason or "abort", request.metrics.latency or 0.0)

    def _set_load(self) -> None:
        self._metrics.set_load(len(self._flights), len(self._waiting), self._target.cache_usage())
