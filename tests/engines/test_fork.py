"""A process that is forked after engines were loaded has no engine thread: whoever uses them there is told at once."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

PROGRAM = """
import asyncio, json, os, signal, sys
from fly_trt import LLM, AsyncLLM, ConfigError, LoadedEngines, SamplingParams

directory = sys.argv[1]
params = SamplingParams(max_tokens=3)
engines = LoadedEngines(directory)
llm, served = LLM(directory), AsyncLLM(directory)
assert llm.generate("a", params)[0].finished
stream = llm.stream("a", SamplingParams(max_tokens=1500, ignore_eos=True))
next(stream)

async def serve():
    async for output in served.generate("a", params):
        return output

calls = {
    "generate": lambda: llm.generate("a", params),
    "stream": lambda: next(llm.stream("a", params)),
    "chat": lambda: llm.chat([{"role": "user", "content": "a"}], params),
    "abort": lambda: llm.abort("0"),
    "async": lambda: asyncio.run(serve()),
    "async abort": lambda: asyncio.run(served.abort("0")),
    "health": served.check_health,
    "shared": lambda: LLM(engines, enable_prefix_caching=False),
    "target": lambda: engines.target,
    "shutdown": llm.shutdown,
    "close": engines.close,
    "leave": stream.close,
    "exit": lambda: sys.exit(3),
}
# The worst moment: other threads have the locks, and nobody will release them in the child.
locks = llm._service._thread._lock, served._service._thread._lock
results = {}
for name, call in calls.items():
    for lock in locks:
        lock.acquire()
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(20)  # ends it where it hangs
        try:
            call()
        except ConfigError as error:
            os.write(writer, str(error).encode())
        os._exit(7)
    for lock in locks:
        lock.release()
    os.close(writer)
    with open(reader) as pipe:
        results[name] = [pipe.read(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]
stream.close()
assert llm.generate("a", params)[0].finished, "the parent is served on"
print(json.dumps(results | {"pid": os.getpid()}))
"""
REFUSED = ("generate", "stream", "chat", "abort", "async", "async abort", "health", "shared", "target")
HARMLESS = ("shutdown", "close", "leave")


@pytest.fixture(scope="module")
def results(demo_engine: Path) -> dict[str, Any]:
    """What each call said in a child of its own, and the child's exit status."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(demo_engine)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


@needs_fork
@pytest.mark.parametrize("call", REFUSED)
def test_a_forked_process_is_told_at_once(results: dict[str, Any], call: str) -> None:
    message, status = results[call]
    assert status == 7
    name = "engines" if call in ("shared", "target") else "LLM"
    assert message.startswith(f"{name} of process {results['pid']}, used in process ")
    assert message.endswith(
        "that was forked from it: engines do not survive a fork: load them in each process, after the fork"
    )


@needs_fork
@pytest.mark.parametrize("call", HARMLESS)
def test_a_forked_process_may_let_go_of_what_its_parent_has(results: dict[str, Any], call: str) -> None:
    assert results[call] == ["", 7]


@needs_fork
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can leave out destructors")
def test_a_forked_process_ends(results: dict[str, Any]) -> None:
    """ONNX Runtime's destructors would wait for threads that it does not have."""
    assert results["exit"] == ["", 3]
