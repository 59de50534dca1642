"""What requests may leave behind: memory, slots, groups and threads."""

import asyncio
import gc
import threading
from pathlib import Path

from fly_trt import AsyncLLM
from fly_trt.runtime.invariants import check_invariants

MIB = 1 << 20


def resident_bytes() -> int:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "fly-trt engine"}


async def check_nothing_is_left(llm: AsyncLLM) -> None:
    """The engine thread takes the last aborts between two steps."""
    thread = llm._service._thread
    for _ in range(100):
        if not thread._groups:
            break
        await asyncio.sleep(0.1)
    assert not thread._groups
    assert not thread._group_of
    loop = thread._executor
    check_invariants(loop.scheduler)
    assert not loop.scheduler.running
    assert not loop.scheduler.waiting
    assert all(slot.request is None for slot in loop.scheduler.slots.table)
    metrics = llm.metrics()
    assert metrics["fly_trt:num_requests_running"] == metrics["fly_trt:num_requests_waiting"] == 0
