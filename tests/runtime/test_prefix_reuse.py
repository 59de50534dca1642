"""A prompt that begins like a kept or a running sequence starts from its cache."""

import pytest

from fly_trt.runtime.request import Request
from fly_trt.runtime.slots import MIN_PREFIX_TOKENS
from fly_trt.verification import PRESETS
from loop_stack import Stack, make_drafter, make_request, make_stack, random_prompt
from table_engine import greedy, hashed

LANGUAGE = hashed(20, 3)


def answered(stack: Stack, prompt: list[int], **params: object) -> Request:
    """Serves one prompt to the end."""
    request = make_request(prompt, **({"max_tokens": 8} | params))
    stack.run(request)
    assert request.output_token_ids == greedy(LANGUAGE, prompt, request.max_tokens)
    return request


def conversation(request: Request, tail: list[int]) -> list[int]:
    """The next turn of a conversation: all that was said and something new."""
    return [*request.prompt_token_ids, *request.output_token_ids, *tail]


def test_a_finished_requests_cache_serves_the_next_turn() -> None:
    stack = make_stack(LANGUAGE)
    first = answered(stack, random_prompt(0, 30))
    prompt = conversation(first, [5, 6])
    positions = stack.positions_of(lambda: answered(stack, prompt))
    assert positions == [3, *[1] * 7], "the last output token was never fed; it and the two new ones are"
    assert (stack.counted("prefix_cache_queries_total"), stack.counted("prefix_cache_hits_total")) == (70, 37)
    assert stack.target.copies == []


def test_the_same_prompt_again_computes_its_last_token_only() -> None:
    stack = make_stack(LANGUAGE)
    answered(stack, random_prompt(0, 30))
    again = []
    positions = stack.positions_of(lambda: again.append(answered(stack, random_prompt(0, 30))))
    assert positions == [1] * 8
    assert again[0].num_prefix_hits == 29


def test_a_running_sequence_lends_its_prefix_by_copy() -> None:
    stack = make_stack(LANGUAGE, num_slots=2)
    prompt = random_prompt(1, 40)
    running = make_request(prompt, max_tokens=30)
    stack.loop.add([running])
    stack.step(3)
    second = make_request([*prompt[:25], 2, 2, 2], max_tokens=5)
    stack.run(second)
    assert stack.target.copies == [(0, 1, 25)]
    assert second.num_prefix_hits == 25
    assert second.output_token_ids == greedy(LANGUAGE, second.prompt_token_ids, 5)
    assert running.output_token_ids == greedy(LANGUAGE, prompt, 30)


def test_several_sequences_of_one_prompt_compute_it_once() -> None:
    stack = make_stack(LANGUAGE, num_slots=3, max_num_tokens=128)
    requests = [make_request(random_prompt(1, 40), max_tokens=1, index=i) for i in range(3)]
    positions = stack.positions_of(lambda: stack.run(*requests))
    assert sum(positions) == 40 + 1 + 1
    assert [request.num_prefix_hits for request in requests] == [0, 39, 39]


def test_a_prompt_in_chunks_is_lent_as_far_as_it_is_computed() -> None:
    stack = make_stack(LANGUAGE, num_slots=2, max_num_tokens=32)
    prompt = random_prompt(1, 100)
    first, second = make_request(prompt, max_tokens=2), make_request(prompt, max_tokens=2)
    stack.run(first, second)
    assert second.num_prefix_hits >= 64
    assert first.output_token_ids == second.output_token_ids == greedy(LANGUAGE, prompt, 2)


@pytest.mark.parametrize("drafter", ["none", "draft_model", "multi_level"])
def test_switched_off_nothing_is_kept_or_copied(drafter: str) -> None:
    stack = make_stack(LANGUAGE, make_drafter(drafter, LANGUAGE), num_slots=2, prefix_caching=False)
    prompt = random_prompt(0, 30)
    requests = [make_request(prompt, max_tokens=n) for n in (9, 5, 5)]
    stack.run(*requests)
    assert [request.num_prefix_hits for request in requests] == [0, 0, 0]
    assert stack.target.copies == []
    assert all(len(slot.kept) == 0 for slot in stack.loop.scheduler.slots.table)


def test_conversations_in_turn_all_keep_their_caches() -> None:
    stack = make_stack(LANGUAGE, num_slots=3)
    talks = [answered(stack, random_prompt(seed, 30)) for seed in range(3)]
    for turn in range(1, 4):
        for index, last in enumerate(talks):
            talks[index] = answered(stack, conversation(last, [index + 3, turn + 2]))
            assert talks[index].num_prefix_hits == len(last.prompt_token_ids) + len(last.output_token_ids) - 1


