"""Requests that sample, change scores or want logprobs: speculation and batch mates change nothing."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.drafting import ModelDrafter
from fly_trt.errors import RequestError
from fly_trt.runtime.request import Request
from fly_trt.verification import PRESETS, AcceptancePolicy
from loop_stack import DRAFTERS, NUM_DRAFT_TOKENS, PROMPT, SHORT_WINDOW, Stack, make_drafter, make_request, make_stack
from table_engine import (
    VOCAB_SIZE,
    TableEngine,
    greedy,
    most_probable,
    sometimes_differs,
    sometimes_uncertain,
    spread_logits,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "low temperature": {"temperature": 0.4, "ignore_eos": True, "max_tokens": 60},
    "truncated": {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    "repetition": {"repetition_penalty": 1.8},
    "presence and frequency": {"presence_penalty": 1.0, "frequency_penalty": 0.7},
    "bias": {"logit_bias": {4: 3.0, 5: -100.0}},
    "bad words": {"bad_word_ids": [[3], [4, 5], [6, 2, 7]]},
    "minimum": {"min_tokens": 20, "stop_token_ids": [3, 4]},
    "everything": {
        "temperature": 1.0,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "logit_bias": {4: 1.0},
        "bad_word_ids": [[3, 4]],
        "min_tokens": 10,
        "logprobs": 3,
    },
}
POLICIES = [SHORT_WINDOW, *PRESETS.values()]
lengths = st.lists(st.integers(0, NUM_DRAFT_TOKENS), max_size=5)
seeds = st.integers(0, 2**40)


def build(salt: int, drafter: str = "none", **settings: Any) -> Stack:
    logits = spread_logits(salt)
    language = most_probable(logits)
    draft = make_drafter(drafter, sometimes_differs(language, salt))
    return make_stack(language, draft, logits=logits, entropy=sometimes_uncertain(salt), **settings)


def served(stack: Stack, *others: Request, **params: Any) -> Request:
    request = make_request(**params)
    stack.run(*others, request)
    assert request.error is None
    return request


@pytest.mark.parametrize("name", SETTINGS)
def test_a_seeds_tokens_do_not_depend_on_drafts(name: str) -> None:
    @examples(12)
    @given(salt=st.integers(0, 50), seed=seeds, lengths=lengths)
    def check(salt: int, seed: int, lengths: list[int]) -> None:
        want = served(build(salt), seed=seed, **SETTINGS[name])
        for drafter in DRAFTERS[1:]:
            got = served(build(salt, drafter, draft_lengths=lengths), seed=seed, **SETTINGS[name])
            assert got.output_token_ids == want.output_token_ids, drafter
            assert got.logprobs == want.logprobs, drafter
            assert (got.finish_reason, got.stop_reason) == (want.finish_reason, want.stop_reason)

    check()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loose_requests_tokens_do_not_depend_on_where_rounds_are_cut(name: str) -> None:
    @examples(12)
    @given(salt=st.integers(0, 50), seed=seeds, lengths=lengths, policy=st.sampled_from(POLICIES))
    def check(salt: int, seed: int, lengths: list[int], policy: AcceptancePolicy) -> None:
        params = {"seed": seed, "policy": policy, "logprobs": 1} | SETTINGS[name]
        want = served(build(salt, "multi_level"), **params)
        got = served(build(salt, "multi_level", draft_lengths=lengths), **params)
        assert got.output_token_ids == want.output_token_ids
        assert got.logprobs == want.logprobs
        assert got.metrics.num_spec_steps == want.metrics.num_spec_steps

    check()


@examples(10)
@given(salt=st.integers(0, 50), seed=seeds, drafter=st.sampled_from(DRAFTERS), lengths=lengths)
def test_a_seeds_tokens_do_not_depend_on_what_shares_the_batch(
    salt: int, seed: int, drafter: str, lengths: list[int]
) -> None:
    alone = {name: served(build(salt), seed=seed, **params) for name, params in SETTINGS.items()}
    mates = [make_request(policy=PRESETS["reference"]), make_request(max_tokens=7), make_request([5, 6, 7])]
    together = {name: make_request(seed=seed, **params) for name, params in SETTINGS.items()}
    stack = build(salt, drafter, num_slots=4, draft_lengths=lengths)
    stack.run(*mates, *together.values())
    for name, request in together.items():
        assert request.output_token_ids == alone[name].output_token_ids, name
        assert request.logprobs == alone[name].logprobs, name
    language = most_probable(spread_logits(salt))
    assert mates[1].output_token_ids == greedy(language, PROMPT, 7)[: len(mates[1].output_token_ids)]


def test_another_seed_or_another_sequence_of_the_prompt_gives_other_tokens() -> None:
    outputs = {
        tuple(served(build(1), seed=seed, index=index, temperature=1.0, ignore_eos=True).output_token_ids)
        for seed in range(4)
        for index in range(4)
    }
    assert len(outputs) == 16


def test_a_sampled_request_profits_from_drafts() -> None:
    request = served(build(1, "draft_model"), seed=1, temperature=0.3, ignore_eos=True, max_tokens=60)
    assert request.metrics.num_accepted_tokens > 20


def test_processed_scores_decide_and_raw_ones_never_do() -> None:
    salt = 3
    for drafter in DRAFTERS:
        request = served(build(salt, drafter), logit_bias={9: 100.0}, max_tokens=12, policy=PRESETS["reference"])
        assert request.output_token_ids == [9] * 12, drafter
        banned = served(build(salt, drafter), bad_word_ids=[[token] for token in range(2, 9)], max_tokens=30)
        assert set(banned.output_token_ids).isdisjoint(range(2, 9)), drafter


def test_min_tokens_holds_back_every_end() -> None:
    for drafter in DRAFTERS:
        request = served(build(2, drafter), min_tokens=25, max_tokens=30, logit_bias={1: 100.0})
        assert len(request.output_token_ids) == 26, drafter
        assert 1 not in request.output_token_ids[:-1]
        assert (request.output_token_ids[-1], request.finish_reason) == (1, "stop")


NO_TOKEN_LEFT = [
    {"bad_word_ids": [[token] for token in range(VOCAB_SIZE)]},
    {"bad_word_ids": [[token] for token in range(VOCAB_SIZE)], "temperature": 1.0},
    {"min_tokens": 3, "stop_token_ids": list(range(VOCAB_SIZE))},
]


@pytest.mark.parametrize("impossible", NO_TOKEN_LEFT)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_request_whose_settings_leave_no_token_fails_alone(impossible: dict[str, Any], drafter: str) -> None:
    stack = build(5, drafter, num_slots=3)
    language = most_probable(spread_logits(5))
    others = [make_request([7, 8, 9 + i], ignore_eos=True, max_tokens=20) for i in range(2)]
    failing = make_request(**impossible)
    stack.run(others[0], failing, others[1])
    assert isinstance(failing.error, RequestError)
    assert "leave no token" in str(failing.error)
    assert (failing.finish_reason, failing.output_token_ids, failing.slot) == ("abort", [], -1)
    for request in others:
        assert request.error is None
        assert request.output_token_ids == greedy(language, request.prompt_token_ids, 20)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_request_that_runs_out_of_tokens_keeps_what_it_emitted(drafter: str) -> None:
    first = served(build(5), max_tokens=8).output_token_ids
    dead_end = [[first[-2], first[-1], token] for token in range(VOCAB_SIZE)]
    request = make_request(bad_word_ids=dead_end)
    build(5, drafter).run(request)
    assert request.error is not None
    assert request.output_token_ids == first[: len(request.output_token_ids)]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("lengths", [(), (0,), (2, 0, 5)])
def test_every_output_token_has_its_logprobs(drafter: str, lengths: tuple[int, ...]) -> None:
    logits = spread_logits(4)
    request = served(build(4, drafter, draft_lengths=lengths), policy=PRESETS["reference"], logprobs=2, max_tokens=30)
    assert len(request.logprobs) == len(request.output_token_ids)
    tokens = list(PROMPT)
    for token, entries in zip(request.output_token_ids, request.logprobs, strict=True):
        scores = logits(tuple(tokens)).astype(float)
        assert entries[token].logprob == pytest.approx(scores[token] - np.logaddexp.reduce(scores), abs=1e-4)
        assert entries[token].rank == 1 + int((scores > scores[token]).sum())
        assert {int(i) for i in np.argsort(-scores)[:2]} <= set(entries)
        assert len(entries) in (2, 3)
        tokens.append(token)


def test_logits_leave_the_engine_for_those_who_need_them_only() -> None:
    stack = build(4, "draft_model", num_slots=2)
    asked = []
    make = stack.target.step

    def step(*shape: int, with_logits: bool = False, **outputs: bool) -> Any:
        asked.append(with_logits)
        return make(*shape, with_logits=with_logits, **outputs)

    stack.target.step = step
    stack.run(make_request(), make_request(policy=PRESETS["reference"]), make_request(stop_token_ids=[3]))
    assert not any(asked)
    stack.run(make_request(temperature=1.0, max_tokens=2))
    assert any(asked)


def test_a_draft_token_that_leaves_no_token_after_it_does_no_harm() -> None:
    """The draft always says 20, after which every token is a bad word; the target never says it."""
    language = lambda tokens: 2 + len(tokens) % 17  # noqa: E731
    bad_words = [[20, token] for token in range(VOCAB_SIZE)]
    stack = make_stack(language, ModelDrafter(TableEngine(lambda tokens: 20), VOCAB_SIZE))
    request = served(stack, bad_word_ids=bad_words, max_tokens=12)
    assert request.output_token_ids == greedy(language, request.prompt_token_ids, 12)


def test_a_token_that_truncation_left_out_is_not_loosened() -> None:
    """Whatever the gate says of the distribution that is left."""
    logits = spread_logits(3)
    sampler = make_request(policy=PRESETS["reference"], temperature=1.0, top_k=2).sampler
    assert sampler is not None
    row = logits((3, 4))
    least = int(row.argmin())
    said = sampler.choose(np.stack([row, row]), np.array([], np.int64), np.array([], np.int64), np.array([least]))
    assert said.entropy_topk[0] == said.entropy[0] == -np.inf
    assert np.isfinite(said.entropy_topk[1])
