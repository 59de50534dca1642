"""When requests must have left the queue, the earliest first.

It knows moments of the monotonic clock, and neither threads nor whether a request still waits.
"""

import heapq
import itertools
import time

from fly_trt.runtime.group import RequestGroup


class Deadlines:
    """A heap in which entries of what was discarded stay until they come up; they hold no group any more."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._groups: dict[int, RequestGroup] = {}
        self._numbers: dict[RequestGroup, int] = {}
        self._count = itertools.count()

    def add(self, group: RequestGroup) -> None:
        """From now on, its queue_timeout runs; None is for ever."""
        if group.queue_timeout is None:
            return
        number = next(self._count)
        self._groups[number] = group
        self._numbers[group] = number
        heapq.heappush(self._heap, (time.monotonic() + group.queue_timeout, number))

    def discard(self, group: RequestGroup) -> None:
        """Forgets a group, where it has a deadline."""
        if (number := self._numbers.pop(group, None)) is not None:
            del self._groups[number]

    def take_due(self, moment: float) -> list[RequestGroup]:
        """Removes and returns those whose deadline was at `moment` or before."""
        due = []
        while self._heap and self._heap[0][0] <= moment:
            _, number = heapq.heappop(self._heap)
            if (group := self._groups.get(number)) is not None:
                self.discard(group)
                due.append(group)
        return due

    def next_moment(self) -> float | None:
        """The earliest deadline; None where there is none."""
        while self._heap and self._heap[0][1] not in self._groups:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
