"""Int8Linear of plugins/cpu, by each kind of vector unit of this machine, against NumPy."""

from dataclasses import dataclass

import numpy as np
import pytest

from cpu_operators import CpuOperators, Node
from fly_build.quantization import pack_int8

# Inputs and outputs of a layer, and rows: below, at and above what lies in groups, tiles and blocks.
SHAPES = [(64, 16), (1, 1), (60, 40), (100, 47), (576, 200), (1100, 130)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 31, 32, 33, 48, 64, 70]
NONE, RMS_NORM, SILU, GELU_TANH = range(4)


@dataclass(frozen=True)
class Layer:
    codes: np.ndarray  # [N, K] in -64..64
    scales: np.ndarray  # [N]
    bias: np.ndarray | None = None

    @classmethod
    def random(cls, rng: np.random.Generator, inputs: int, outputs: int, *, has_bias: bool = False) -> "Layer":
        codes = rng.integers(-64, 65, (outputs, inputs))
        scales = rng.uniform(1e-3, 1e-1, outputs).astype(np.float32)
        return cls(codes, scales, rng.normal(size=outputs).astype(np.float32) if has_bias else None)

    def node(
        self, x: np.ndarray, residual: np.ndarray | None = None, norm: np.ndarray | None = None, prologue: int = NONE
    ) -> Node:
        inputs = {"x": x, "weight": pack_int8(self.codes), "scales": self.scales, "norm": norm, "bias": self.bias}
        return Node("Int8Linear", inputs | {"residual": residual}, {"prologue": prologue, "epsilon": 1e-5})

    def expected(self, x: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
        """Whole numbers exactly, and floats in the order of the operator: the same bits."""
        tokens, row_scale = rounded(x)
        total = tokens.astype(np.float64) @ self.codes.T.astype(np.float64)
        y = total.astype(np.float32) * self.scales * row_scale
        if self.bias is not None:
            y = y + self.bias
        return y if residual is None else y + residual


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(x).max(axis=-1, keepdims=True)
    is_finite = np.isfinite(x).all(axis=-1, keepdims=True)
    scale = np.maximum(largest, np.float32(1e-12)) / np.float32(127)
    with np.errstate(invalid="ignore"):
        tokens = np.where(is_finite, np.rint(x / scale), 0)
    return tokens, np.where(is_finite, scale, np.float32(np.nan))


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


@pytest.fixture(scope="module", params=["avx2", "avx_vnni", "avx512", "avx512_vnni", "amx", "amx_emulated"])
def kind(request: pytest.FixtureRequest, offered_kinds: list[str]) -> str:
    if request.param not in offered_kinds:
        pytest.skip(f"this machine has {', '.join(offered_kinds)}")
    return str(request.param)


def test_a_product_is_numpys_to_the_bit(kind: str, cpu_operators: CpuOperators) -> None:
    rng = np.random.default_rng(0)
    nodes, expected = [], []
    for shape in SHAPES:
        for has_bias in (False, True):
            layer = Layer.random(rng, *shape, has_bias=has_bias)
            for rows in ROWS:
                x = rng.normal(size=(1, rows, shape[0])).astype(np.float32)
                residual = rng.normal(size=(1, rows, shape[1])).astype(np.float32) if has_bias else None
                nodes.append(layer.node(x, residual))
                expected.append(layer.expected(x, residual))
    for [y], right in zip(cpu_operators.run(kind, nodes), expected, strict=True):
        assert y.shape == right.shape
        np.testing.assert_array_equal(bits(y), bits(right), str(right.shape))
