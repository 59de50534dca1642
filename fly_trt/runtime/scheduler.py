"""Which requests run: first come, first served, each in a slot of its own, behind a queue of limited length.

The queue and the set of running requests change only here.
"""

from collections import deque

from fly_trt.errors import QueueFullError
from fly_trt.runtime.request import Request, RequestState
from fly_trt.runtime.slots import SlotTable


class Scheduler:
    """`running` is in the order of slots, 0 .. n - 1, after `schedule`, which admits nobody while `is_admitting` is
    False."""

    def __init__(self, slots: SlotTable, max_queue_size: int) -> None:
        self.slots = slots
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.is_admitting = True
        self._max_queue_size = max_queue_size

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
            request.state = RequestState.PREFILL
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
