"""How prompts are read: in chunks, within a budget of tokens, beside requests that go on emitting."""

import numpy as np
import pytest

from fly_trt.runtime.request import Request
from fly_trt.runtime.scheduler import MAX_LOGITS_CHUNK
from fly_trt.verification import PRESETS
from loop_stack import DRAFTERS, Stack, make_drafter, make_request, make_stack, random_prompt
from table_engine import greedy, hashed, most_probable, spread_logits

LANGUAGE = hashed(12, 3)


def decoding(stack: Stack, count: int = 1, **params: object) -> list[Request]:
    """Requests that are in the middle of their output."""
    requests = [make_request(random_prompt(100 + i, 4), **({"max_tokens": 200} | params)) for i in range(count)]
    stack.loop.add(requests)
    while not all(request.output_token_ids for request in requests):
        stack.step()
    stack.step()  # the first one that they verify together
    return requests


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("max_num_tokens", [3, 4, 20, 60])
def test_a_long_prompt_is_read_in_steps_of_at_most_max_num_tokens(drafter: str, max_num_tokens: int) -> None:
    stack = make_stack(LANGUAGE, make_drafter(drafter, LANGUAGE), num_slots=3, max_num_tokens=max_num_tokens)
    decoding(stack, 2, policy=PRESETS["reference"])
    request = make_request(random_prompt(0, 200), max_tokens=5)
    positions = stack.positions_of(lambda: stack.run(request))
    assert max(positions) <= max_num_tokens
    assert request.output_token_ids == greedy(LANGUAGE, request.prompt_token_ids, 5)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_running_requests_emit_between_the_chunks_of_a_long_prompt(drafter: str) -> None:
    stack = make_stack(LANGUAGE, make_drafter(drafter, LANGUAGE), num_slots=3, max_num_tokens=48)
    running = decoding(stack, 2)
    long = make_request(random_prompt(0, 200), max_tokens=5)
    stack.loop.add([long])
    num_iterations = 0
    while not long.output_token_ids:
        before = [len(request.output_token_ids) for request in running]
        stack.step()
        num_iterations += 1
        for request, count in zip(running, before, strict=True):
            assert request.is_finished or len(request.output_token_ids) > count
    assert num_iterations >= 200 // 48


def test_a_prompt_alone_is_read_in_whole_chunks() -> None:
    stack = make_stack(LANGUAGE, num_slots=2, max_num_tokens=48)
    request = make_request(random_prompt(0, 100), max_tokens=1)
    assert stack.positions_of(lambda: stack.run(request)) == [48, 48, 4]


def test_a_short_prompt_rides_in_the_verification_step() -> None:
    stack = make_stack(LANGUAGE, make_drafter("draft_model", LANGUAGE), num_slots=2, max_num_tokens=64)
    decoding(stack)
    short = make_request([7, 8, 9], max_tokens=20)
    stack.loop.add([short])
    before = stack.target.num_runs
    stack.step()
    assert stack.target.shapes[before:] == [(0, 2, 16)]
    assert short.output_token_ids == greedy(LANGUAGE, [7, 8, 9], len(short.output_token_ids)) != []


def test_the_end_of_a_long_prompt_rides_in_the_verification_step() -> None:
    stack = make_stack(LANGUAGE, make_drafter("draft_model", LANGUAGE), num_slots=2, max_num_tokens=64)
    decoding(stack)
    long = make_request(random_prompt(0, 70), max_tokens=20)
    stack.loop.add([long])
    before = stack.target.num_runs
    while not long.output_token_ids:
        stack.step()
    assert stack.target.shapes[before:] == [(1, 1, 48), (0, 2, 16), (0, 2, 16)]


def test_no_row_of_a_verification_step_is_idle_while_a_prompt_is_read() -> None:
    stack = make_stack(LANGUAGE, num_slots=2, max_num_tokens=40)
    decoding(stack)
    long = make_request(random_prompt(0, 100), max_tokens=1)
    stack.loop.add([long])
    stack.step()
    assert long.num_cached == 39 + 1


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_an_iteration_takes_at_most_one_budget_for_prompts_and_one_for_verification(drafter: str) -> None:
    stack = make_stack(LANGUAGE, make_drafter(drafter, LANGUAGE), num_slots=4, max_num_tokens=48)
    lengths = (4, 9, 100, 150, 60, 5, 80, 30)
    stack.loop.add([make_request(random_prompt(seed, length), max_tokens=30) for seed, length in enumerate(lengths)])
    while stack.loop.has_requests():
        *prompts, verification = stack.positions_of(stack.step)
        assert sum(prompts) <= 48
        assert verification <= 48


