"""The small tensors of one step shape on the host and on a CUDA device, side by side, so that one copy moves many.

It knows names, types and shapes of a step's inputs and outputs (base.Step), and memory. It knows no engine library and
no stream: what binds the addresses and when what is copied is the engine's to decide.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fly_trt.engines import cuda
from fly_trt.engines.base import POSITION_INPUTS, ROW_INPUTS, TOKEN_OUTPUTS, TOP_OUTPUTS, EngineInfo, Step

ALIGNMENT = 256  # of tensor addresses, as TensorRT asks for

INPUTS = {"input_ids": np.int64} | POSITION_INPUTS | ROW_INPUTS
OUTPUTS = {"num_accepted": np.int64, "next_token": np.int64} | TOKEN_OUTPUTS
PER_ROW = frozenset(ROW_INPUTS) | {"num_accepted", "next_token"}

Tensors = dict[str, type[np.generic]]


class Sizes(NamedTuple):
    """Of the axes of a step's tensors: B rows, T tokens, L positions, k most probable tokens."""

    batch_size: int
    num_tokens: int
    num_positions: int
    top_k: int


class Block:
    """Tensors of one direction. `arrays` are those of the host."""

    def __init__(self, tensors: Tensors, sizes: Sizes) -> None:
        shapes = {name: shape_of(name, sizes) for name in tensors}
        offset = 0
        self.offsets = {}
        for name, dtype in tensors.items():
            self.offsets[name] = offset
            offset += round_up(int(np.prod(shapes[name])) * np.dtype(dtype).itemsize, ALIGNMENT)
        self.num_bytes = offset
        self.host = cuda.PinnedBuffer(offset)
        self.device = cuda.DeviceBuffer(offset)
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        for name, dtype in tensors.items():
            begin, shape = self.offsets[name], shapes[name]
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.arrays[name] = self.host.array[begin : begin + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class StepBlocks:
    """The blocks of one step shape. `top` is None where the engine has no such outputs: on the device they are computed
    in every step, and the host gets them where it asks for them."""

    inputs: Block
    outputs: Block
    top: Block | None

    @classmethod
    def make(cls, info: EngineInfo, sizes: Sizes) -> "StepBlocks":
        top = Block(TOP_OUTPUTS, sizes) if info.has_top_tokens else None
        return cls(Block(inputs_of(info), sizes), Block(OUTPUTS, sizes), top)

    def __iter__(self) -> Iterator[Block]:
        yield from (self.inputs, self.outputs)
        if self.top is not None:
            yield self.top

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All tensors on the host, by name."""
        return {name: array for block in self for name, array in block.arrays.items()}


def inputs_of(engine: EngineInfo | Step) -> Tensors:
    """What an engine, or one of its steps, has of INPUTS."""
    has_positions = engine.has_positions if isinstance(engine, EngineInfo) else engine.next_tokens is not None
    return INPUTS if has_positions else {name: dtype for name, dtype in INPUTS.items() if name not in POSITION_INPUTS}


def outputs_of(with_top: bool) -> Tensors:
    """What a step says on the host: the outputs that were asked for."""
    return OUTPUTS | (TOP_OUTPUTS if with_top else {})


def shape_of(name: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape of one tensor: [B], [B, T], [B, L] or [B, L, k]."""
    batch_size, num_tokens, num_positions, top_k = sizes
    if name in PER_ROW:
        return (batch_size,)
    if name == "input_ids":
        return batch_size, num_tokens
    return (batch_size, num_positions, top_k) if name in TOP_OUTPUTS else (batch_size, num_positions)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
