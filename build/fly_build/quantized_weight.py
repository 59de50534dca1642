"""The weight of one quantised linear layer: integers or fp8 numbers with their scales, as a checkpoint stores them or
as quantization.py makes them.

Nothing is read or computed before it is asked for, and nothing is kept, so that a model of any size takes the memory of
the layer that is being written. What becomes of a weight in a graph is linear_forms.py's to know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from fly_build.quantization import Array, FloatArray
from fly_trt.errors import CheckpointError

Codes = Literal["int4", "int8", "fp8"]
LARGEST_SCALE_ERROR = 1 / 128  # relative: twice that of bfloat16's rounding


@dataclass(frozen=True)
class QuantizedWeight:
    """weight [out, in] = (codes - zero points) * scales, each scale for a block of `block_size` inputs of one output.

    codes: int8 in -8..7 or -128..127, or float8_e4m3fn, [out, in]. scales: float32 [out, blocks], or [1, 1] where the
    whole weight has one. zero_points: int8 [out, blocks]; None: they are 0. One block of all inputs is a scale per
    output.

    What happens to the layer's input before: it is multiplied by `input_factors` [in] (AWQ of ModelOpt), and rounded to
    fp8 in steps of `activation_scale` (W8A8). Column j of the codes belongs to input `input_order`[j]; None: to j.
    """

    name: str
    kind: Codes
    shape: tuple[int, int]
    block_size: int
    codes: Callable[[], Array]
    scales: Callable[[], FloatArray]
    zero_points: Callable[[], npt.NDArray[np.int8]] | None = None
    has_one_scale: bool = False
    activation_scale: float | None = None
    input_factors: Callable[[], FloatArray] | None = None
    input_order: npt.NDArray[np.int64] | None = None

    @property
    def num_blocks(self) -> int:
        return -(-self.shape[1] // self.block_size)

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @staticmethod
    def joined(weights: "Sequence[QuantizedWeight]") -> "QuantizedWeight":
        """The outputs of several layers as those of one: they differ in codes, scales and zero points only. Layers that
        have the same one scale keep it."""
        first = weights[0]
        if len(weights) == 1:
            return first
        zero_points = [weight.zero_points for weight in weights if weight.zero_points is not None]
        assert len(zero_points) in (0, len(weights))
        has_one_scale = all(weight.has_one_scale for weight in weights) and len({*map(_scale, weights)}) == 1

        def rows_of(scales: FloatArray, weight: QuantizedWeight) -> FloatArray:
            return np.broadcast_to(scales, (weight.shape[0], weight.num_blocks))

        return replace(
            first,
            name="+".join(weight.name for weight in weights),
            shape=(sum(weight.shape[0] for weight in weights), first.shape[1]),
            has_one_scale=has_one_scale,
            codes=lambda: np.concatenate([weight.codes() for weight in weights]),
            scales=first.scales
            if has_one_scale
            else lambda: np.concatenate([rows_of(weight.scales(), weight) for weight in weights]),
            zero_points=(lambda: np.concatenate([read() for read in zero_points])) if zero_points else None,
        )

    def check_scales(self, dtype: npt.DTypeLike) -> None:
        """Raises CheckpointError for scales that are no numbers, or that `dtype`, the activations', does not hold."""
        factors = self.input_factors() if self.input_factors is not None else np.ones(1, np.float32)
        for scales in (self.scales(), factors, np.float32(self.activation_scale or 1)):
            if not np.isfinite(scales).all():
                raise CheckpointError(
                    f"{self.name} has scales that are no numbers: the checkpoint is broken, get it anew"
                )
            with np.errstate(over="ignore"):
                stored = scales.astype(dtype).astype(np.float32)
            if not (np.abs(stored - scales) <= LARGEST_SCALE_ERROR * np.abs(scales)).all():
                raise CheckpointError(
                    f"{self.name}: {np.dtype(dtype)} does not hold its scales of {np.abs(scales).min():.3g} to "
                    f"{np.abs(scales).max():.3g}: use --dtype bfloat16"
                )

    def in_blocks_of(self, block_size: int) -> "QuantizedWeight":
        """The same weight with more, smaller blocks, each with the scale of the one that it was cut from.

        `block_size` divides this one's, or any where one block has all inputs. Raises CheckpointError otherwise.
        """
        num_inputs = self.shape[1]
        if self.num_blocks == 1:
            times = -(-num_inputs // block_size)
        elif self.block_size % block_size == 0:
            times = self.block_size // block_size
        else:
            raise CheckpointError(f"{self.name}: blocks of {self.block_size} inputs cannot be cut into {block_size}")
        blocks = -(-num_inputs // block_size)

        def repeated(values: Array) -> Array:
            return np.repeat(np.broadcast_to(values, (self.shape[0], values.shape[1])), times, axis=1)[:, :blocks]

        zero_points = self.zero_points
        return replace(
            self,
            block_size=block_size,
            has_one_scale=False,
            scales=lambda: repeated(self.scales()),
            zero_points=None if zero_points is None else lambda: repeated(zero_points()),
        )

    def shard(self, axis: int, start: int, stop: int) -> "QuantizedWeight":
        """Outputs (axis 0) or inputs (axis 1) from `start` to `stop`, as one GPU of several has them.

        Raises CheckpointError for inputs that begin or end within a block, or whose order the checkpoint changed.
        """
        if axis == 0:
            rows = slice(start, stop)
            of_scales = slice(None) if self.has_one_scale else rows
            cut = self._cut((rows, slice(None)), (of_scales, slice(None)))
            return replace(cut, shape=(stop - start, self.shape[1]))
        if self.input_order is not None:
            raise CheckpointError(
                f"{self.name}: its inputs are in the order of their activations (desc_act), which cannot be sharded: "
                "use a checkpoint with desc_act false, or one GPU"
            )
        columns, blocks = slice(start, stop), slice(None)
        if self.num_blocks > 1:
            if start % self.block_size or (stop % self.block_size and stop != self.shape[1]):
                raise CheckpointError(
                    f"{self.name}: inputs {start} to {stop} begin or end within a block of {self.block_size}: use "
                    "fewer GPUs, or a checkpoint with smaller blocks"
                )
            blocks = slice(start // self.block_size, -(-stop // self.block_size))
        cut, factors = self._cut((slice(None), columns), (slice(None), blocks)), self.input_factors
        return replace(
            cut,
            shape=(self.shape[0], stop - start),
            block_size=min(self.block_size, stop - start),
            input_factors=None if factors is None else lambda: factors()[columns],
        )

    def _cut(self, of_codes: tuple[slice, slice], of_scales: tuple[slice, slice]) -> "QuantizedWeight":
        zero_points = self.zero_points
        return replace(
            self,
            codes=lambda: self.codes()[of_codes],
            scales=lambda: self.scales()[of_scales],
            zero_points=None if zero_points is None else lambda: zero_points()[of_scales],
        )


def _scale(weight: QuantizedWeight) -> float:
    """Of a weight that has one scale."""
    return float(weight.scales().item())
