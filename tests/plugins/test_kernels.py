"""The CUDA kernels of the TensorRT plugins, run on the CPU, against NumPy, the rule and the portable head."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernel_library as library
import kernels as check
from examples import examples
from fly_build.head import GATE_OUTPUTS
from fly_trt.verification import FlyPolicy, accept
from logit_rows import HIGHEST_MAXIMUM, encode
from portable_head import head_session

TYPES = ["float32", "float16", "bfloat16"]
FLOATS = ("entropy", "entropy_topk", "argmax_logprob", "token_logprob", "top_logprobs")
INVALID_VALUE = 1
PER_VECTOR = {"float32": 4, "float16": 8, "bfloat16": 8}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> library.Kernels:
    try:
        return library.load_cpu_kernels(tmp_path_factory.mktemp("kernels"))
    except library.NoCompilerError as error:
        pytest.skip(str(error))


def gate(kernels: library.Kernels, values: Any, dtype: str = "float32", token: int = 0, top_k: int = 3) -> Any:
    logits = encode(np.atleast_2d(np.asarray(values, np.float64)), dtype)
    return kernels.entropy_gate(logits, np.full(len(logits), token), top_k)


def all_nan(found: Any) -> Any:
    """Of each row whether it has nothing but NaN; a row with both is wrong."""
    numbers = np.isnan(found.reshape(len(found), -1))
    assert (numbers.all(axis=1) == numbers.any(axis=1)).all()
    return numbers.all(axis=1)


@pytest.mark.parametrize("seed", range(4))
def test_random_rows_agree_with_numpy(kernels: library.Kernels, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(25):
        assert check.GateCase.random(rng).mismatches(kernels) == []


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("top_k", range(1, 9))
def test_any_number_of_probabilities_is_looked_at(kernels: library.Kernels, dtype: str, top_k: int) -> None:
    rng = np.random.default_rng(top_k)
    for vocab_size in (8, 997, 9000):
        logits = encode(rng.normal(size=(2, vocab_size)) * 2, dtype)
        case = check.GateCase(dtype, logits, rng.integers(0, vocab_size, 2), top_k, 0)
        assert case.mismatches(kernels) == []


@examples(40)
@given(
    dtype=st.sampled_from(TYPES),
    rows=st.integers(1, 3).flatmap(
        lambda n: st.integers(1, 40).flatmap(
            lambda size: st.lists(
                st.lists(
                    st.floats(-30, 30, width=16) | st.sampled_from([-np.inf, np.inf, np.nan, -0.0, 0.0, -65504.0]),
                    min_size=size,
                    max_size=size,
                ),
                min_size=n,
                max_size=n,
            )
        )
    ),
    top_k=st.integers(1, 8),
    offset=st.integers(0, 8),
    token=st.integers(-2, 41),
)
def test_any_short_row_agrees_with_numpy(
    kernels: library.Kernels, dtype: str, rows: list[list[float]], top_k: int, offset: int, token: int
) -> None:
    logits = encode(np.array(rows), dtype)
    case = check.GateCase(dtype, logits, np.full(len(rows), token), min(top_k, len(rows[0])), offset)
    assert case.mismatches(kernels) == []


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_may_end_anywhere_and_nothing_outside_them_is_loaded(kernels: library.Kernels, dtype: str) -> None:
    """The CPU build ends the process when a load leaves the logits."""
    rng = np.random.default_rng(0)
    chunk = 1024 * PER_VECTOR[dtype]
    sizes = [*range(1, 34), *(multiple * chunk + extra for multiple in (1, 2) for extra in (-9, -1, 0, 1, 7, 8))]
    for size in sizes:
        logits = encode(rng.normal(size=(3, size)), dtype)
        for offset in (0, 1, 7):
            case = check.GateCase(f"{dtype} {size} {offset}", logits, np.full(3, size - 1), 1, offset)
            assert case.mismatches(kernels) == []


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("vocab_size", [511, 512, 17_001])
def test_a_row_has_the_same_bits_wherever_it_stands(kernels: library.Kernels, dtype: str, vocab_size: int) -> None:
    rng = np.random.default_rng(1)
    logits = encode(rng.normal(size=(9, vocab_size)) * 3, dtype)
    tokens = rng.integers(0, vocab_size, 9)
    together = kernels.entropy_gate(logits, tokens, 3)
    for row, offset in ((0, 0), (3, 0), (4, 3), (8, 1)):
        alone = kernels.entropy_gate(logits[row : row + 1], tokens[row : row + 1], 3, offset)
        for name, results in together.items():
            assert alone[name].tobytes() == results[row : row + 1].tobytes(), (name, row, offset)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_first_of_equal_maxima_wins(kernels: library.Kernels, dtype: str) -> None:
    values = np.zeros((4, 40_000))
    for row, places in zip(values, ([13, 40], [39_999, 25_000], [0, 8192], [8191, 8192, 16_384]), strict=True):
        row[places] = 2
    assert gate(kernels, values, dtype)["argmax"].tolist() == [13, 25_000, 0, 8191]
    zeros = np.full((2, 20_000), -0.0)
    zeros[0, 10_000:] = 0.0
    zeros[1, 0] = -1.0
    assert gate(kernels, zeros, dtype)["argmax"].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8])
def test_the_lowest_of_equal_tokens_are_the_most_probable(kernels: library.Kernels, dtype: str, top_k: int) -> None:
    """Equal in one word, in one thread, in one chunk and in several, and cut off within the equal ones."""
    values = np.zeros((5, 40_000))
    places: tuple[list[int], ...] = (
        [14, 15, 16, 17, 4096, 4097],
        [39_999, 8191, 25_000, 8192, 20, 16_384, 30_000, 1, 0],
        [100, 100 + 1024, 100 + 2048, 100 + 3072, 100 + 4096, 100 + 5120],
        [39_999],
        [],
    )
    for row, equal in zip(values, places, strict=True):
        row[equal] = 2
    values[1, 12_345] = 3
    values[2, 5:9] = -np.inf
    found = gate(kernels, values, dtype, top_k=top_k)
    for row, ids in zip(values, found["top_ids"], strict=True):
        assert ids.tolist() == np.argsort(-row, kind="stable")[:top_k].tolist()


def test_impossible_tokens_come_last_and_say_so(kernels: library.Kernels) -> None:
    found = gate(kernels, np.where(np.arange(30_000) == 20_000, 4.0, -np.inf), top_k=4)
    assert found["top_ids"].tolist() == [[20_000, 0, 1, 2]]
    assert found["top_logprobs"].tolist() == [[0, -np.inf, -np.inf, -np.inf]]
    few = gate(kernels, [1.0, -np.inf, 2.0], top_k=3)  # all tokens that there are
    assert few["top_ids"].tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", [0, 5000, 20_000])
def test_a_row_without_a_softmax_is_reported(kernels: library.Kernels, dtype: str, place: int) -> None:
    values = np.random.default_rng(2).normal(size=(4, 20_001))
    values[0, [place, 20_000]] = np.nan
    values[0, 17] = np.inf
    values[1, place] = np.inf
    values[2] = -np.inf
    found = gate(kernels, values, dtype)
    assert found["argmax"][:3].tolist() == [place, place, 0]
    for name in FLOATS:
        assert all_nan(found[name]).tolist() == [True, True, True, False], name
    assert ((found["top_ids"] >= 0) & (found["top_ids"] < 20_001)).all()


def test_masked_logits_contribute_nothing(kernels: library.Kernels) -> None:
    found = gate(kernels, np.where(np.arange(30_000) % 10_000 == 7, 4.0, -np.inf), token=1)
    assert found["argmax"][0] == 7
    np.testing.assert_allclose(found["entropy"], np.log(3), rtol=1e-6)
    np.testing.assert_allclose(found["entropy_topk"], np.log(3), rtol=1e-6)
    assert found["token_logprob"][0] == -np.inf


@pytest.mark.parametrize("dtype", TYPES)
def test_logits_masked_by_the_lowest_number_contribute_nothing(kernels: library.Kernels, dtype: str) -> None:
    lowest = float(np.finfo(np.float16 if dtype == "float16" else np.float32).min)
    values = np.full((3, 20_001), lowest)
    values[0, 20_000] = 3.0
    values[1, [0, 19_000]] = -500.0
    values[1, 5000:9000] = -np.inf
    found = gate(kernels, values, dtype)
    np.testing.assert_allclose(found["entropy"][:2], [0, np.log(2)], atol=1e-6)
    assert np.isnan(found["entropy"][2])
    assert found["argmax"].tolist() == [20_000, 0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_rows_up_to_the_limit_are_exact_and_rows_beyond_it_are_reported(
    kernels: library.Kernels, dtype: str, sign: int
) -> None:
    rng = np.random.default_rng(7)
    inside = sign * HIGHEST_MAXIMUM * rng.uniform(0.5, 0.995, 120)
    beyond = sign * HIGHEST_MAXIMUM * 10 ** rng.uniform(0.005, 29, 40)
    values = np.concatenate([inside, beyond])[:, None] - rng.choice([0, 64, 1e6], (160, 9000), p=[0.002, 0.1, 0.898])
    values[::2, 1:] -= 1e8  # one choice, with nothing near it
    logits = encode(values, dtype)
    tokens = rng.integers(0, 9000, 160)
    assert check.GateCase(dtype, logits, tokens, 3, 0).mismatches(kernels) == []
    found = kernels.entropy_gate(logits, tokens, 3)
    for name in FLOATS:
        assert all_nan(found[name]).tolist() == [False] * 120 + [True] * 40, name


def test_masks_below_the_limit_contribute_nothing(kernels: library.Kernels) -> None:
    values = np.full((2, 20_001), -1e9)
    values[0, [5, 20_000]] = -3.0
    found = gate(kernels, values)
    np.testing.assert_allclose(found["entropy"], [np.log(2), np.nan], atol=1e-6)
    assert found["argmax"].tolist() == [5, 0]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_single_masked_logit_changes_no_bit_of_the_others_sums(kernels: library.Kernels, dtype: str) -> None:
    """Chunks with -inf are summed again in another way; so is the chunk that ends the row."""
    values = np.random.default_rng(8).normal(size=20_001) * 3
    lowest = float(np.finfo(np.float16 if dtype == "float16" else np.float32).min)
    rows = np.stack([values, values, values])
    for row, masked in zip(rows, (-1e4, lowest, -np.inf), strict=True):
        row[[17, 20_000]] = masked
    found = gate(kernels, rows, dtype)
    for name, results in found.items():
        assert len({result.tobytes() for result in results}) == 1, (name, results)


def test_what_is_not_a_token_has_no_log_probability(kernels: library.Kernels) -> None:
    logits = np.zeros((5, 100), np.float32)
    found = kernels.entropy_gate(logits, np.array([0, 99, 100, -1, 2**62]), 3)
    assert np.isnan(found["token_logprob"]).tolist() == [False, False, True, True, True]


def test_the_workspace_for_many_rows_suffices_for_fewer(kernels: library.Kernels) -> None:
    for vocab_size in (1, 4096, 4097, 128_256):
        sizes = [kernels.workspace_bytes(rows, vocab_size, top_k) for top_k in (3, 8) for rows in (1, 2, 100)]
        assert sizes[:3] == sorted(sizes[:3])
        assert all(many >= few > 0 for few, many in zip(sizes[:3], sizes[3:], strict=True))
    assert kernels.workspace_bytes(1, 0, 3) == kernels.workspace_bytes(1, 10, 9) == 0


def test_invalid_arguments_are_refused_before_anything_runs(kernels: library.Kernels) -> None:
    buffer = np.zeros(4096, np.uint8)
    place = buffer.ctypes.data

    def launch(workspace: int | None = place, workspace_bytes: int = 4096, **changed: Any) -> int:
        fields = {"logits_type": 0, "num_rows": 1, "vocab_size": 10, "top_k": 3} | changed
        pointers = {name: place for name, kind in library.GateArgs._fields_ if name not in fields}
        return kernels.launch_entropy_gate(library.GateArgs(**pointers, **fields), workspace, workspace_bytes)

    for changed in (
        {"logits_type": 3},
        {"num_rows": -1},
        {"vocab_size": 0},
        {"vocab_size": 2**27 + 1},
        {"top_k": 0},
        {"top_k": 9},
        {"top_k": 3, "vocab_size": 2},
        {"logits": None},
        {"logits": place + 2},
        {"argmax": None},
        {"num_rows": 2**40},
        {"num_rows": 2**31 - 1},
        {"workspace": None},
        {"workspace_bytes": 31},
    ):
        assert launch(**changed) == INVALID_VALUE, changed
    assert not buffer.any()
    assert launch(num_rows=0, logits=None) == 0
    assert kernels.launch_loose_window_accept(library.AcceptArgs(1, 1, 0)) == INVALID_VALUE
    assert kernels.launch_loose_window_accept(library.AcceptArgs(0, 0, 0)) == 0


@pytest.mark.parametrize("strange", [False, True])
def test_rows_are_decided_as_the_onnx_function_decides(kernels: library.Kernels, strange: bool) -> None:
    rng = np.random.default_rng(3)
    for _ in range(250):
        assert check.accept_mismatches(kernels, check.random_accept_inputs(rng, strange)) == []


def test_rows_are_decided_as_the_rule_decides(kernels: library.Kernels) -> None:
    rng = np.random.default_rng(4)
    seen = {"empty": 0, "full": 0, "loosened": 0, "rejected": 0, "stop in draft": 0}
    for _ in range(200):
        inputs = check.random_accept_inputs(rng, strange=False)
        found = kernels.loose_window_accept(inputs)
        stops = frozenset(inputs["stop_token_ids"].tolist())
        for row, (context, n) in enumerate(zip(inputs["num_context"], inputs["num_draft"], strict=True)):
            policy = FlyPolicy(
                float(inputs["entropy_threshold"][row]),
                use_full_entropy=bool(inputs["use_full_entropy"][row]),
                window=int(inputs["window"][row]),
                lookahead=int(inputs["lookahead"][row]),
            )
            at = slice(context - 1, context + n)
            draft, argmax = inputs["next_tokens"][row, at][:n], inputs["argmax"][row, at]
            entropy = inputs["entropy" if policy.use_full_entropy else "entropy_topk"][row, at]
            want = accept(draft, argmax, entropy, policy, stops)
            assert (found["num_accepted"][row], found["next_token"][row]) == (want.num_accepted, want.next_token)
            seen["empty"] += n == 0
            seen["full"] += 0 < n == want.num_accepted
            seen["rejected"] += want.num_accepted < n
            seen["loosened"] += bool((draft[: want.num_accepted] != argmax[: want.num_accepted]).any())
            seen["stop in draft"] += bool(np.isin(draft, list(stops)).any())
    assert all(count > 20 for count in seen.values()), seen


@pytest.mark.parametrize("extreme", [-(2**63), 2**63 - 1])
@pytest.mark.parametrize("name", ["num_context", "num_draft", "window", "lookahead"])
def test_no_parameter_leads_outside_the_row(kernels: library.Kernels, name: str, extreme: int) -> None:
    inputs = check.random_accept_inputs(np.random.default_rng(5), strange=False)
    inputs[name] = np.full_like(inputs[name], extreme)
    found = kernels.loose_window_accept(inputs)
    assert ((found["num_accepted"] >= 0) & (found["num_accepted"] <= inputs["argmax"].shape[1])).all()
    assert all(token in row for token, row in zip(found["next_token"], inputs["argmax"], strict=True))


def test_both_kernels_together_are_the_portable_head(kernels: library.Kernels) -> None:
    rng = np.random.default_rng(6)
    batch_size, length, vocab_size = 5, 20, 103
    session = head_session(vocab_size, [3, 7])
    for _ in range(10):
        logits = (rng.normal(size=(batch_size, length, vocab_size)) * rng.choice([0.5, 3])).astype(np.float32)
        following = np.where(rng.random((batch_size, length)) < 0.1, 5, logits.argmax(-1))
        following[:, -1] = 9
        context = rng.integers(1, length, batch_size)
        row = {
            "num_context": context,
            "num_draft": (length - context) // rng.integers(1, 3, batch_size),
            "entropy_threshold": rng.choice([0, 0.3, np.inf], batch_size).astype(np.float32),
            "use_full_entropy": rng.integers(0, 2, batch_size).astype(np.int32),
            "window": rng.integers(0, 7, batch_size),
            "lookahead": rng.integers(0, 7, batch_size),
        }
        names = ("num_accepted", "next_token", *GATE_OUTPUTS)
        feeds = {"given": logits, "next_tokens": following, **row}
        feeds["use_full_entropy"] = row["use_full_entropy"].astype(np.bool_)
        want = dict(zip(names, session.run(list(names), feeds), strict=True))
        found = kernels.entropy_gate(logits.reshape(-1, vocab_size), following.reshape(-1), 3)
        found = {name: results.reshape(want[name].shape) for name, results in found.items()}
        for name in ("argmax", "top_ids"):
            np.testing.assert_array_equal(found[name], want[name])
        for name in FLOATS:
            np.testing.assert_allclose(found[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)
        gates = {name: found[name] for name in ("argmax", "entropy", "entropy_topk")}
        decided = kernels.loose_window_accept(
            {"next_tokens": following, **gates, **row, "stop_token_ids": np.array([3, 7])}
        )
        for name, results in decided.items():
            np.testing.assert_array_equal(results, want[name], err_msg=name)
