"""Who owns which KV slot, and what the free ones still hold.

Active requests own the slots 0 .. num_active - 1, so that a step binds a prefix of the caches. A finished request's
slot keeps its cache until the slot is needed, and a prompt that begins like a kept or a running sequence starts from a
copy. Who reads for its own ends is lent a slot that no request has or wants. This module knows tokens and slots; moving
the caches is left to the engine and the drafter that it is given.
"""

from dataclasses import dataclass, field

import numpy as np

from fly_trt.drafting import Drafter
from fly_trt.drafting.base import ReadsOutputs, ReadsPrompts, common_prefix
from fly_trt.engines.base import Engine
from fly_trt.runtime.request import Request
from fly_trt.tokens import NO_TOKENS, IntArray

# Shorter prefixes are computed anew: that costs less than the copy, and any two prompts share their first token.
MIN_PREFIX_TOKENS = 16


@dataclass(slots=True, eq=False)
class Slot:
    """`kept` int64 [n]: the tokens whose cache a free slot still holds; `freed_at` orders the free slots by age."""

    request: Request | None = None
    kept: IntArray = field(default_factory=lambda: NO_TOKENS)
    freed_at: int = 0

    @property
    def cached(self) -> IntArray:
        """The committed tokens that the target's cache holds, for others to begin with too."""
        if self.request is None:
            return self.kept
        return NO_TOKENS if self.request.is_spoilt else self.request.cached_tokens


@dataclass(slots=True, eq=False)
class Loan:
    """A slot whose cache is the borrower's to write, until it `is_over`: a request has the slot, or what it held is
    lost. `num_tokens`: how many tokens of it are held, which the borrower says."""

    slot: int
    num_tokens: int = 0
    is_over: bool = False


