"""The queue between the thread that takes responses and the loop, and where the worker of one GPU lives."""

import asyncio
import collections
import os


def enable_worker_single_process_for_tp1() -> bool:
    return os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS", "0") == "1"


class AsyncQueue:
    """For a task of the loop that it is made in. Whoever puts something in from elsewhere has to tell that loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._items: collections.deque = collections.deque()
        self._event = asyncio.Event()

    def put_nowait(self, item: object) -> None:
        self._items.append(item)

    def notify(self) -> None:
        if self._items:
            self._event.set()

    async def get(self) -> object:
        while not self._items:
            await self._event.wait()
        item = self._items.popleft()
        if not self._items:
            self._event.clear()
        return item
