"""Processed scores, distributions and choices against slow definitions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fly_trt.errors import RequestError
from fly_trt.tokens import NO_TOKENS
from fly_trt.verification import (
    MIN_TEMPERATURE,
    LogitsProcessor,
    UniformStream,
    distribution,
    gate_entropy,
    greedy,
    sample,
    top_logprobs,
    top_tokens,
)
from sampling_definitions import processed_row, random_scores, truncated_softmax

BELOW_ONE = math.nextafter(1, 0)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int64)


# --- processed scores -------------------------------------------------------------------------------------------------


def random_settings(rng: np.random.Generator, vocab_size: int) -> dict[str, Any]:
    every: dict[str, Callable[[], Any]] = {
        "presence_penalty": lambda: float(rng.uniform(-2, 2)),
        "frequency_penalty": lambda: float(rng.uniform(-2, 2)),
        "repetition_penalty": lambda: float(rng.uniform(0.5, 2)),
        "logit_bias": lambda: {int(t): float(rng.uniform(-5, 5)) for t in rng.integers(vocab_size, size=4)},
        "bad_words": lambda: [rng.integers(vocab_size, size=n).tolist() for n in rng.integers(1, 4, size=8)],
        "min_tokens": lambda: int(rng.integers(1, 12)),
    }
    settings = {name: make() for name, make in every.items() if rng.random() < 0.6}
    return settings | {"end_token_ids": rng.integers(vocab_size, size=2).tolist()}


@pytest.mark.parametrize("seed", range(60))
def test_scores_are_processed_as_the_parameters_are_defined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab_size, m = 7, int(rng.integers(1, 9))
    settings = random_settings(rng, vocab_size)
    prompt, output = rng.integers(vocab_size, size=3), rng.integers(vocab_size, size=int(rng.integers(0, 8)))
    draft = rng.integers(vocab_size, size=m - 1 + int(rng.integers(0, 3)))
    logits = random_scores(rng, m, vocab_size)
    got = LogitsProcessor(vocab_size, prompt, **settings).process(logits, output, draft)
    want = [
        processed_row(row, prompt.tolist(), [*output.tolist(), *draft[:i].tolist()], settings)
        for i, row in enumerate(logits)
    ]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_a_drafted_position_sees_what_plain_decoding_would_see(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab_size, settings = 9, random_settings(rng, 9)
    prompt, sequence = rng.integers(vocab_size, size=5), rng.integers(vocab_size, size=40)
    logits = random_scores(rng, 40, vocab_size)
    plain = LogitsProcessor(vocab_size, prompt, **settings)
    want = [plain.process(logits[i : i + 1], sequence[:i], NO_TOKENS)[0] for i in range(40)]
    speculative = LogitsProcessor(vocab_size, prompt, **settings)
    start = 0
    while start < 40:
        m = min(int(rng.integers(1, 9)), 40 - start)
        got = speculative.process(logits[start : start + m], sequence[:start], sequence[start:])
        np.testing.assert_array_equal(got, want[start : start + m])
        start += int(rng.integers(1, m + 1))


def test_logits_stay_as_they_are() -> None:
    logits = np.ones((2, 5), np.float32)
    settings: dict[str, Any] = {"repetition_penalty": 2.0, "logit_bias": {1: 1.0}, "bad_words": [[2]]}
    LogitsProcessor(5, [3], **settings).process(logits, tokens(4), tokens(0))
    assert (logits == 1).all()


def test_a_bad_word_is_found_across_output_and_draft_and_not_in_the_prompt() -> None:
    processor = LogitsProcessor(6, [1, 2], bad_words=[[1, 2, 3], [5]])
    logits = np.zeros((3, 6), np.float32)
    masked = np.isneginf(processor.process(logits, tokens(0, 1), tokens(2, 2)))
    assert np.argwhere(masked).tolist() == [[0, 5], [1, 3], [1, 5], [2, 5]]
    assert not np.isneginf(processor.process(logits, NO_TOKENS, tokens(0, 0)))[:, 3].any()


def test_end_tokens_are_masked_until_the_draft_reaches_min_tokens() -> None:
    processor = LogitsProcessor(4, [], min_tokens=3, end_token_ids=[2, 99])
    masked = np.isneginf(processor.process(np.zeros((4, 4), np.float32), tokens(0), tokens(0, 0, 0)))
    assert np.argwhere(masked).tolist() == [[0, 2], [1, 2]]


def test_the_repetition_penalty_sees_the_prompt_and_the_other_penalties_do_not() -> None:
    logits = np.array([[1.0, -1.0, 1.0]], np.float32)
    settings: dict[str, Any] = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    assert LogitsProcessor(3, [0, 1, 1], **settings).process(logits, NO_TOKENS, NO_TOKENS).tolist() == [
        [0.5, -2.0, 1.0]
    ]
    got = LogitsProcessor(3, [], **settings).process(logits, tokens(2, 2), NO_TOKENS)
    assert got.tolist() == [[1.0, -1.0, 0.5 - 2 * 0.5 - 0.25]]


def test_neutral_settings_change_no_score() -> None:
    assert not LogitsProcessor(4, [1], min_tokens=3).changes_scores
    assert not LogitsProcessor(4, [1], end_token_ids=[2]).changes_scores
    settings: list[dict[str, Any]] = [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 0.5}},
        {"bad_words": [[1]]},
        {"min_tokens": 1, "end_token_ids": [2]},
    ]
    assert all(LogitsProcessor(4, [1], **given).changes_scores for given in settings)


@pytest.mark.parametrize("settings", [{"logit_bias": {4: 1.0}}, {"bad_words": [[0, -1]]}, {"bad_words": [[]]}])
def test_tokens_outside_the_vocabulary_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="expected one or more token ids from 0 to 3"):
        LogitsProcessor(4, [], **settings)


# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(80))
def test_a_distribution_is_cut_as_the_parameters_are_defined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([1, 2, 12, 700]))
    scores = random_scores(rng, 3, vocab_size)
    if seed % 4 == 0:
        scores = scores.round()  # many ties
    scores[:, 1:][rng.random((3, vocab_size - 1)) < 0.1] = -np.inf
    every = {
        "temperature": float(rng.uniform(0.2, 2)),
        "top_k": int(rng.integers(-1, vocab_size + 2)),
        "top_p": float(rng.uniform(0.01, 1)),
        "min_p": float(rng.uniform(0, 0.3)),
    }
    settings: dict[str, Any] = {name: value for name, value in every.items() if rng.random() < 0.6}
    got = distribution(scores, **settings)
    want = np.array([truncated_softmax(row, **settings) for row in scores])
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_a_nucleus_of_any_size_is_the_smallest_that_reaches_its_share(spread: float) -> None:
    scores = random_scores(np.random.default_rng(1), 2, 20_000, spread)
    for row, got in zip(scores, distribution(scores, top_p=0.7), strict=True):
        full = np.sort(distribution(row[None])[0].astype(np.float64))[::-1]
        size = np.count_nonzero(got)
        assert full[: size - 1].sum() < 0.7 + 1e-6
        assert full[:size].sum() > 0.7 - 1e-6
        assert row[got > 0].min() >= row[got == 0].max()


@given(
    arrays(np.float32, (2, 9), elements=st.floats(-100, 100, width=32)),
    st.floats(MIN_TEMPERATURE, 100),
    st.integers(-1, 10),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_most_probable_token_survives_every_cut(
    scores: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    got = distribution(scores, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-5)
    assert (got[[0, 1], greedy(scores)] == got.max(axis=1)).all()


def test_ties_go_to_the_lower_token() -> None:
    scores = np.array([[1, 2, 2, 0, 2, 1]], np.float32)
    assert np.flatnonzero(distribution(scores, top_k=2)[0]).tolist() == [1, 2]
    assert np.flatnonzero(distribution(scores, top_k=4)[0]).tolist() == [0, 1, 2, 4]
    assert np.flatnonzero(distribution(np.zeros((1, 8), np.float32), top_p=0.5)[0]).tolist() == [0, 1, 2, 3]
    assert greedy(scores).tolist() == [1]


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    scores = random_scores(np.random.default_rng(2), 5, 3001)
    uniforms = UniformStream(1, 0).at(0, 5)
    for settings in ({}, {"top_p": 0.95, "temperature": 1.5}, {"top_k": 40, "min_p": 0.01}):
        together = distribution(scores, **settings)
        drawn = sample(together, uniforms)
        for i in range(5):
            row = np.repeat(scores[i : i + 1], 2, axis=1)[:, ::2]  # as a strided view
            alone = distribution(row, **settings)
            np.testing.assert_array_equal(alone[0], together[i])
            assert sample(alone, uniforms[i : i + 1])[0] == drawn[i]


@pytest.mark.parametrize("bad", [-np.inf, np.nan, np.inf])
def test_a_row_without_a_finite_largest_score_is_refused(bad: float) -> None:
    scores = np.zeros((2, 4), np.float32)
    scores[1] = bad
    choose: list[Callable[[np.ndarray], Any]] = [distribution, greedy, lambda s: top_logprobs(s, 1, tokens(0, 0))]
    for function in choose:
        with pytest.raises(RequestError, match="expected a finite one"):
            function(scores)


@pytest.mark.parametrize("temperature", [0.0, -1.0, MIN_TEMPERATURE / 2, math.nan])
def test_greedy_decoding_has_no_distribution_of_its_own(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"use greedy\(\)"):
        distribution(np.zeros((1, 4), np.float32), temperature=temperature)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_inverse_of_the_running_sum_in_vocabulary_order() -> None:
    probabilities = np.tile(np.array([0, 0.25, 0, 0.5, 0.25, 0], np.float32), (7, 1))
    uniforms = np.array([0, 0.2, 0.25, 0.5, 0.7499, 0.75, BELOW_ONE])
    assert sample(probabilities, uniforms).tolist() == [1, 1, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("vocab_size", [511, 512, 513, 5000])
def test_large_vocabularies_are_sampled_as_small_ones(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    row = rng.random(vocab_size).astype(np.float32) ** 8
    uniforms = rng.random(2000)
    running = np.cumsum(row, dtype=np.float64)
    want = np.searchsorted(running, uniforms * running[-1], side="right")
    np.testing.assert_array_equal(sample(np.broadcast_to(row, (2000, vocab_size)), uniforms), want)


@given(
    st.dictionaries(st.integers(0, 1099), st.floats(2**-100, 1, width=32), min_size=1, max_size=8),
    st.sampled_from([0.0, 5e-324, 0.5, BELOW_ONE]) | st.floats(0, BELOW_ONE),
)
def test_a_token_of_probability_zero_is_never_drawn(weights: dict[int, float], uniform: float) -> None:
    row = np.zeros(1100, np.float32)
    row[list(weights)] = list(weights.values())
    assert row[sample(row[None], np.array([uniform]))[0]] > 0


def test_the_last_uniform_draws_a_token_whatever_the_rounding() -> None:
    for vocab_size in (513, 700, 1500):
        rows = np.random.default_rng(vocab_size).random((300, vocab_size)).astype(np.float32)
        drawn = sample(rows, np.full(300, BELOW_ONE))
        assert (rows[np.arange(300), drawn] > 0).all()


def test_a_row_without_mass_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a distribution"):
        sample(np.zeros((1, 4), np.float32), np.array([0.5]))


@given(st.integers(-(2**70), 2**70), st.integers(0, 100), st.integers(0, 2000), st.integers(1, 40))
def test_a_uniform_belongs_to_its_position(seed: int, index: int, first: int, count: int) -> None:
    stream = UniformStream(seed, index)
    together = stream.at(first, count)
    assert together.dtype == np.float64
    assert ((together >= 0) & (together < 1)).all()
    backwards = [stream.at(position, 1)[0] for position in reversed(range(first, first + count))]
    assert backwards[::-1] == together.tolist()


def test_seeds_and_samples_have_streams_of_their_own() -> None:
    streams = [UniformStream(seed, index) for seed in (-1, 0, 1, 2**32, 2**63) for index in range(4)]
    uniforms = np.array([stream.at(0, 500) for stream in streams])
    assert len(np.unique(uniforms)) == uniforms.size
    assert abs(np.corrcoef(uniforms) - np.eye(len(streams))).max() < 0.2
    assert abs(uniforms.mean() - 0.5) < 0.01


def test_a_seed_gives_the_same_uniforms_in_every_release() -> None:
    np.testing.assert_array_equal(
        UniformStream(42, 1).at(6, 3), [0.9651202595945853, 0.7721880415176472, 0.9752443214869759]
    )


# --- gate and log-probabilities ---------------------------------------------------------------------------------------


def test_the_gate_entropies_are_those_of_the_definition() -> None:
    scores = random_scores(np.random.default_rng(3), 4, 5000)
    log_probs = scores - np.log(np.exp(scores.astype(np.float64)).sum(axis=1, keepdims=True))
    top = np.sort(log_probs, axis=1)[:, -8:]
    entropy, entropy_topk = gate_entropy(distribution(scores), 8)
    assert (entropy.dtype, entropy_topk.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(entropy, -(np.exp(log_probs) * log_probs).sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(entropy_topk, -(np.exp(top) * top).sum(axis=1), atol=1e-5)


def test_a_certain_position_has_no_entropy() -> None:
    entropies = gate_entropy(distribution(np.zeros((1, 9), np.float32), top_k=1), 3)
    assert [e.tolist() for e in entropies] == [[0], [0]]


def test_a_narrow_distribution_has_the_same_entropy_in_both_gates() -> None:
    full, topk = gate_entropy(distribution(np.zeros((1, 9), np.float32), top_k=4), 10)
    np.testing.assert_allclose([full, topk], math.log(4), rtol=1e-6)


def test_the_most_probable_tokens_come_first_and_the_lowest_id_among_equals() -> None:
    scores = random_scores(np.random.default_rng(5), 6, 50).round()  # with ties
    ids, logprobs = top_tokens(distribution(scores), 7)
    assert (ids.dtype, logprobs.dtype) == (np.int64, np.float32)
    for i, row in enumerate(scores.astype(np.float64)):
        order = sorted(range(50), key=lambda token: (-row[token], token))[:7]
        assert ids[i].tolist() == order
        np.testing.assert_allclose(logprobs[i], row[order] - math.log(np.exp(row).sum()), atol=1e-5)


def test_tokens_that_are_left_out_of_a_distribution_come_last_and_are_impossible() -> None:
    ids, logprobs = top_tokens(distribution(np.array([[0, 5, 1, 5]], np.float32), top_k=2), 4)
    assert ids.tolist() == [[1, 3, 0, 2]]
    np.testing.assert_allclose(logprobs, [[-math.log(2), -math.log(2), -math.inf, -math.inf]], rtol=1e-6)


def test_a_row_has_the_most_probable_tokens_that_it_has_alone() -> None:
    probabilities = distribution(random_scores(np.random.default_rng(6), 5, 301))
    together = top_tokens(probabilities, 9)
    for i in range(5):
        for alone, all_rows in zip(top_tokens(probabilities[i : i + 1], 9), together, strict=True):
            np.testing.assert_array_equal(alone[0], all_rows[i])


def test_log_probabilities_are_ranked_most_probable_first() -> None:
    logits = random_scores(np.random.default_rng(4), 3, 50).round()  # with ties
    chosen = tokens(0, 17, 49)
    got = top_logprobs(logits, 5, chosen)
    for i, row in enumerate(logits.astype(np.float64)):
        log_probs = row - math.log(np.exp(row).sum())
        order = sorted(range(50), key=lambda token: (-row[token], token))
        assert got.token_ids[i].tolist() == order[:5]
        np.testing.assert_allclose(got.logprobs[i], log_probs[order[:5]], atol=1e-5)
        np.testing.assert_allclose(got.chosen_logprob[i], log_probs[chosen[i]], atol=1e-5)
        assert order[got.chosen_rank[i] - 1] == chosen[i]


def test_no_more_log_probabilities_than_tokens() -> None:
    logits = np.array([[0, -np.inf, 1]], np.float32)
    assert top_logprobs(logits, 9, tokens(1)).token_ids.tolist() == [[2, 0, 1]]
    none = top_logprobs(logits, 0, tokens(1))
    assert (none.token_ids.shape, none.chosen_rank.tolist(), none.chosen_logprob.tolist()) == ((1, 0), [3], [-math.inf])
