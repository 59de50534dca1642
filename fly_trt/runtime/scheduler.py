"""Which requests run: first come, first served, each in a slot of its own.

The queue and the set of running requests change only here. With one slot this serves one request at a time.
"""

from collections import deque

from fly_trt.runtime.request import Request, RequestState


class Scheduler:
    def __init__(self, num_slots: int) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[Request]:
        """Admits waiting requests while slots are free and returns all that run, in the order of arrival."""
        while self.waiting and self._free_slots:
            request = self.waiting.popleft()
            request.slot = self._free_slots.pop()
            request.state = RequestState.PREFILL
            self.running.append(request)
        return list(self.running)

    def remove(self, request: Request) -> int | None:
        """Takes a finished or aborted request out; returns the slot that it held, if it ran."""
        if request in self.running:
            self.running.remove(request)
            self._free_slots.append(request.slot)
            return request.slot
        if request in self.waiting:
            self.waiting.remove(request)
        return None
