"""What a form of quantised linear layers is, and what the forms share: full-precision weights that are rounded as they
are read, and layers of one input that become one product.

It knows operators and layouts, and nothing of checkpoints or models; the forms themselves are in rowwise_forms.py and
linear_forms.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from fly_build.graph_edits import GraphEdits, Linear
from fly_build.quantization import Array, FloatArray
from fly_build.quantized_weight import Codes, QuantizedWeight
from fly_trt.manifest import Dtype

Kernels = Literal["cpu", "fly_cpu", "cuda", "tensorrt"]
"""Whose the kernels are: ONNX Runtime's on the CPU, this project's there (plugins/cpu), ONNX Runtime's for CUDA, or
TensorRT's."""

Layers = list[tuple[Linear, QuantizedWeight]]

ROUNDED_AT_ONCE = 1 << 18  # weights that are converted to float32 and rounded together: what caches hold


@dataclass(frozen=True)
class Source:
    """A full-precision weight [out, in] of a linear layer, which is read when it is written."""

    name: str
    shape: tuple[int, int]
    read: Callable[[], torch.Tensor]


class LinearForm(ABC):
    @abstractmethod
    def bits(self, plain: int) -> tuple[float, float]:
        """What a weight takes with its scales, in a linear layer and in the vocabulary projection; unquantised weights
        and activations have `plain` bits."""

    @abstractmethod
    def quantize(self, source: Source, dtype: Dtype, *, is_output: bool) -> QuantizedWeight | None:
        """A full-precision weight rounded for this form with activations of `dtype`; None where it stays as
        it is. `is_output`: it is the vocabulary projection, which sees nothing after it that could level errors out."""

    @abstractmethod
    def place(self, edits: GraphEdits, layers: Layers) -> None:
        """Computes these layers with these weights."""


def adapted_input(edits: GraphEdits, linear: Linear, weight: QuantizedWeight) -> ir.Value:
    """The layer's input in the order of the weight's inputs, and multiplied by its factors."""
    x, matmul = linear.input, linear.matmul
    if (factors := weight.input_factors) is not None:
        scale = edits.scales(f"{weight.name}.input_factors", (weight.shape[1],), factors)
        x = edits.insert(matmul, "Mul", [x, scale])
    if (order := weight.input_order) is not None:
        indices = edits.initializer(f"{weight.name}.input_order", ir.DataType.INT64, order.shape, lambda: order)
        x = edits.insert(matmul, "Gather", [x, indices], axis=-1)
    return x


def place_joined(
    edits: GraphEdits,
    layers: Layers,
    properties: Callable[[QuantizedWeight], tuple[object, ...]],
    product: Callable[[Linear, QuantizedWeight], ir.Value],
) -> None:
    """Layers that read the same value and whose weights have the same properties, such as query, key and value
    projections, become one `product` and a Split, in the graph's order."""
    order = {node: index for index, node in enumerate(edits.graph)}
    groups: dict[tuple[object, ...], Layers] = {}
    for linear, weight in sorted(layers, key=lambda layer: order[layer[0].matmul]):
        groups.setdefault((linear.input, *properties(weight)), []).append((linear, weight))
    for group in groups.values():
        linears, weights = [linear for linear, _ in group], [weight for _, weight in group]
        joined = product(linears[0], QuantizedWeight.joined(weights))
        edits.replace_joined(linears, joined, [weight.shape[0] for weight in weights])


def transposed(weight: QuantizedWeight) -> Array:
    codes = np.ascontiguousarray(weight.codes().T)
    return codes.astype(ml_dtypes.int4) if weight.kind == "int4" else codes


def lazily(
    source: Source,
    kind: Codes,
    block_size: int,
    rounded: Callable[[FloatArray], tuple[Array, FloatArray]],
) -> QuantizedWeight:
    """A weight that is rounded when codes or scales are asked for, and kept until both have been had."""
    rows, columns = source.shape
    at_once = max(1, ROUNDED_AT_ONCE // max(columns, 1))

    def compute() -> tuple[Array, FloatArray]:
        tensor = source.read()
        parts = [
            rounded(tensor[start : start + at_once].to(torch.float32).numpy()) for start in range(0, rows, at_once)
        ]
        codes, scales = zip(*parts, strict=True)
        return np.concatenate(codes), np.concatenate(scales)

    once = _Once(compute)
    return QuantizedWeight(source.name, kind, (rows, columns), block_size, lambda: once()[0], lambda: once()[1])


class _Once:
    """Keeps a result until both of its two readers have had it."""

    def __init__(self, compute: Callable[[], tuple[Array, FloatArray]]) -> None:
        self.compute = compute
        self.result: tuple[Array, FloatArray] | None = None

    def __call__(self) -> tuple[Array, FloatArray]:
        if self.result is not None:
            result, self.result = self.result, None
            return result
        self.result = self.compute()
        return self.result
