"""The engines' verification head, run by ONNX Runtime, against the NumPy rule and entropies."""

from dataclasses import dataclass, replace

import numpy as np
import onnxruntime as ort
import pytest

from fly_build.head import GATE_OUTPUTS, HeadForm
from fly_trt.verification import EXACT, AcceptancePolicy, FlyPolicy, accept
from one_operator import cpu_kernels
from portable_head import head_session

VOCAB_SIZE = 97
STOPS = [1, 5]
NUM_CASES = 400
OUTPUTS = ("num_accepted", "next_token", *GATE_OUTPUTS)


FORMS: list[HeadForm] = ["functions", "lazy_functions", "operators"]


@pytest.fixture(scope="module", params=FORMS)
def session(request: pytest.FixtureRequest) -> ort.InferenceSession:
    return session_of(request.param)


def session_of(form: HeadForm, top_k: int = 3, vocab_size: int = VOCAB_SIZE) -> ort.InferenceSession:
    return head_session(vocab_size, STOPS, top_k, form, cpu_kernels() if form == "operators" else None)


@dataclass
class Batch:
    """Random rows: mostly agreeing drafts, ragged contexts, empty drafts, stop tokens, several policies."""

    logits: np.ndarray
    ids: np.ndarray
    context: np.ndarray
    drafts: np.ndarray
    policies: list[AcceptancePolicy]

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Batch":
        rows, length = int(rng.integers(1, 5)), int(rng.integers(1, 27))
        logits = (rng.normal(size=(rows, length, VOCAB_SIZE)) * rng.choice([0.5, 3, 12])).astype(np.float32)
        argmax = logits.argmax(-1)
        ids = np.concatenate([np.full((rows, 1), 7), argmax[:, :-1]], axis=1)
        changed = rng.random(ids.shape) < rng.choice([0, 0.1, 0.3])
        ids = np.where(changed, rng.integers(0, VOCAB_SIZE, ids.shape), ids)
        context = rng.integers(1, length + 1, rows)
        drafts = np.array([rng.integers(0, length - c + 1) for c in context])
        policies = [
            FlyPolicy(
                entropy_threshold=float(np.float32(rng.choice([0, 0, 0.3, 1.0]))),
                use_full_entropy=bool(rng.integers(2)),
                window=int(rng.integers(0, 7)),
                lookahead=int(rng.integers(0, 7)),
            )
            if rng.random() < 0.8
            else EXACT
            for _ in range(rows)
        ]
        return cls(logits, ids, context, drafts, policies)

    def with_full_entropy(self) -> "Batch":
        return replace(self, policies=[replace(policy, use_full_entropy=True) for policy in self.policies])

    def feeds(self) -> dict[str, np.ndarray]:
        return {
            "given": self.logits,
            "next_tokens": np.roll(self.ids, -1, axis=1).astype(np.int64),
            "num_context": self.context.astype(np.int64),
            "num_draft": self.drafts.astype(np.int64),
            "entropy_threshold": np.array([p.entropy_threshold for p in self.policies], np.float32),
            "use_full_entropy": np.array([p.use_full_entropy for p in self.policies]),
            "window": np.array([p.window for p in self.policies], np.int64),
            "lookahead": np.array([p.lookahead for p in self.policies], np.int64),
        }


def run(session: ort.InferenceSession, batch: Batch) -> dict[str, np.ndarray]:
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), batch.feeds()), strict=True))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_random_rows_are_decided_as_the_rule_decides(session: ort.InferenceSession) -> None:
    rng = np.random.default_rng(0)
    seen = {"empty": 0, "full": 0, "loosened": 0, "rejected": 0, "stop in draft": 0, "long context": 0}
    for _ in range(NUM_CASES):
        batch = Batch.random(rng)
        got = run(session, batch)
        for row, policy in enumerate(batch.policies):
            c, n = int(batch.context[row]), int(batch.drafts[row])
            draft = batch.ids[row, c : c + n]
            argmax = got["argmax"][row, c - 1 : c + n]
            gate = got["entropy" if policy.use_full_entropy else "entropy_topk"][row, c - 1 : c + n]
            want = accept(draft, argmax, gate, policy, frozenset(STOPS))
            assert (got["num_accepted"][row], got["next_token"][row]) == (want.num_accepted, want.next_token)
            seen["empty"] += n == 0
            seen["full"] += 0 < n == want.num_accepted
            seen["rejected"] += want.num_accepted < n
            seen["loosened"] += bool((draft[: want.num_accepted] != argmax[: want.num_accepted]).any())
            seen["stop in draft"] += bool(np.isin(draft, STOPS).any())
            seen["long context"] += c > 1
    assert all(count > 20 for count in seen.values()), seen


