"""The verification head's operators of plugins/cpu beside what they have to find; tests/verification/test_head.py has
what all forms of the head share."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import kernels as check
from cpu_operators import CpuOperators, Node
from examples import examples
from fly_build.head import GATE_OUTPUTS
from fly_trt.verification import FlyPolicy, accept
from logit_rows import entropy_gate
from one_operator import Operator

FLOATS = [name for name, (dtype, _) in GATE_OUTPUTS.items() if dtype.numpy() == np.float32]
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 5003]


@pytest.fixture(scope="module")
def accepts() -> Operator:
    inputs = {
        "next_tokens": (np.int64, 2),
        "argmax": (np.int64, 2),
        "entropy": (np.float32, 2),
        "entropy_topk": (np.float32, 2),
        "num_context": (np.int64, 1),
        "num_draft": (np.int64, 1),
        "entropy_threshold": (np.float32, 1),
        "use_full_entropy": (np.bool_, 1),
        "window": (np.int64, 1),
        "lookahead": (np.int64, 1),
        "stop_token_ids": (np.int64, 1),
    }
    return Operator("LooseWindowAccept", inputs, 2)


_GATES: dict[int, Operator] = {}


def gate(logits: Any, tokens: Any = 0, top_k: int = 3) -> dict[str, np.ndarray]:
    """logits [B, T, V]."""
    if top_k not in _GATES:
        inputs = {"logits": (np.float32, 3), "next_tokens": (np.int64, 2)}
        _GATES[top_k] = Operator("EntropyGate", inputs, len(GATE_OUTPUTS), top_k=top_k)
    logits = np.asarray(logits, np.float32)
    tokens = np.broadcast_to(np.asarray(tokens, np.int64), logits.shape[:2])
    return dict(zip(GATE_OUTPUTS, _GATES[top_k](logits=logits, next_tokens=tokens), strict=True))


def agrees(found: dict[str, np.ndarray], logits: np.ndarray, tokens: np.ndarray, top_k: int) -> bool:
    wanted = entropy_gate(logits[0].astype(np.float32), tokens[0], top_k)
    is_row = ~np.isnan(wanted["entropy"])
    np.testing.assert_array_equal(found["argmax"][0][is_row], wanted["argmax"][is_row])
    np.testing.assert_array_equal(found["top_ids"][0][is_row], wanted["top_ids"][is_row])
    for name in FLOATS:
        np.testing.assert_allclose(found[name][0], wanted[name], rtol=1e-5, atol=2e-6, err_msg=name)
    return True


@pytest.mark.parametrize("size", SIZES)
def test_rows_may_end_anywhere(size: int) -> None:
    rng = np.random.default_rng(size)
    for top_k in {1, min(3, size), min(17, size)}:
        logits = rng.normal(size=(1, 6, size)) * rng.choice([0.1, 3, 30], (1, 6, 1))
        logits[:, 1] = logits[:, 1].round()
        logits[:, 2, rng.random(size) < 0.9] = -np.inf
        logits[:, 2, -1] = 1
        tokens = rng.integers(0, size, (1, 6))
        assert agrees(gate(logits, tokens, top_k), logits, tokens, top_k)


@examples(60)
@given(
    row=st.lists(
        st.floats(-30, 30, width=16) | st.sampled_from([-np.inf, np.inf, np.nan, -0.0, 0.0, -65504.0, -1e30]),
        min_size=3,
        max_size=150,
    ),
    token=st.integers(0, 149),
)
def test_any_short_row_agrees_with_numpy(row: list[float], token: int) -> None:
    """Those too that have no softmax, which say so in all floats."""
    logits, tokens = np.array([[row]], np.float32), np.array([[min(token, len(row) - 1)]])
    with np.errstate(invalid="ignore"):
        if logits.max() < -1e29:
            logits[0, 0, 0] = 0
    found = gate(logits, tokens)
    assert agrees(found, logits, tokens, 3)
    assert ((found["top_ids"] >= 0) & (found["top_ids"] < len(row))).all()


@pytest.mark.parametrize("place", [0, 1, 70, 4999])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_without_a_softmax_is_reported(value: float, place: int) -> None:
    logits = np.random.default_rng(0).normal(size=(1, 3, 5000))
    logits[0, 0, place] = value
    logits[0, 1] = -np.inf
    found = gate(logits)
    for name in FLOATS:
        is_nan = np.isnan(found[name][0]).reshape(3, -1)
        assert is_nan.all(-1).tolist() == is_nan.any(-1).tolist() == [True, True, False], name


def test_all_probabilities_sum_to_one_over_a_large_vocabulary() -> None:
    """151,936 logits: sums in float32 have to be cut for that."""
    logits = np.random.default_rng(1).normal(size=(1, 2, 151_936)) * [[[0.01], [2]]]
    tokens = np.array([[5, 151_935]])
    assert agrees(gate(logits, tokens, 5), logits, tokens, 5)


def test_a_row_has_the_same_bits_wherever_it_stands_and_whoever_shares_its_step() -> None:
    rng = np.random.default_rng(2)
    logits, tokens = rng.normal(size=(5, 7, 4003)) * 3, rng.integers(0, 4003, (5, 7))
    together = gate(logits, tokens)
    for b, t in ((0, 0), (2, 3), (4, 6)):
        alone = gate(logits[b : b + 1, t : t + 1], tokens[b : b + 1, t : t + 1])
        for name, results in together.items():
            assert alone[name].tobytes() == results[b, t].tobytes(), name


def test_one_possible_token_is_certain() -> None:
    logits = np.full((1, 1, 1000), -np.inf)
    logits[..., 700] = 5
    found = gate(logits, 3, 4)
    for name, want in (("entropy", 0), ("entropy_topk", 0), ("argmax_logprob", 0), ("token_logprob", -np.inf)):
        assert found[name].item() == want, name
    assert found["top_ids"].tolist() == [[[700, 0, 1, 2]]]
    assert found["top_logprobs"].tolist() == [[[0, -np.inf, -np.inf, -np.inf]]]


def test_what_is_not_a_token_has_no_log_probability() -> None:
    found = gate(np.zeros((1, 5, 100)), [[0, 99, 100, -1, 2**62]])
    assert np.isnan(found["token_logprob"]).tolist() == [[False, False, True, True, True]]


def test_more_tokens_than_there_are_cannot_be_the_most_probable() -> None:
    with pytest.raises(Exception, match="top_k is not within the vocabulary"):
        gate(np.zeros((1, 1, 4)), top_k=5)


def test_logits_and_tokens_that_do_not_fit_are_refused(cpu_operators: CpuOperators) -> None:
    def node(*shape: int, num_tokens: int) -> Node:
        inputs = {"logits": np.zeros(shape, np.float32), "next_tokens": np.zeros((1, num_tokens), np.int64)}
        types = tuple(helper.np_dtype_to_tensor_dtype(dtype.numpy()) for dtype, _ in GATE_OUTPUTS.values())
        return Node("EntropyGate", inputs, {"top_k": 1}, tuple(GATE_OUTPUTS), types)

    no_axes, rows = cpu_operators.refusals([node(num_tokens=1), node(1, 2, 4, num_tokens=3)])
    assert "EntropyGate: rows of a tensor that has no axes" in no_axes
    assert "EntropyGate: logits and next_tokens differ in their rows" in rows


def test_rows_whose_numbers_do_not_fit_are_refused(cpu_operators: CpuOperators) -> None:
    whole = check.random_accept_inputs(np.random.default_rng(0), strange=False)
    whole["use_full_entropy"] = whole["use_full_entropy"].astype(np.bool_)
    short = [name for name in whole if name not in ("argmax", "stop_token_ids")]
    nodes = [
        Node(
            "LooseWindowAccept",
            whole | {name: whole[name][:-1]},
            outputs=("num_accepted", "next_token"),
            output_types=(TensorProto.INT64,) * 2,
        )
        for name in short
    ]
    for name, said in zip(short, cpu_operators.refusals(nodes), strict=True):
        assert "LooseWindowAccept: " in said
        assert ("[B, T]" if whole[name].ndim == 2 else "a row's numbers are [B]") in said


@pytest.mark.parametrize("strange", [False, True])
def test_rows_are_decided_as_the_onnx_function_decides(accepts: Operator, strange: bool) -> None:
    """With `strange`, parameters that no scheduler would give; nothing outside a row is read."""
    rng = np.random.default_rng(3)
    for _ in range(250):
        inputs = check.random_accept_inputs(rng, strange)
        inputs["use_full_entropy"] = inputs["use_full_entropy"].astype(np.bool_)
        num_accepted, next_token = accepts(**inputs)
        wanted = check.loose_window_accept(inputs)
        assert num_accepted.tolist() == wanted["num_accepted"].tolist()
        assert next_token.tolist() == wanted["next_token"].tolist()


@examples(100)
@given(
    tokens=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=20),
    window=st.integers(0, 6),
    lookahead=st.integers(0, 6),
    data=st.data(),
)
def test_any_row_is_decided_as_the_rule_decides(
    accepts: Operator, tokens: list[tuple[int, int, bool]], window: int, lookahead: int, data: st.DataObject
) -> None:
    draft, argmax = np.array([[t[:2] for t in tokens]], np.int64).transpose(2, 0, 1)
    gate = np.array([[0.5 if is_uncertain else 0.1 for *_, is_uncertain in tokens]], np.float32)
    context = data.draw(st.integers(1, len(tokens)))
    n = data.draw(st.integers(0, len(tokens) - context))
    policy = FlyPolicy(0.25, use_full_entropy=False, window=window, lookahead=lookahead)
    num_accepted, next_token = accepts(
        next_tokens=draft,
        argmax=argmax,
        entropy=np.full_like(gate, np.nan),
        entropy_topk=gate,
        num_context=np.array([context]),
        num_draft=np.array([n]),
        entropy_threshold=np.array([0.25], np.float32),
        use_full_entropy=np.array([False]),
        window=np.array([window]),
        lookahead=np.array([lookahead]),
        stop_token_ids=np.array([3]),
    )
    at = slice(context - 1, context + n)
    wanted = accept(draft[0, at][:n], argmax[0, at], gate[0, at], policy, frozenset({3}))
    assert (num_accepted[0], next_token[0]) == (wanted.num_accepted, wanted.next_token)