class SlotTable:
    """The slots of one target engine and of the drafter that mirrors them. `table` is by slot; only this class changes
    it. spare_slot: one of the engine's beyond the table, for loans; None lends free ones that keep nothing. `loan`: the
    last one."""

    def __init__(
        self,
        num_slots: int,
        target: Engine,
        drafter: Drafter | None,
        *,
        prefix_caching: bool,
        spare_slot: int | None = None,
    ) -> None:
        self.table = [Slot() for _ in range(num_slots)]
        self._spare_slot = spare_slot
        self.loan = Loan(-1, is_over=True)
        self._target = target
        self._drafter = drafter
        self._output_reader = drafter if isinstance(drafter, ReadsOutputs) else None
        self._reads_prompts = isinstance(drafter, ReadsPrompts)
        self._prefix_caching = prefix_caching
        self._num_freed = 0
        self._num_room = 0  # tokens that each of the engine's slots had room for when it was trimmed last

    def __len__(self) -> int:
        return len(self.table)

    @property
    def active(self) -> list[Request]:
        """Requests by slot; contiguous from slot 0 after `compact`."""
        return [slot.request for slot in self.table if slot.request is not None]

    @property
    def has_room(self) -> bool:
        return any(slot.request is None for slot in self.table)

    def admit(self, request: Request) -> None:
        """Gives the request the lowest free slot, with the kept cache that is mostly a prefix of its prompt, or else
        with the one that was free the longest; what the lowest slot keeps moves there."""
        place = next(index for index, slot in enumerate(self.table) if slot.request is None)
        free = [index for index, slot in enumerate(self.table) if slot.request is None]
        source, length = self._prompt_prefix(request, free)
        would_lose_more = len(free) > 1 and length < len(self.table[source].kept) // 2
        if length < MIN_PREFIX_TOKENS or would_lose_more:
            source = min(free, key=lambda index: self.table[index].freed_at)
            length = 0
            self._move_kept(place, source)
        else:
            self._swap(place, source)
        self._take_back(place)
        self.table[place].request = request
        self.table[place].kept = NO_TOKENS
        request.slot = place
        request.hold(length)
        request.num_prefix_hits += length

    def reuse_prefix(self, request: Request) -> None:
        """Copies the longest prefix that another slot holds, where it is longer than what the request has computed."""
        source, length = self._prompt_prefix(request, range(len(self.table)))
        if length < request.num_cached + MIN_PREFIX_TOKENS:
            return
        self._target.copy_slot(source, request.slot, length)
        if self._drafter is not None:
            self._drafter.copy(source, request.slot, length)
        request.num_prefix_hits += length - request.num_cached
        request.hold(length)

    def release(self, request: Request) -> None:
        """Frees the slot of a finished request; its cache stays until the slot is needed."""
        index, request.slot = request.slot, -1
        slot = self.table[index]
        self._num_freed += 1
        slot.kept = slot.cached.copy() if self._prefix_caching else NO_TOKENS
        if request.is_spoilt:
            self._target.clear_slot(index, 0)
        slot.freed_at = self._num_freed
        slot.request = None
        if self._output_reader is not None:
            self._output_reader.read_output(index, np.array(request.output_token_ids, np.int64))
        if self._drafter is not None:
            self._drafter.release(index)

    def forget(self) -> None:
        """Keeps nothing any more: after a step that failed nobody knows what the caches hold. No request is active."""
        self._keep_nothing()
        if self._drafter is not None:
            self._drafter.reset()

    def read_again(self, max_num_tokens: int) -> None:
        """After a step that failed and that no request was in: has the target read what the caches held of those that
        run, in steps of so many tokens at most. What free slots kept is lost. Raises what the target raises."""
        self._keep_nothing()
        for request in self.active:
            held = request.held_tokens
            for start in range(0, len(held), max_num_tokens):
                chunk = held[start : start + max_num_tokens]
                step = self._target.step(request.slot, 1, len(chunk), num_positions=1)
                step.set_row(0, start, chunk, first=len(chunk) - 1)
                self._target.run(step)

    @property
    def can_lend(self) -> bool:
        return self._spare_slot is not None or self._slot_to_lend() is not None

    def lend(self, tokens: IntArray) -> Loan | None:
        """A slot for who reads `tokens` int64 [length], with the longest beginning of them that another slot holds;
        None where there is none to lend. It takes the place of the loan before."""
        slot = self._spare_slot if self._spare_slot is not None else self._slot_to_lend()
        self.loan.is_over = True
        if slot is None:
            return None
        self.loan = Loan(slot)
        if self._prefix_caching:
            others = [index for index in range(len(self.table)) if index != slot]
            source, length = self._longest_prefix(tokens, others)
            if length >= MIN_PREFIX_TOKENS:
                self._target.copy_slot(source, slot, length)
                self.loan.num_tokens = length
        return self.loan

    @property
    def num_room(self) -> int:
        """Tokens that a slot may hold without the caches growing beyond what requests need, which slows down every step
        where its cost follows their length."""
        running = (max(len(request.sequence), request.num_cached) for request in self.active)
        return max([self._num_room, *running, *(len(slot.kept) for slot in self.table)])

    def compact(self) -> None:
        """Moves the last active requests into the gaps that finished ones left."""
        active = [index for index, slot in enumerate(self.table) if slot.request is not None]
        for hole in range(len(active)):
            if self.table[hole].request is None:
                self._swap(hole, active.pop())

    def trim(self) -> None:
        """Lets the engines shrink to the longest running sequence and the one that ended last. A loan that does not fit
        is over."""
        last = max(self.table, key=lambda slot: slot.freed_at)
        # An open round's draft may be cached beyond the sequence.
        needed = (max(len(request.sequence), request.num_cached) for request in self.active)
        longest = max([1, len(last.kept), *needed])  # an idle engine keeps its smallest caches
        self._num_room = held = self._target.trim(longest)
        self.loan.is_over |= self.loan.num_tokens > held
        for slot in self.table:
            slot.kept = slot.kept[:held]
        if self._drafter is not None:
            self._drafter.trim(longest)

    def _prompt_prefix(self, request: Request, candidates: list[int] | range) -> tuple[int, int]:
        """The slot whose cache shares most with the prompt, and how many tokens; the prompt's last token is always
        computed, since its output is what generation starts from."""
        wants_all = request.policy.is_loose and self._reads_prompts
        if not self._prefix_caching or request.params.prompt_logprobs is not None or wants_all:
            return 0, 0
        others = [index for index in candidates if self.table[index].request is not request]
        return self._longest_prefix(request.sequence.tokens[:-1], others)

    def _longest_prefix(self, tokens: IntArray, candidates: list[int]) -> tuple[int, int]:
        """The slot whose cache shares most with the tokens, and how many; of none the first one, and 0."""
        lengths = {index: common_prefix(self.table[index].cached, tokens) for index in candidates}
        source = max(lengths, key=lambda index: lengths[index], default=0)
        return source, lengths.get(source, 0)

    def _slot_to_lend(self) -> int | None:
        """The free slot that keeps nothing and that a request gets last."""
        free = (index for index, slot in enumerate(self.table) if slot.request is None and not len(slot.kept))
        return max(free, default=None)

    def _take_back(self, slot: int) -> None:
        """The slot's cache is about to be written by others."""
        if slot == self.loan.slot:
            self.loan.is_over = True

    def _keep_nothing(self) -> None:
        self.loan.is_over = True
        for slot in self.table:
            slot.kept = NO_TOKENS

    def _move_kept(self, source: int, target: int) -> None:
        """What a free slot keeps replaces what another one keeps."""
        kept = self.table[source].kept
        if source == target or not len(kept):
            return
        self._take_back(target)
        self._target.copy_slot(source, target, len(kept))
        if self._drafter is not None:
            self._drafter.copy(source, target, len(kept))
        self.table[target].kept = kept
        self.table[target].freed_at = self.table[source].freed_at

    def _swap(self, first: int, second: int) -> None:
        if first == second:
            return
        self._take_back(first)
        self._take_back(second)
        a, b = self.table[first], self.table[second]
        in_first, in_second = (slot.request.num_cached if slot.request else len(slot.kept) for slot in (a, b))
        if in_first and in_second:
            self._target.swap_slots(first, second, max(in_first, in_second))
        elif in_second:
            self._target.copy_slot(second, first, in_second)
        elif in_first:
            self._target.copy_slot(first, second, in_first)
        if self._drafter is not None:
            self._drafter.swap(first, second)
        self.table[first], self.table[second] = b, a
        for index in (first, second):
            request = self.table[index].request
            if request is not None:
                request.slot = index