def test_entropies_and_log_probabilities_agree_with_numpy(session: ort.InferenceSession) -> None:
    batch = Batch.random(np.random.default_rng(3)).with_full_entropy()
    got = run(session, batch)
    log_probs = log_softmax(batch.logits)
    top = np.sort(log_probs, axis=-1)[..., -3:]
    np.testing.assert_array_equal(got["argmax"], batch.logits.argmax(-1))
    np.testing.assert_allclose(got["entropy"], -(np.exp(log_probs) * log_probs).sum(-1), rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(got["entropy_topk"], -(np.exp(top) * top).sum(-1), rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(got["argmax_logprob"], log_probs.max(-1), rtol=1e-5, atol=5e-6)
    following = np.take_along_axis(log_probs[:, :-1], batch.ids[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(got["token_logprob"][:, :-1], following, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("top_k", [1, 3, 40, VOCAB_SIZE])
@pytest.mark.parametrize("form", FORMS)
def test_the_most_probable_tokens_agree_with_numpy(form: HeadForm, top_k: int) -> None:
    """With many ties, where the lowest id comes first, and impossible tokens."""
    rng = np.random.default_rng(9)
    session = session_of(form, top_k)
    for round_to in (None, 0, -1):
        batch = Batch.random(rng)
        if round_to is not None:
            batch.logits = batch.logits.round(round_to)
        batch.logits[rng.random(batch.logits.shape) < 0.3] = -np.inf
        batch.logits[..., 50] = 0  # one is possible at least
        got = run(session, batch)
        order = np.argsort(-batch.logits, axis=-1, kind="stable")[..., :top_k]
        log_probs = np.take_along_axis(log_softmax(batch.logits), order, axis=-1)
        assert (got["top_ids"].dtype, got["top_logprobs"].dtype) == (np.int64, np.float32)
        np.testing.assert_array_equal(got["top_ids"], order)
        np.testing.assert_allclose(got["top_logprobs"], log_probs, rtol=1e-5, atol=5e-6)
        np.testing.assert_array_equal(got["top_ids"][..., 0], got["argmax"])
        np.testing.assert_array_equal(got["top_logprobs"][..., 0], got["argmax_logprob"])


@pytest.mark.parametrize("vocab_size", [8192, 8649, 9997])  # cut into blocks of 128 and of 93; 9997 in none
@pytest.mark.parametrize("top_k", [1, 3, 60])
def test_a_large_vocabulary_is_searched_in_blocks_with_the_same_result_to_the_last_bit(
    vocab_size: int, top_k: int
) -> None:
    """Random logits, many ties within blocks and between them, hardly any that are possible, and NaN and infinities."""
    rng = np.random.default_rng(vocab_size + top_k)
    lazy, portable = (session_of(form, top_k, vocab_size) for form in ("lazy_functions", "functions"))
    rows, length = 2, 4
    policies: list[AcceptancePolicy] = [FlyPolicy(0.3, use_full_entropy=True, window=6, lookahead=5)] * rows
    drawn = rng.normal(size=(rows, length, vocab_size)).astype(np.float32) * 4
    rare, odd = np.full_like(drawn, -np.inf), drawn.copy()
    rare[..., [7, 300, 301, vocab_size - 1]] = [0, 1, 1, 1]
    odd[0, 0, 500], odd[0, 1, 600], odd[1, 2] = np.nan, np.inf, np.nan
    for logits in (drawn, drawn.round(), np.zeros_like(drawn), rare, odd):
        ids = rng.integers(0, vocab_size, (rows, length))
        batch = Batch(logits, ids, np.ones(rows), np.full(rows, length - 1), policies)
        got, want = run(lazy, batch), run(portable, batch)
        is_number = ~np.isnan(logits).any(axis=-1)
        for name in GATE_OUTPUTS:
            np.testing.assert_array_equal(got[name][is_number], want[name][is_number])
        assert np.isnan(got["entropy_topk"][~is_number]).all()
        assert np.isnan(got["top_logprobs"][~is_number]).all()


def test_the_lazy_gate_computes_the_full_entropy_of_every_row_where_one_row_uses_it() -> None:
    session = head_session(VOCAB_SIZE, STOPS, form="lazy_functions")
    rows, length = 3, 4
    logits = np.random.default_rng(8).normal(size=(rows, length, VOCAB_SIZE)).astype(np.float32)
    unused = FlyPolicy(0.3, use_full_entropy=False, window=6, lookahead=5)
    batch = Batch(logits, np.zeros((rows, length)), np.ones(rows), np.full(rows, length - 1), [unused] * rows)
    without = run(session, batch)
    assert np.isnan(without["entropy"]).all()
    used = replace(batch, policies=[unused, replace(unused, use_full_entropy=True), unused])
    assert not np.isnan(run(session, used)["entropy"]).any()
    for name in set(GATE_OUTPUTS) - {"entropy"}:
        np.testing.assert_array_equal(run(session, used)[name], without[name])


def test_the_number_of_probabilities_in_the_gate_is_fixed_when_the_head_is_built() -> None:
    batch = Batch.random(np.random.default_rng(4))
    log_probs = log_softmax(batch.logits)
    top = np.sort(log_probs, axis=-1)[..., -8:]
    got = run(head_session(VOCAB_SIZE, STOPS, top_k=8), batch)
    np.testing.assert_allclose(got["entropy_topk"], -(np.exp(top) * top).sum(-1), rtol=1e-5, atol=5e-6)


def test_ties_go_to_the_lower_token(session: ort.InferenceSession) -> None:
    batch = Batch.random(np.random.default_rng(5))
    batch.logits[:] = 0
    batch.logits[..., [13, 40]] = 2
    assert (run(session, batch)["argmax"] == 13).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tokens", [[13], range(VOCAB_SIZE)])
@pytest.mark.parametrize("use_full_entropy", [False, True])
def test_a_position_that_is_not_a_number_is_never_loosened_and_says_so(
    session: ort.InferenceSession, value: float, tokens: list[int], use_full_entropy: bool
) -> None:
    """Draft token 6 differs from the choice everywhere, so a number there would be loosened at any entropy."""
    length, broken = 12, 4
    logits = np.zeros((1, length, VOCAB_SIZE), np.float32)
    logits[..., 9] = 1
    logits[0, broken, tokens] = value
    ids = np.full((1, length), 9)
    ids[0, broken + 1] = 6
    loose = FlyPolicy(0.0, use_full_entropy=use_full_entropy, window=0, lookahead=0)
    got = run(session, Batch(logits, ids, np.array([1]), np.array([length - 1]), [loose]))
    assert got["num_accepted"][0] == broken
    for name in ("entropy_topk", "argmax_logprob", *(["entropy"] if use_full_entropy else [])):
        assert np.isnan(got[name][0]).nonzero()[0].tolist() == [broken]
    assert np.isnan(got["top_logprobs"][0]).all(axis=-1).nonzero()[0].tolist() == [broken]
    assert np.isnan(got["top_logprobs"][0]).any(axis=-1).nonzero()[0].tolist() == [broken]
    assert 0 <= got["argmax"][0, broken] < VOCAB_SIZE

    logits[0, broken] = logits[0, 0]
    assert run(session, Batch(logits, ids, np.array([1]), np.array([length - 1]), [loose]))["num_accepted"][0] == 11


def test_an_impossible_token_has_no_share_in_the_entropies(session: ort.InferenceSession) -> None:
    batch = Batch.random(np.random.default_rng(7)).with_full_entropy()
    few = batch.logits[..., :2].copy()
    batch.logits[..., 2:] = -np.inf
    got = run(session, batch)
    log_probs = log_softmax(few)
    want = -(np.exp(log_probs) * log_probs).sum(-1)
    np.testing.assert_allclose(got["entropy"], want, rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(got["entropy_topk"], want, rtol=1e-5, atol=5e-6)
    np.testing.assert_array_equal(got["argmax"], few.argmax(-1))
    assert (got["top_ids"][..., 2] == 2).all()
    assert np.isneginf(got["top_logprobs"][..., 2]).all()


def test_without_stop_tokens_every_token_may_be_loosened() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(1, 12, VOCAB_SIZE)).astype(np.float32)
    argmax = logits.argmax(-1)
    ids = np.concatenate([[[7]], argmax[:, :-1]], axis=1)
    ids[0, 3] = 1
    loose = FlyPolicy(0.0, use_full_entropy=False, window=6, lookahead=5)
    batch = Batch(logits, ids, np.array([1]), np.array([11]), [loose])
    assert run(head_session(VOCAB_SIZE, []), batch)["num_accepted"][0] == 11
    assert run(head_session(VOCAB_SIZE, [1]), batch)["num_accepted"][0] == 2