def test_the_cache_that_was_free_the_longest_goes_first() -> None:
    stack = make_stack(LANGUAGE, num_slots=2)
    old, recent = (answered(stack, random_prompt(seed, 30)) for seed in range(2))
    answered(stack, random_prompt(2, 30))
    assert answered(stack, conversation(recent, [4])).num_prefix_hits > 0
    assert answered(stack, conversation(old, [4])).num_prefix_hits == 0


def test_a_kept_cache_survives_that_others_close_the_gap() -> None:
    stack = make_stack(LANGUAGE, num_slots=3)
    short, *others = (make_request(random_prompt(seed, 30), max_tokens=n) for seed, n in enumerate((3, 20, 20)))
    stack.loop.add([short, *others])
    while not short.is_finished:
        stack.step()
    stack.step()
    assert len(stack.target.swaps) == 1
    again = make_request(conversation(short, [4, 5]), max_tokens=3)
    stack.run(again)
    assert again.num_prefix_hits == 32
    for request in (again, *others):
        assert request.output_token_ids == greedy(LANGUAGE, request.prompt_token_ids, request.max_tokens)


def test_a_short_common_beginning_does_not_cost_a_long_kept_cache() -> None:
    stack = make_stack(LANGUAGE, num_slots=2)
    long = answered(stack, random_prompt(0, 80))
    answered(stack, [*random_prompt(0, 80)[:20], 2, 2, 2])
    assert answered(stack, conversation(long, [3])).num_prefix_hits == 87


def test_a_beginning_shorter_than_worth_a_copy_is_computed_anew() -> None:
    stack = make_stack(LANGUAGE, num_slots=2)
    prompt = random_prompt(0, MIN_PREFIX_TOKENS - 1)
    requests = [make_request([*prompt, tail], max_tokens=5) for tail in (3, 4)]
    stack.run(*requests)
    assert [request.num_prefix_hits for request in requests] == [0, 0]
    assert answered(stack, [*prompt, 5]).num_prefix_hits == 0


def test_a_prompt_whose_logprobs_are_wanted_is_always_computed() -> None:
    stack = make_stack(LANGUAGE, num_slots=2)
    prompt = random_prompt(0, 30)
    answered(stack, prompt)
    request = answered(stack, prompt, prompt_logprobs=0)
    assert request.num_prefix_hits == 0
    assert len(request.prompt_logprobs) == 30


def test_what_an_aborted_request_computed_is_kept_too() -> None:
    stack = make_stack(LANGUAGE, max_num_tokens=32)
    prompt = random_prompt(0, 100)
    aborted = make_request(prompt)
    stack.loop.add([aborted])
    stack.step(2)
    stack.loop.abort(aborted)
    stack.check()
    assert answered(stack, prompt).num_prefix_hits >= 64


@pytest.mark.parametrize("trim_block", [1, 16])
def test_an_engine_that_shrinks_forgets_long_caches_and_no_running_ones(trim_block: int) -> None:
    stack = make_stack(LANGUAGE, num_slots=2, trim_block=trim_block)
    long = answered(stack, random_prompt(0, 90))
    answered(stack, random_prompt(1, 20), max_tokens=3)
    held = -(-22 // trim_block) * trim_block
    assert max(map(len, stack.target.slots)) <= held
    assert answered(stack, conversation(long, [3])).num_prefix_hits == held


def test_an_idle_engine_is_never_asked_to_shrink_to_nothing() -> None:
    for prefix_caching in (False, True):
        stack = make_stack(LANGUAGE, num_slots=2, prefix_caching=prefix_caching)
        stack.run(make_request(max_tokens=3), make_request(max_tokens=5))
        assert min(stack.target.trims) >= 1


def test_a_round_that_is_ahead_of_its_sequence_survives_the_end_of_another() -> None:
    language = lambda tokens: 2 + (len(tokens) * 3) % 20  # noqa: E731
    draft = lambda tokens: 25 if len(tokens) == 33 else language(tokens)  # noqa: E731
    outputs = []
    for other_tokens in range(1, 9):
        stack = make_stack(
            language,
            make_drafter("draft_model", draft),
            num_slots=2,
            entropy=lambda tokens: 1.0,
            draft_lengths=[1],
            trim_block=1,
        )
        request = make_request(random_prompt(1, 30), policy=PRESETS["reference"], max_tokens=20)
        stack.run(request, make_request([5], max_tokens=other_tokens))
        outputs.append(request.output_token_ids)
    assert outputs[0][3] == 25
    assert all(output == outputs[0] for output in outputs)
