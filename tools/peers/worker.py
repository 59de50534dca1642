"""A worker seen from tools/bench_peers.py: a process that loads one mode of one peer and answers prompts."""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any, Self

from peers.environments import worker_environment
from peers.protocol import Settings

STOP_SECONDS = 5


class WorkerError(Exception):
    """A worker did not start, failed, or took too long. One line, fit for the table."""


class Worker:
    """A context manager; what the worker writes beside its answers goes to `log`. `versions` has its libraries."""

    def __init__(self, python: Path, module: str, settings: Settings, log: Path, load_seconds: float) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", f"peers.{module}", json.dumps(dataclasses.asdict(settings))],
                env=worker_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # Ctrl-C is for the one who asks; it stops the workers itself, and with them what they started.
                start_new_session=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.versions: dict[str, str] = self._receive("loading", load_seconds)["versions"]
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def ask(self, prompt: str | list[list[int]], max_tokens: int, seconds: float) -> dict[str, Any]:
        """The answer, as protocol.py has it. Raises WorkerError, also when it takes longer than `seconds`."""
        with contextlib.suppress(BrokenPipeError):  # _receive says why it is gone
            self._process.stdin.write(json.dumps({"prompt": prompt, "max_tokens": max_tokens}) + "\n")
            self._process.stdin.flush()
        return self._receive("an answer", seconds)

    def stop(self) -> None:
        """Ends the process: asks it by closing its input, and kills its group when that does not help."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _receive(self, what: str, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise WorkerError(f"{what} took more than {seconds:.0f} s: see {self._log}, or raise --timeout") from None
        if line is None:
            status = self._process.wait()
            raise WorkerError(f"the worker ended with status {status}: see {self._log}")
        message = json.loads(line)
        if "unavailable" in message:
            raise WorkerError(f"not available: {message['unavailable']}")
        if "error" in message:
            raise WorkerError(f"{message['error']}: see {self._log}")
        return message
