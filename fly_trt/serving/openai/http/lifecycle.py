"""Where a server is between its start and its end, and how many requests it has under way.

It decides when a drain is over, and knows neither signals nor engines.
"""

import time
from collections.abc import Callable

from fly_trt.serving.openai.http.errors import ApiError


class Lifecycle:
    """Open, then draining, then stopping; never back. drain_timeout in seconds."""

    def __init__(self, drain_timeout: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.started_at = time.time()
        self.num_active = 0
        self.is_stopping = False
        self._clock = clock
        self._drain_timeout = drain_timeout
        self._drains_since: float | None = None

    @property
    def is_draining(self) -> bool:
        return self._drains_since is not None

    @property
    def is_drained(self) -> bool:
        return self.is_draining and not self.num_active

    @property
    def is_late(self) -> bool:
        """Whether running answers had their time."""
        return self._drains_since is not None and self._clock() - self._drains_since >= self._drain_timeout

    def drain(self) -> None:
        """Takes no new request; those under way go on."""
        if self._drains_since is None:
            self._drains_since = self._clock()

    def stop(self) -> None:
        """What is under way is to end at once."""
        self.drain()
        self.is_stopping = True

    def check_open(self) -> None:
        """Raises ApiError once no request is taken any more."""
        if self.is_draining:
            raise ApiError(503, "the server stops: send the request to another one", code="server_stopping")
