"""RotaryTables of plugins/cpu beside NumPy."""

import numpy as np
import pytest

from cpu_operators import CpuOperators, Node
from one_operator import Operator

INPUTS = {"write_indices": (np.int64, 1), "input_ids": (np.int64, 2), "frequencies": (np.float32, 1)}


@pytest.mark.parametrize("scaling", [None, 0.75])
@pytest.mark.parametrize("length", [1, 5, 300])
def test_tables_are_those_of_the_positions(length: int, scaling: float | None) -> None:
    tables = Operator("RotaryTables", INPUTS, 2, **({} if scaling is None else {"scaling": scaling}))
    first = np.array([0, 7, 131_000])
    frequencies = (1 / 10_000 ** (np.arange(32) / 32)).astype(np.float32)
    ids = np.zeros((3, length), np.int64)
    cos, sin = tables(write_indices=first, input_ids=ids, frequencies=frequencies)
    positions = (first[:, None] + np.arange(length)).astype(np.float32)
    angles = (positions[..., None] * frequencies).astype(np.float64)
    for found, want in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        np.testing.assert_allclose(found, want * (scaling or 1), rtol=2e-7, atol=1e-9)
    alone = tables(write_indices=first[1:2] + length - 1, input_ids=ids[:1, :1], frequencies=frequencies)
    assert [cos[1, -1].tobytes(), sin[1, -1].tobytes()] == [table.tobytes() for table in alone]


def test_positions_and_tokens_that_do_not_fit_are_refused(cpu_operators: CpuOperators) -> None:
    def node(num_positions: int, *tokens: int) -> Node:
        ids = np.zeros(tokens, np.int64)
        inputs = {"write_indices": np.zeros(num_positions, np.int64), "input_ids": ids, "frequencies": np.ones(4, "f")}
        return Node("RotaryTables", inputs, outputs=("cos", "sin"), output_types=(1, 1))

    for said in cpu_operators.refusals([node(1, 2, 3), node(1, 1, 1, 1, 1, 2), node(3, 3), node(1)]):
        assert "RotaryTables: input_ids is [B, T] and write_indices [B]" in said


def test_what_onnx_runtime_refuses_is_said_in_its_words() -> None:
    """More memory than a process can name."""
    tables = Operator("RotaryTables", INPUTS, 2)
    with pytest.raises(Exception, match=r"RotaryTables: .*[Ff]ailed to allocate"):
        tables(write_indices=np.array([0]), input_ids=np.zeros((1, 2**24), np.int64), frequencies=np.zeros(2**24, "f"))
