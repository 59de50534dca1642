"""The processes of the ranks above 0: started, told, heard, watched and ended.

A rank that waits for a dead one in a sum waits for ever. So a thread watches whether all ranks live: when one ends,
sums are aborted, the others are ended, and every later call says in one line which rank it was and why. It knows
processes, messages and communicators; it knows no engine.
"""

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fly_trt.engines.nccl import Communicator
from fly_trt.engines.rank_messages import NOT_TAKEN, Channel, Message, Op
from fly_trt.errors import EngineDeadError, EngineError, one_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

END_SECONDS = 10.0  # for an orderly end of the other ranks, and then for their being killed
POLL_SECONDS = 1.0
EXIT_SECONDS = 5.0  # between a process's last sign of life and its exit code
CAUSE_SECONDS = 1.0  # in which one rank's death and what follows from it come to be known
ENDED = "all ranks were ended, load the engines again"


@dataclass
class Other:
    """A rank above 0, and what it answered."""

    rank: int
    device: int
    process: "subprocess.Popen[bytes]"
    channel: Channel
    answers: deque[Message] = field(default_factory=deque)
    failure: str | None = None  # in its own words
    is_gone: bool = False

    def describe(self) -> str:
        return f"rank {self.rank} (process {self.process.pid}, device {self.device})"

    def ending(self) -> str:
        """How it ended."""
        code = self.process.poll()
        if self.failure is not None:
            return f"{self.describe()}: {self.failure}"
        if code is not None and code < 0:
            return f"{self.describe()} was killed by {signal.Signals(-code).name}"
        return f"{self.describe()} ended" + ("" if code is None else f" with exit code {code}")


