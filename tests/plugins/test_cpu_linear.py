"""Int8Linear of plugins/cpu, by each kind of vector unit of this machine, against NumPy and the other kinds."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cpu_operators import CpuOperators, Node
from fly_build.quantization import pack_int8

# Inputs and outputs of a layer, and rows: below, at and above what lies in groups, tiles, blocks and slices.
SHAPES = [(64, 16), (1, 1), (100, 47), (1100, 90)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 24, 32, 33, 48, 70]
MANY_ROWS = 300  # of 4,096 inputs: several slices
NONE, RMS_NORM, SILU, GELU_TANH = range(4)
EPSILON = 1e-5


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
        return Node("Int8Linear", inputs | {"residual": residual}, {"prologue": prologue, "epsilon": EPSILON})

    def expected(self, x: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
        """Whole numbers exactly, and floats in the order of the operator: the same bits."""
        tokens, row_scale = rounded(x)
        total = tokens.astype(np.float64) @ self.codes.T.astype(np.float64)
        y = total.astype(np.float32) * self.scales * row_scale
        if self.bias is not None:
            y = y + self.bias
        return y if residual is None else y + residual


@dataclass(frozen=True)
class Case:
    """A node and what it has to give: to the bit, or within what one step of a rounded input makes of it."""

    name: str
    node: Node
    expected: np.ndarray
    tolerance: np.ndarray | None = None


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(x).max(axis=-1, keepdims=True)
    is_finite = np.isfinite(x).all(axis=-1, keepdims=True)
    scale = np.maximum(largest, np.float32(1e-12)) / np.float32(127)
    with np.errstate(invalid="ignore"):
        tokens = np.where(is_finite, np.rint(x / scale), 0)
    return tokens, np.where(is_finite, scale, np.float32(np.nan))


def products(rng: np.random.Generator) -> Iterator[Case]:
    for shape in SHAPES:
        for has_bias in (False, True):
            layer = Layer.random(rng, *shape, has_bias=has_bias)
            for rows in ROWS:
                x = rng.normal(size=(1, rows, shape[0])).astype(np.float32)
                residual = rng.normal(size=(1, rows, shape[1])).astype(np.float32) if has_bias else None
                yield Case(f"{shape}, {rows} rows", layer.node(x, residual), layer.expected(x, residual))
    layer = Layer.random(rng, 4096, 64, has_bias=True)
    x = rng.normal(size=(1, MANY_ROWS, 4096)).astype(np.float32)
    residual = rng.normal(size=(1, MANY_ROWS, 64)).astype(np.float32)
    yield Case("many rows", layer.node(x, residual), layer.expected(x, residual))


def unusual_numbers(rng: np.random.Generator) -> Iterator[Case]:
    """Rows of largest, smallest and no numbers among others, which do not see them; codes at their ends."""
    layer = Layer(rng.choice([-64, 64], (40, 100)), np.ones(40, np.float32))
    x = rng.normal(size=(4, 5, 100)).astype(np.float32)
    for row, value in enumerate([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-40, 1e-13, 0.0, -0.0]):
        x.reshape(-1, 100)[2 * row, row] = value
    x[3, 3] = 0
    x[3, 4] = rng.choice([-1, 1], 100)
    with np.errstate(over="ignore"):
        yield Case("unusual", layer.node(x), layer.expected(x))


def prologues(rng: np.random.Generator) -> Iterator[Case]:
    for inputs, rows in [(60, 3), (576, 9), (1100, 20)]:
        layer = Layer.random(rng, inputs, 50, has_bias=True)
        x = (3 * rng.normal(size=(1, rows, inputs))).astype(np.float32)
        x[0, 0, 0] = 80  # beyond what exp has numbers for
        values = rng.normal(size=x.shape).astype(np.float32)
        norm = rng.uniform(0.5, 2, inputs).astype(np.float32)
        wide, root = x.astype(np.float64), np.sqrt(2 / np.pi)
        prepared = {
            RMS_NORM: wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + EPSILON) * norm,
            SILU: wide / (1 + np.exp(-wide)) * values,
            GELU_TANH: wide * (1 + np.tanh(root * (wide + 0.044715 * wide**3))) / 2 * values,
        }
        for prologue, right in prepared.items():
            is_norm = prologue == RMS_NORM
            given = x if is_norm else np.concatenate([x, values], axis=-1)
            node = layer.node(given, norm=norm if is_norm else None, prologue=prologue)
            row_scale = rounded(right.astype(np.float32))[1]
            # A tenth of the inputs could be rounded the other way.
            tolerance = row_scale * layer.scales * 64 * max(2, np.sqrt(inputs / 10))
            yield Case(
                f"prologue {prologue}, {inputs} inputs", node, layer.expected(right.astype(np.float32)), tolerance
            )


@cache
def cases() -> list[Case]:
    rng = np.random.default_rng(0)
    return [*products(rng), *unusual_numbers(rng), *prologues(rng)]


@cache
def outputs(operators: CpuOperators, kind: str) -> list[np.ndarray]:
    return [y for [y] in operators.run(kind, [case.node for case in cases()])]


def bits(values: np.ndarray) -> np.ndarray:
    """As whole numbers, of which all NaNs are one."""
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)


@pytest.fixture(scope="module", params=["avx2", "avx_vnni", "avx512", "avx512_vnni", "amx", "amx_emulated"])
def kind(request: pytest.FixtureRequest, offered_kinds: list[str]) -> str:
    if request.param not in offered_kinds:
        pytest.skip(f"this machine has {', '.join(offered_kinds)}")
    return str(request.param)


def test_a_product_is_numpys_to_the_bit(kind: str, cpu_operators: CpuOperators) -> None:
    exact = [(case, y) for case, y in zip(cases(), outputs(cpu_operators, kind), strict=True) if case.tolerance is None]
    assert len(exact) > 100
    for case, y in exact:
        assert y.shape == case.expected.shape, case.name
        np.testing.assert_array_equal(bits(y), bits(case.expected), case.name)


def test_what_comes_before_the_product_is_numpys_but_for_rounding(kind: str, cpu_operators: CpuOperators) -> None:
    for case, y in zip(cases(), outputs(cpu_operators, kind), strict=True):
        if case.tolerance is not None:
            assert (np.abs(y - case.expected) <= case.tolerance).all(), case.name


def test_all_kinds_give_the_same_bits(kind: str, cpu_operators: CpuOperators) -> None:
    pairs = zip(cases(), outputs(cpu_operators, kind), outputs(cpu_operators, "avx2"), strict=True)
    for case, y, of_avx2 in pairs:
        np.testing.assert_array_equal(bits(y), bits(of_avx2), case.name)


def test_threads_do_not_change_a_bit(cpu_operators: CpuOperators, offered_kinds: list[str]) -> None:
    several = CpuOperators(cpu_operators.library, num_threads=3)
    found = [y for [y] in several.run(offered_kinds[0], [case.node for case in cases()])]
    for case, y, right in zip(cases(), found, outputs(cpu_operators, offered_kinds[0]), strict=True):
        np.testing.assert_array_equal(bits(y), bits(right), case.name)


def test_the_kind_that_runs_is_the_best_unless_one_is_asked_for(
    cpu_operators: CpuOperators, offered_kinds: list[str]
) -> None:
    assert cpu_operators.name("") == offered_kinds[0] != "amx_emulated"
    assert cpu_operators.name("avx2") == "avx2"


def test_the_kinds_are_those_whose_units_the_system_names(offered_kinds: list[str]) -> None:
    text = Path("/proc/cpuinfo").read_text()
    flags = set(next(line for line in text.splitlines() if line.startswith("flags")).partition(":")[2].split())
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needed = {"amx": avx512 | {"avx512_vnni", "amx_tile", "amx_int8"}, "avx512_vnni": avx512 | {"avx512_vnni"}}
    needed |= {"avx_vnni": avx2 | {"avx_vnni"}, "avx512": avx512, "avx2": avx2, "amx_emulated": avx2}
    named = [kind for kind, units in needed.items() if units <= flags]
    assert offered_kinds in (named, [kind for kind in named if kind != "amx"])  # which a process may be refused


def test_a_kind_that_is_not_there_is_refused_with_those_that_are(
    cpu_operators: CpuOperators, offered_kinds: list[str]
) -> None:
    with pytest.raises(RuntimeError) as refusal:
        cpu_operators.name("avx1024")
    expected = f"FLY_TRT_CPU_ISA 'avx1024': expected one of this machine's kinds: {', '.join(offered_kinds)}"
    assert expected in refusal.value.args[0]


def test_operands_that_do_not_fit_are_refused_before_they_are_read(cpu_operators: CpuOperators) -> None:
    x = np.ones((1, 2, 64), np.float32)
    whole = Layer(np.ones((20, 64), np.int64), np.ones(20, np.float32)).node(x)
    packed = whole.inputs["weight"]
    assert packed is not None

    def node(prologue: int = NONE, **inputs: np.ndarray) -> Node:
        return Node("Int8Linear", whole.inputs | inputs, {"prologue": prologue, "epsilon": EPSILON})

    def ones(*shape: int) -> np.ndarray:
        return np.ones(shape, np.float32)

    cases = [
        ("prologue is 0, 1, 2 or 3", node(7)),
        ("prologue is 0, 1, 2 or 3", node(-1)),
        ("weight is", node(x=ones(1, 2, 65))),
        ("weight is", node(scales=ones(33))),
        ("weight is", node(scales=ones(16))),
        ("weight is", node(weight=packed.reshape(2, 16, 4, 16))),
        ("weight is", node(weight=packed.reshape(2, 16, 64))),
        ("weight is", node(x=ones(1, 2, 20), weight=packed[:, :5].copy())),
        ("x is", node(x=ones(1, 2, 0))),
        ("x is", node(SILU, x=ones(1, 2, 129))),
        ("an RMS norm has a weight", node(RMS_NORM)),
        ("norm is [K]", node(RMS_NORM, norm=ones(63))),
        ("bias [N]", node(bias=ones(19))),
        ("residual has the shape of y", node(residual=ones(1, 1, 20))),
        ("residual has the shape of y", node(residual=ones(2, 1, 20))),
        ("a tensor that has no axes", node(x=ones())),
    ]
    for (right, _), said in zip(cases, cpu_operators.refusals([node for _, node in cases]), strict=True):
        assert "Int8Linear: " in said
        assert right in said
