"""Whose turn it is to run engines that several share: first come, first served.

It knows nothing of engines or requests. Whoever wants the turn stands in line with an event of its own, so that it can
wait for the turn and for its own callers at once.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator


class Turn:
    """A line of events; the first one has the turn until it leaves. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: deque[threading.Event] = deque()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits behind the one that has the turn."""
        return len(self._line) > 1

    def join(self, wake: threading.Event) -> bool:
        """Stands in line, where it does not stand there yet, and returns whether it has the turn; `wake` is set when
        that becomes so later."""
        with self._lock:
            if wake not in self._line:
                self._line.append(wake)
            return self._line[0] is wake

    def take_free(self, wake: threading.Event) -> bool:
        """Takes the turn where nobody stands in line, and does not stand in line otherwise."""
        with self._lock:
            if not self._line:
                self._line.append(wake)
            return self._line[0] is wake

    def leave(self, wake: threading.Event) -> None:
        """Gives up the turn or the place in line, where there is one."""
        with self._lock:
            if wake in self._line:
                self._line.remove(wake)
                if self._line:
                    self._line[0].set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Waits for the turn, and has it in the block."""
        wake = threading.Event()
        try:
            while not self.join(wake):
                wake.wait()
            yield
        finally:
            self.leave(wake)