class RankGroup:
    """Ranks 1 and up, on `devices[1:]`; rank 0 is this process, on `devices[0]`.

    Its methods are for the thread that uses the engines. Once a rank failed they raise EngineDeadError, always with the
    same line.
    """

    def __init__(self, devices: Sequence[int]) -> None:
        self.devices = tuple(devices)
        self.others: list[Other] = []
        self._communicators: list[Communicator] = []
        self._changed = threading.Condition()  # notified after each change of what follows and of what is answered
        self._failure: str | None = None
        self._listeners: list[weakref.WeakMethod[Callable[[str], None]]] = []
        self._is_failing = False
        self._is_ending = False
        self._telling = threading.Lock()
        self._watch: threading.Thread | None = None
        self._start_error: OSError | None = None

    def when_failed(self, tell: Callable[[str], None]) -> None:
        """Has the bound method `tell` told why the ranks cannot run any more, once that is so, by whoever finds out: a
        thread that waits for its GPU cannot."""
        with self._changed:
            self._listeners = [listener for listener in self._listeners if listener() is not None]
            self._listeners.append(weakref.WeakMethod(tell))
            line = self._failure
        if line is not None:
            tell(line)

    def start(self) -> None:
        """Starts the processes, if they were not started before; they need not have begun to run. Raises EngineError
        where there can be none."""
        self.check()
        if self._watch is None:
            is_started = threading.Event()
            self._watch = threading.Thread(target=self._run, args=(is_started,), name="fly-trt ranks", daemon=True)
            self._watch.start()
            is_started.wait()
        if self._start_error is not None:
            raise EngineError(f"{_python()}: no process for the other ranks: {one_line(self._start_error)}")

    def add(self, communicator: Communicator) -> None:
        """One of rank 0's, which is aborted when a rank fails, or now where one did. By any thread."""
        with self._changed:
            self._communicators.append(communicator)
            is_late = self._is_failing
        if is_late:
            communicator.abort()
        self.check()

    def tell(
        self, others: Sequence[Other], op: Op, engine: int, numbers: Sequence[int] = (), payload: bytes = b""
    ) -> None:
        """The same message to each of these ranks."""
        self.check()
        try:
            with self._telling:
                for other in others:
                    other.channel.send(op, engine, numbers, payload)
        except OSError:
            self._raise_failure()

    def hear(self, others: Sequence[Other], op: Op) -> list[Message]:
        """The next answer of each of these ranks, all of which are of this kind."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_failing or all(other.answers for other in others))
        self.check()
        messages = [other.answers.popleft() for other in others]
        assert all(message.op is op for message in messages)
        return messages

    def together(self, work: Callable[[], Result]) -> Result:
        """Does rank 0's part of what the others were told. A sum that was aborted raises nothing: what it left is not
        passed on."""
        try:
            result = work()
        except Exception as error:
            with self._changed:  # the same death may reach this GPU before it is known here
                self._changed.wait_for(lambda: self._is_failing, CAUSE_SECONDS)
            self.fail(f"rank 0 (this process, device {self.devices[0]}): {one_line(error)}: {ENDED}")
            self.check()
            raise
        self.check()
        return result

    def wait_for(self, work: Callable[[], Result]) -> Result:
        """As `together`, for work that waits for the other ranks and cannot be made to stop: where one of them fails it
        is left behind. It runs in a thread of its own."""
        results: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)
            with self._changed:
                self._changed.notify_all()

        def finish() -> Result:
            if errors:
                raise errors[0]
            self.check()
            return results[0]

        threading.Thread(target=run, name="fly-trt join", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: results or errors or self._is_failing)
        return self.together(finish)

    def check(self) -> None:
        """Raises EngineDeadError where a rank failed or the ranks were ended."""
        if self._is_failing:
            self._raise_failure()
        if self._is_ending:
            raise EngineDeadError("the ranks were ended: load the engines again")

    def fail(self, line: str | None = None) -> None:
        """Ends all ranks. `line` says why; None: look at which of them ended. The first failure counts."""
        with self._changed:
            if self._is_failing or self._is_ending:
                return
            self._is_failing = True
            self._changed.notify_all()
            communicators = list(self._communicators)
        for communicator in communicators:
            communicator.abort_within(0)  # not awaited: the engine's thread may still have graphs that sum through it
        line = line or f"{self._cause()}: {ENDED}"
        with self._changed:
            self._failure = line
            listeners = list(self._listeners)
            self._changed.notify_all()
        self._kill()
        for listener in listeners:
            if (tell := listener()) is not None:
                tell(line)

    def end(self) -> None:
        """Ends the processes: in order, then by force. Safe to call twice, waits no longer than three times
        END_SECONDS, and leaves no process behind."""
        with self._changed:
            if self._is_ending:
                return
            self._is_ending = True
        if not self._is_failing:
            for other in self.others:
                try:
                    other.channel.send(Op.END)
                except OSError:
                    continue
        deadline = time.monotonic() + END_SECONDS
        for other in self.others:
            _wait(other.process, deadline - time.monotonic())
        self._kill()
        # The watch's own garbage collector may have called this.
        if self._watch is not None and self._watch is not threading.current_thread():
            self._watch.join(END_SECONDS)

    def _raise_failure(self) -> NoReturn:
        """Once it is known; it is about to be."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, EXIT_SECONDS + 2 * CAUSE_SECONDS)
        raise EngineDeadError(self._failure or f"a rank is gone: {ENDED}")

    def _run(self, is_started: threading.Event) -> None:
        """Starts the processes here, since the kernel ends them with the thread that started them. They begin with this
        thread's signal mask, so that Ctrl-C does not end one before it can say that it takes none."""
        signal.pthread_sigmask(signal.SIG_BLOCK, NOT_TAKEN)
        try:
            for rank, device in enumerate(self.devices[1:], 1):
                self.others.append(_start_process(rank, device))
        except OSError as error:
            self._start_error = error
            self._kill()
            return
        finally:
            is_started.set()
        with selectors.DefaultSelector() as selector:
            for other in self.others:
                selector.register(other.channel, selectors.EVENT_READ, other)
            while selector.get_map():
                ready = selector.select(POLL_SECONDS)
                for key, _ in ready:
                    if not self._take(key.data, key.data.channel.receive()):
                        selector.unregister(key.fileobj)
                # A process that was forked while they were started may hold the end of one's socket.
                ended = (
                    [] if ready else [key for key in selector.get_map().values() if key.data.process.poll() is not None]
                )
                for key in ended:
                    self._take(key.data, None)
                    selector.unregister(key.fileobj)

    def _take(self, other: Other, message: Message | None) -> bool:
        """What a rank said; False where it is gone."""
        with self._changed:
            if message is None:
                other.is_gone = True
            elif message.op is Op.FAILED:
                other.failure = message.payload.decode()
            else:
                other.answers.append(message)
                self._changed.notify_all()
        if message is None and not (self._is_failing or self._is_ending):
            self.fail()
            logger.info("%s", self._failure)  # who uses the engines says it
        return message is not None

    def _cause(self) -> str:
        """Of the ranks that ended, one that was killed: its death reaches the GPUs of the others, which fail then."""
        (first, *_) = gone = [other for other in self.others if other.is_gone]
        _wait(first.process, EXIT_SECONDS)
        deadline = time.monotonic() + CAUSE_SECONDS
        while first.failure is not None and time.monotonic() < deadline:
            if killed := [other for other in self.others if (other.process.poll() or 0) < 0]:
                return killed[0].ending()
            time.sleep(CAUSE_SECONDS / 20)
        return gone[0].ending()

    def _kill(self) -> None:
        for other in self.others:
            other.process.kill()
        deadline = time.monotonic() + END_SECONDS
        for other in self.others:
            if not _wait(other.process, deadline - time.monotonic()):
                logger.error("%s was killed and does not end", other.describe())


def _start_process(rank: int, device: int) -> Other:
    here, there = socket.socketpair()
    given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    paths = os.pathsep.join([*given, *map(os.path.abspath, sys.path)])
    command = [_python(), "-P", "-m", "fly_trt.engines.rank_process", str(there.fileno()), str(os.getpid())]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # this process's standard error: what a library says there is no part of any answer
            pass_fds=[there.fileno()],
            env=os.environ | {"PYTHONPATH": paths},
        )
    except BaseException:
        here.close()
        raise
    finally:
        there.close()
    return Other(rank, device, process, Channel(here))


def _python() -> str:
    """The interpreter; of a program that embeds it, such as Triton's, the one that belongs to its packages."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    return str(Path(sys.prefix) / "bin" / "python3")


def _wait(process: "subprocess.Popen[Any]", seconds: float) -> bool:
    """Whether it has ended by then; nothing is left of it that would have to be collected."""
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True
