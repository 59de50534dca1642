"""What happens next: which requests run, and what each step of the target processes.

First come, first served, each in a slot of its own, behind a queue of limited length. An iteration prefills under a
token budget and then takes one verification step over all active slots; a row of it carries drafts to verify or, while
its prompt is not finished, the next chunk of it. The queue and the set of running requests change only here. The
scheduler runs no target engine: it hands out plans.
"""

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from fly_trt.errors import QueueFullError
from fly_trt.runtime.feed import Feed
from fly_trt.runtime.request import Request, RequestState
from fly_trt.runtime.slots import SlotTable
from fly_trt.runtime.speculation import Speculation

# Logits of a whole prompt chunk are large: V = 128 k and 64 tokens are 33 MB. Where an engine gives all of them or
# none, a longer prompt that needs the logits of its last token only is read without any up to there.
MAX_LOGITS_CHUNK = 64
MIN_PREFILL_CHUNK = 16


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the target: rows of `num_tokens` tokens for the slots from `first_slot` on, each with its request and
    what it is fed, that speaks of as many positions as anybody wants to hear of."""

    first_slot: int
    num_tokens: int
    rows: list[tuple[Request, Feed]]
    with_logits: bool
    with_top: bool = False

    @property
    def num_positions(self) -> int:
        return max(feed.num_heard for _, feed in self.rows)


class Scheduler:
    """`running` is in the order of slots, 0 .. n - 1, after `schedule`, which admits nobody while `is_admitting` is
    False. max_num_tokens: of prompts and again of verification per iteration. has_positions: of the target's steps, see
    EngineInfo."""

    def __init__(
        self,
        slots: SlotTable,
        speculation: Speculation,
        *,
        max_num_tokens: int,
        max_queue_size: int,
        has_positions: bool = True,
    ) -> None:
        self.slots = slots
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.is_admitting = True
        self._speculation = speculation
        self._max_num_tokens = max_num_tokens
        self._max_queue_size = max_queue_size
        self._has_positions = has_positions
        self._row_tokens = 1  # of the last verification step

    @property
    def num_free_places(self) -> int:
        """Requests that can still be added."""
        return max(0, self._max_queue_size - len(self.waiting))

    def add(self, requests: list[Request]) -> None:
        """Queues all of the requests or none. Raises QueueFullError when they do not fit."""
        if len(requests) > self.num_free_places:
            raise QueueFullError(
                f"the queue is full: {len(self.waiting)} requests wait and max_queue_size is {self._max_queue_size}: "
                "try again later, or serve with a larger max_queue_size"
            )
        self.waiting.extend(requests)

    def schedule(self) -> list[Request]:
        """Admits waiting requests while slots are free, closes the gaps, and returns all that run, by slot."""
        while self.is_admitting and self.waiting and self.slots.has_room:
            request = self.waiting[0]  # until it has a slot: the engine may fail while it makes room
            self.slots.admit(request)
            self.waiting.popleft()
            request.enter(RequestState.PREFILL)
        self.slots.compact()
        self.running = self.slots.active
        return self.running

    def remove(self, request: Request) -> None:
        """Takes a finished request out, wherever it is."""
        if request.slot >= 0:
            self.slots.release(request)
            self.running = self.slots.active
        elif request in self.waiting:
            self.waiting.remove(request)

    def plan(self, changed: Collection[Request]) -> Iterator[StepPlan]:
        """The steps of one iteration, each planned when the one before it is settled.

        changed: the requests that emitted tokens or ended since the iteration began."""
        rows = self.schedule()
        yield from self._prompt_steps(rows)
        rows = self.schedule() if any(request.is_finished for request in rows) else rows
        decoding = [request for request in rows if request.state is RequestState.DECODE]
        if all(request in changed for request in decoding):
            return  # what a prompt's own step emitted is delivered first
        num_context = max(1, *(request.num_context for request in decoding))  # an open round feeds one token more
        plan = self._verification(rows, self._draft_length(decoding, num_context, len(rows)))
        self._row_tokens = plan.num_tokens
        yield plan

    def _prompt_steps(self, rows: list[Request]) -> Iterator[StepPlan]:
        """Prompts that are too long to ride with the others get steps of their own, oldest first, within the budget
        of tokens that the running requests leave."""
        prefilling = [request for request in rows if request.state is RequestState.PREFILL]
        num_decoding = len(rows) - len(prefilling)
        budget = self._max_num_tokens - num_decoding * self._row_tokens
        for request in sorted(prefilling, key=lambda request: request.arrival):
            self.slots.reuse_prefix(request)
            remaining = len(request.uncached)
            if num_decoding and remaining <= self._row_tokens:
                continue
            limit = MAX_LOGITS_CHUNK if request.params.prompt_logprobs is not None else budget
            chunk = min(remaining, limit, budget)
            if not self._has_positions and request.needs_logits and MAX_LOGITS_CHUNK < chunk == remaining:
                chunk -= 1
            is_first = not num_decoding and budget == self._max_num_tokens
            if chunk < min(remaining, MIN_PREFILL_CHUNK) and not is_first:
                return
            budget -= chunk
            if chunk < remaining:
                row = request, self._feed(request, chunk)
                yield StepPlan(request.slot, chunk, [row], request.needs_prompt_logits)
                continue
            is_alone = len(rows) == 1
            request.enter(RequestState.DECODE)
            yield self._verification([request], self._draft_length([request], chunk, 1) if is_alone else 0)
            num_decoding += 1

    def _verification(self, rows: list[Request], num_draft: int) -> StepPlan:
        """One step over `rows`, which own consecutive slots: decoding rows verify about `num_draft` draft tokens."""
        num_tokens = self._open_rounds(rows, num_draft)
        self._speculation.draft(rows, num_tokens)
        with_logits = any(request.needs_logits or request.needs_prompt_logits for request in rows)
        feeds = [(row, self._feed(row, num_tokens)) for row in rows]
        fed = max(feed.num_tokens for _, feed in feeds)  # less than planned where drafts ended early
        return StepPlan(rows[0].slot, fed, feeds, with_logits, with_top=any(row.needs_top for row in rows))

    def _open_rounds(self, rows: list[Request], num_draft: int) -> int:
        """Starts the rounds that are due and returns the tokens of each row: what the longest decoding row needs."""
        num_forced = self._num_forced(rows, num_draft)
        for request in rows:
            if request.state is RequestState.DECODE and request.round is None:
                self._speculation.start_round(request, num_draft, num_forced)
        if self._speculation.drafts_are_free:
            self._speculation.draft(rows, num_draft)  # before the step is sized: there may be less to verify
        num_tokens = 1
        for request in rows:
            if request.round is not None:
                context = request.num_context
                fitting = self._num_fitting(len(rows), context)
                # A window is verified in one step: one token at a time would cost a step each.
                window = min(request.round.num_window, fitting)
                # After a long context it can wait: the next step has one token of it.
                least = min(request.round.least_fed, fitting) if context > 1 else request.round.least_fed
                forced = min(request.round.num_forced_left, num_forced)
                wanted = max(num_draft if context else num_draft + 1, window, least, forced)
                num_tokens = max(num_tokens, context + min(request.round.num_missing, wanted))
        for request in rows:
            remaining = len(request.uncached)
            if request.state is RequestState.PREFILL and remaining <= num_tokens:
                request.enter(RequestState.DECODE)
                room = num_tokens - remaining
                self._speculation.start_round(request, min(num_draft, room), min(num_forced, room))
        return num_tokens

    def _draft_length(self, rows: list[Request], num_context: int, num_rows: int) -> int:
        """Draft tokens of a step of `num_rows`, of which `rows` decode."""
        return min(self._num_fitting(num_rows, num_context), self._speculation.choose_length(rows, num_context))

    def _num_forced(self, rows: list[Request], num_draft: int) -> int:
        """Tokens forced by grammars that a step over `rows` verifies of a row."""
        decoding = [request for request in rows if request.state is RequestState.DECODE]
        num_context = max(request.num_context for request in decoding)
        chosen = self._speculation.choose_forced(decoding, len(rows), num_draft)
        return min(self._num_fitting(len(rows), num_context), chosen)

    def _num_fitting(self, num_rows: int, num_context: int) -> int:
        """Draft tokens that a step of so many rows has room for."""
        return max(0, self._max_num_tokens // num_rows - num_context)

    def _feed(self, request: Request, num_tokens: int) -> Feed:
        """What the request's row of a step has: of a prompt the next chunk. Of a chunk nobody wants to hear; its last
        position shows whether what is not a number may lie in the slot. It does not show what a model's windows keep
        from it, which harms nobody else where the engine leaves masked keys out, and is shown where it does not."""
        if request.round is None:
            feed = Feed(request.uncached[:num_tokens], is_wanted=False)
            heard_from = feed.num_tokens - 1
        else:
            feed = request.round.feed(request.uncached, num_tokens)
            heard_from = feed.first
        if request.needs_prompt_logits or (self._speculation.prompt_reader is not None and request.is_reading_prompt):
            return feed._replace(heard_from=0, is_wanted=True)
        return feed._replace(heard_from=heard_from)
