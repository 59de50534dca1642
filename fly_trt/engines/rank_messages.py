"""What rank 0 and the other ranks of an engine say to each other: a header of fixed size, and bytes behind it.

A step is one small message with its inputs as they are; no array is pickled. It knows sockets and the inputs of a step,
and nothing of processes.
"""

import enum
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fly_trt.engines.base import POSITIONS_INPUT, Step
from fly_trt.engines.blocks import Tensors, inputs_of
from fly_trt.tokens import FloatArray

NOT_TAKEN = (signal.SIGINT, signal.SIGTERM)  # signals that a terminal or a service manager sends to all processes
HEADER = struct.Struct("<BBxxxxxxqqqqQ")
JOIN_ALL = 1 << 20  # bytes below which header and payload are joined to one packet


class Op(enum.IntEnum):
    """Rank 0 says LOAD to END, of one engine but for END; the numbers are those of the Engine's method. The others
    answer LOAD, JOIN and END with DONE, TEST with TESTED, and what went wrong with FAILED, the last that they say. In
    the middle of a step each may say COULD, whether it could do something, and is told COULD, whether all could."""

    LOAD = 1
    JOIN = 2
    TEST = 3
    RUN = 4
    COPY_SLOT = 5
    SWAP_SLOTS = 6
    CLEAR_SLOT = 7
    TRIM = 8
    CLOSE = 9
    END = 10
    DONE = 11
    TESTED = 12
    FAILED = 13
    COULD = 14


class Message(NamedTuple):
    """`numbers`: first_slot, B, T and L of a step; what the other methods take, and zeros."""

    op: Op
    engine: int
    numbers: tuple[int, int, int, int]
    payload: bytes


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, op: Op, engine: int = 0, numbers: Sequence[int] = (), payload: bytes = b"") -> None:
        """numbers: at most four. Raises OSError where nobody is there any more."""
        header = HEADER.pack(op, engine, *(*numbers, 0, 0, 0, 0)[:4], len(payload))
        if len(payload) <= JOIN_ALL:
            self._connection.sendall(header + payload)
        else:
            self._connection.sendall(header)
            self._connection.sendall(payload)

    def receive(self) -> Message | None:
        """The next message; None where the other end is gone."""
        header = self._read(HEADER.size)
        if header is None:
            return None
        op, engine, first, second, third, fourth, size = HEADER.unpack(header)
        payload = self._read(size)
        return None if payload is None else Message(Op(op), engine, (first, second, third, fourth), payload)

    def close(self) -> None:
        self._connection.close()

    def _read(self, size: int) -> bytes | None:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            try:
                received = self._connection.recv_into(view[done:])
            except OSError:
                return None
            if not received:
                return None
            done += received
        return bytes(content)


def pack_inputs(step: Step) -> bytes:
    """Where each row speaks from, and the other inputs of a step, one behind another in the order of blocks.INPUTS."""
    others = (getattr(step, name).tobytes() for name in _packed(step))
    return b"".join([np.array(step.first_position, np.int64).tobytes(), *others])


def unpack_inputs(payload: bytes, step: Step) -> None:
    """Fills a step of the same shape."""
    num_rows = len(step.input_ids)
    for row, first in enumerate(np.frombuffer(payload, np.int64, num_rows).tolist()):
        step.speak_from(row, first)
    begin = num_rows * np.dtype(np.int64).itemsize
    for name, dtype in _packed(step).items():
        target = getattr(step, name)
        target[...] = np.frombuffer(payload, dtype, target.size, begin).reshape(target.shape)
        begin += target.nbytes


def _packed(step: Step) -> Tensors:
    return {name: dtype for name, dtype in inputs_of(step).items() if name != POSITIONS_INPUT}


def tested(engine: Any, step: Step) -> dict[str, FloatArray]:
    """What a rank's engine says of a step of one row, which just ran, by what it is called in an error: float32."""
    assert step.logits is not None
    return {"hidden states": engine.rank_output(step.num_positions), "logits": step.logits}


def unpack_tested(payload: bytes, like: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """What another rank sent, in arrays of the same shapes."""
    numbers, begin, found = np.frombuffer(payload, np.float32), 0, {}
    for what, array in like.items():
        found[what] = numbers[begin : begin + array.size].reshape(array.shape)
        begin += array.size
    return found
