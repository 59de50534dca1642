"""The process of a rank above 0: it does what rank 0 says, with a plan and a GPU of its own.

It decides nothing and reads no outputs: it launches the same steps in the same order, so that all ranks sum the same
things. It ends when rank 0 says so, when rank 0 is gone, also while it waits in a sum, and when something goes wrong,
which it tells rank 0 in one line. Signals that a terminal or a service manager sends to all processes are rank 0's to
answer.
"""

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fly_trt.engines import load_engine
from fly_trt.engines.base import Engine, Step
from fly_trt.engines.nccl import Communicator, load
from fly_trt.engines.rank_messages import NOT_TAKEN, Channel, Message, Op, tested, unpack_inputs
from fly_trt.errors import FlyError, one_line
from fly_trt.manifest import Manifest, ModelEngine

PR_SET_PDEATHSIG = 1
FAILED = 1


class Follower:
    """The engines of one rank, by the number that rank 0 gave them."""

    def __init__(self, channel: Channel, messages: "SimpleQueue[Message]") -> None:
        self._channel = channel
        self._messages = messages
        self._put_off: deque[Message] = deque()
        self._engines: dict[int, Any] = {}
        self._communicators: dict[int, Communicator] = {}
        self._rank = 0
        self._do = {
            Op.LOAD: self._load,
            Op.JOIN: self._join,
            Op.TEST: self._test,
            Op.RUN: self._run,
            Op.COPY_SLOT: lambda message: self._engines[message.engine].copy_slot(*message.numbers[:3]),
            Op.SWAP_SLOTS: lambda message: self._engines[message.engine].swap_slots(*message.numbers[:3]),
            Op.CLEAR_SLOT: lambda message: self._engines[message.engine].clear_slot(*message.numbers[:2]),
            Op.TRIM: lambda message: self._engines[message.engine].trim(message.numbers[0]),
            Op.CLOSE: self._close,
        }

    def follow(self) -> None:
        """Until rank 0 says that it is over. Raises whatever goes wrong, after which nobody knows where this rank
        stands."""
        while (message := self._put_off.popleft() if self._put_off else self._messages.get()).op is not Op.END:
            self._do[message.op](message)
        for engine in list(self._engines):
            self._close(Message(Op.CLOSE, engine, (0, 0, 0, 0), b""))
        self._channel.send(Op.DONE)

    def _load(self, message: Message) -> None:
        wanted = json.loads(message.payload)
        load()  # before the engine library looks for libnccl
        self._rank = wanted["rank"]
        self._engines[message.engine] = load_engine(
            Path(wanted["directory"]),
            Manifest.model_validate(wanted["manifest"]),
            ModelEngine.model_validate(wanted["model"]),
            device_id=wanted["device_id"],
            rank=self._rank,
            **wanted["slots"],
        )
        self._channel.send(Op.DONE, message.engine)

    def _join(self, message: Message) -> None:
        communicator = Communicator(message.numbers[0], self._rank, message.payload)
        self._communicators[message.engine] = communicator
        self._engines[message.engine].join(communicator, self._agree)
        self._channel.send(Op.DONE, message.engine)

    def _agree(self, could: bool) -> bool:
        """What rank 0 does in another thread, such as to load an engine, waits until it has answered."""
        self._channel.send(Op.COULD, numbers=[could])
        while (message := self._messages.get()).op is not Op.COULD:
            self._put_off.append(message)
        return bool(message.numbers[0])

    def _test(self, message: Message) -> None:
        step = self._step(message, with_logits=True)
        unpack_inputs(message.payload, step)
        self._engines[message.engine].run(step)
        said = tested(self._engines[message.engine], step)
        self._channel.send(Op.TESTED, message.engine, payload=b"".join(array.tobytes() for array in said.values()))

    def _run(self, message: Message) -> None:
        step = self._step(message)
        unpack_inputs(message.payload, step)
        self._engines[message.engine].run(step)

    def _step(self, message: Message, *, with_logits: bool = False) -> Step:
        first_slot, batch_size, num_tokens, num_positions = message.numbers
        engine: Engine = self._engines[message.engine]
        return engine.step(first_slot, batch_size, num_tokens, num_positions=num_positions, with_logits=with_logits)

    def _close(self, message: Message) -> None:
        self._engines.pop(message.engine).close()
        if (communicator := self._communicators.pop(message.engine, None)) is not None:
            communicator.abort()


def main(arguments: list[str]) -> None:
    """arguments: the number of the socket's descriptor, and rank 0's process."""
    for number in NOT_TAKEN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_TAKEN)
    _end_with(int(arguments[1]))
    logging.getLogger("fly_trt").setLevel(logging.ERROR)  # rank 0 says the same
    connection = socket.socket(fileno=int(arguments[0]))
    connection.set_inheritable(False)
    channel = Channel(connection)
    messages: SimpleQueue[Message] = SimpleQueue()
    threading.Thread(target=_listen, args=(channel, messages), name="fly-trt rank 0", daemon=True).start()
    try:
        Follower(channel, messages).follow()
    except BaseException as error:
        text = one_line(error) if isinstance(error, FlyError) else f"{type(error).__name__}: {one_line(error)}"
        with contextlib.suppress(OSError):
            channel.send(Op.FAILED, payload=text.encode())
        os._exit(FAILED)  # without the clean-up of libraries, which may wait for the other ranks


def _listen(channel: Channel, messages: "SimpleQueue[Message]") -> None:
    """Also while a step runs, so that the end of rank 0 is the end of a rank that waits for it in a sum."""
    while (message := channel.receive()) is not None:
        messages.put(message)
        if message.op is Op.END:
            return
    os._exit(FAILED)


def _end_with(parent: int) -> None:
    """Has the kernel end this process with the thread that started it, should a forked process still hold rank 0's end
    of the socket. Needs Linux; elsewhere the socket must do."""
    library = ctypes.CDLL(None)
    if hasattr(library, "prctl"):
        library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(FAILED)


if __name__ == "__main__":
    main(sys.argv[1:])