def test_prompts_are_read_in_the_order_of_arrival() -> None:
    stack = make_stack(LANGUAGE, num_slots=4, max_num_tokens=32)
    (running,) = decoding(stack)
    prompts = [make_request(random_prompt(seed, 90), max_tokens=2) for seed in range(3)]
    stack.loop.add(prompts)
    while not all(request.is_finished for request in prompts):
        stack.step()
        progress = [request.num_cached if request.slot >= 0 else 1000 for request in prompts]
        assert progress == sorted(progress, reverse=True)
    assert not running.is_finished


def test_a_prompt_is_read_further_even_when_decoding_takes_the_whole_budget() -> None:
    stack = make_stack(LANGUAGE, make_drafter("draft_model", LANGUAGE), num_slots=4, max_num_tokens=4)
    decoding(stack, 3)
    request = make_request(random_prompt(0, 30), max_tokens=3)
    stack.loop.add([request])
    for _ in range(100):
        stack.step()
    assert request.output_token_ids == greedy(LANGUAGE, request.prompt_token_ids, 3)


def test_the_budget_that_one_prompt_leaves_goes_to_the_next() -> None:
    stack = make_stack(LANGUAGE, num_slots=3, max_num_tokens=64)
    requests = [make_request(random_prompt(seed, 30), max_tokens=4) for seed in range(3)]
    stack.loop.add(requests)
    stack.step()
    assert [len(request.output_token_ids) for request in requests] == [1, 1, 0]
    assert requests[2].num_cached == 0, "four tokens are left: too few for a step of their own"


def test_the_first_token_is_not_kept_back_for_the_second_step() -> None:
    stack = make_stack(LANGUAGE, make_drafter("draft_model", LANGUAGE), num_slots=1)
    request = make_request(random_prompt(0, 30), max_tokens=40)
    stack.loop.add([request])
    stack.step()
    assert request.metrics.num_spec_steps == 1
    assert stack.target.num_runs == 1


@pytest.mark.parametrize("drafter", [name for name in DRAFTERS if name != "alignment"])  # which wants to hear it all
def test_of_a_prompt_no_more_is_heard_than_what_is_verified(drafter: str) -> None:
    """One position of a chunk, and of the last one what its drafts need."""
    stack = make_stack(LANGUAGE, make_drafter(drafter, LANGUAGE), num_slots=1, max_num_tokens=48)
    request = make_request(random_prompt(0, 190), max_tokens=30)
    stack.run(request)
    assert [tokens for _, _, tokens in stack.target.shapes[:3]] == [48] * 3
    assert stack.target.num_positions[:3] == [1] * 3
    assert max(stack.target.num_positions) <= stack.target.info.max_draft_len + 1
    assert request.output_token_ids == greedy(LANGUAGE, request.prompt_token_ids, 30)


def test_a_prompt_that_is_sampled_after_is_read_in_one_step_with_the_logits_of_its_last_token() -> None:
    logits = spread_logits(1)
    stack = make_stack(most_probable(logits), num_slots=1, max_num_tokens=200, logits=logits)
    stack.run(make_request(random_prompt(0, 150), max_tokens=1, temperature=0.5, seed=1))
    assert stack.target.shapes == [(0, 1, 150)]
    assert stack.target.logits_shapes == [(1, 1)]


@pytest.mark.parametrize("length", [1, 2, MAX_LOGITS_CHUNK, MAX_LOGITS_CHUNK + 1, 150])
@pytest.mark.parametrize("drafter", ["none", "ngram"])
@pytest.mark.parametrize("num_others", [0, 2])
def test_every_prompt_token_but_the_first_has_a_logprob(length: int, drafter: str, num_others: int) -> None:
    logits = spread_logits(1)
    language = most_probable(logits)
    stack = make_stack(language, make_drafter(drafter, language), num_slots=3, max_num_tokens=100, logits=logits)
    if num_others:
        decoding(stack, num_others, ignore_eos=True)
    prompt = random_prompt(0, length)
    request = make_request(prompt, max_tokens=2, prompt_logprobs=1)
    stack.loop.add([request])
    while not request.is_finished:
        stack.step()
    first, *others = request.prompt_logprobs
    assert first is None
    assert len(others) == length - 1
    for position, (token, entries) in enumerate(zip(prompt[1:], others, strict=True), start=1):
        scores = logits(tuple(prompt[:position])).astype(float)
        assert entries[token].logprob == pytest.approx(scores[token] - np.logaddexp.reduce(scores), abs=1e-4)
        assert entries[int(scores.argmax())].rank == 1
