"""Who runs when, and in which slot: first come, first served, in a bounded queue, over a contiguous range of slots."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.errors import QueueFullError
from fly_trt.runtime.request import Request, RequestState
from fly_trt.verification import PRESETS
from loop_stack import DRAFTERS, Stack, make_drafter, make_request, make_stack, random_prompt
from table_engine import greedy, hashed, sometimes_differs, sometimes_uncertain

LANGUAGE = hashed(12, 3)


def requests_of(*lengths: int) -> list[Request]:
    """One request for each number of output tokens, with prompts that share nothing."""
    return [
        make_request(random_prompt(i, 20), max_tokens=length, request_id=str(i)) for i, length in enumerate(lengths)
    ]


def active_slots(stack: Stack) -> list[int]:
    return [request.slot for request in stack.loop.scheduler.running]


@examples(30)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=8), num_slots=st.integers(1, 4))
def test_requests_are_admitted_in_the_order_of_arrival(lengths: list[int], num_slots: int) -> None:
    stack = make_stack(LANGUAGE, num_slots=num_slots)
    requests = requests_of(*lengths)
    stack.loop.add(requests)
    while stack.loop.has_requests():
        stack.step()
        waits = [request.is_waiting for request in requests]
        assert waits == sorted(waits), "nobody overtakes"
        assert len(stack.loop.scheduler.running) <= num_slots
    for request in requests:
        assert request.output_token_ids == greedy(LANGUAGE, request.prompt_token_ids, request.max_tokens)


def test_a_request_joins_as_soon_as_a_slot_is_free_while_the_others_go_on() -> None:
    stack = make_stack(LANGUAGE, num_slots=2)
    long, short, third = requests_of(12, 3, 3)
    stack.loop.add([long, short, third])
    while not short.is_finished:
        stack.step()
    assert third.is_waiting
    stack.step()
    assert third.state is RequestState.DECODE
    assert not long.is_finished


def test_a_slot_that_a_one_token_request_leaves_is_taken_within_the_same_step() -> None:
    stack = make_stack(LANGUAGE, num_slots=2)
    stack.loop.add(requests_of(9, 1, 1, 1))
    stack.step()
    assert len(stack.loop.scheduler.waiting) < 2


def test_a_full_queue_names_its_size_and_what_to_do() -> None:
    stack = make_stack(LANGUAGE, num_slots=1, max_queue_size=3)
    stack.loop.add(requests_of(5, 5))
    with pytest.raises(
        QueueFullError, match=r"2 requests wait and max_queue_size is 3: try again later, or .* larger max_queue_size"
    ):
        stack.loop.add(requests_of(5, 5))


def test_all_sequences_of_a_prompt_are_queued_or_none() -> None:
    stack = make_stack(LANGUAGE, num_slots=1, max_queue_size=3)
    first, second = requests_of(2, 2), requests_of(2, 2)
    stack.loop.add(first)
    with pytest.raises(QueueFullError):
        stack.loop.add(second)
    assert list(stack.loop.scheduler.waiting) == first
    stack.step()
    stack.loop.add(second)
    stack.run()
    assert all(request.is_finished for request in first + second)


def test_an_aborted_request_leaves_its_place_in_the_queue_to_others() -> None:
    stack = make_stack(LANGUAGE, num_slots=1, max_queue_size=2)
    first, second = requests_of(2, 2)
    stack.loop.add([first, second])
    stack.loop.abort(first)
    (third,) = requests_of(2)
    stack.loop.add([third])
    stack.run()
    assert (first.finish_reason, second.finish_reason, third.finish_reason) == ("abort", "length", "length")


def test_the_last_sequence_moves_into_a_gap_with_one_exchange_of_caches() -> None:
    stack = make_stack(LANGUAGE, num_slots=4)
    first, *others = requests_of(3, 30, 30, 30)
    stack.loop.add([first, *others])
    while not first.is_finished:
        stack.step()
    assert stack.target.swaps == []
    stack.step()
    assert [slots for *slots, _ in stack.target.swaps] == [[0, 3]]
    assert others[-1].slot == 0
    assert active_slots(stack) == [0, 1, 2]
    stack.step(3)
    assert len(stack.target.swaps) == 1


def test_no_cache_moves_when_the_last_slot_becomes_free() -> None:
    stack = make_stack(LANGUAGE, num_slots=3)
    stack.run(*requests_of(9, 6, 3))
    assert stack.target.swaps == []


def test_no_cache_moves_when_a_waiting_request_fills_the_gap() -> None:
    stack = make_stack(LANGUAGE, num_slots=3)
    first, second, third, waiting = requests_of(3, 12, 12, 12)
    stack.loop.add([first, second, third, waiting])
    while not first.is_finished:
        stack.step()
    stack.step()
    assert waiting.slot == 0
    assert stack.target.swaps == []


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_sequence_that_moves_goes_on_as_if_it_had_not(drafter: str) -> None:
    def serve(*requests: Request, num_slots: int) -> Stack:
        draft = make_drafter(drafter, sometimes_differs(LANGUAGE, 1))
        stack = make_stack(LANGUAGE, draft, num_slots=num_slots, max_num_tokens=256, entropy=sometimes_uncertain(1))
        stack.run(*requests)
        return stack

    policy = PRESETS["reference"]
    prompts = [random_prompt(seed, 20) for seed in range(4)]
    together = [
        make_request(prompt, policy=policy, max_tokens=n) for prompt, n in zip(prompts, (3, 30, 20, 40), strict=True)
    ]
    assert serve(*together, num_slots=4).target.swaps
    for request in together:
        alone = make_request(request.prompt_token_ids, policy=policy, max_tokens=request.max_tokens)
        serve(alone, num_slots=1)
        assert request.output_token_ids == alone.output_token_ids
        assert request.metrics.acceptance_histogram == alone.metrics.acceptance_histogram


@pytest.mark.parametrize("drafter", ["none", "ngram", "multi_level"])
def test_a_step_has_one_row_for_each_decoding_request_and_no_idle_ones(drafter: str) -> None:
    stack = make_stack(
        LANGUAGE, make_drafter(drafter, LANGUAGE), num_slots=4, max_num_tokens=128, draft_lengths=[3, 0, 7]
    )
    stack.loop.add(requests_of(50, 31, 42, 3))
    stack.step()
    while stack.loop.has_requests():
        stack.loop.scheduler.schedule()
        num_running = len(stack.loop.scheduler.running)
        before = stack.target.num_runs
        stack.step()
        ((first_slot, num_rows, _),) = stack.target.shapes[before:]
        assert (first_slot, num_rows) == (0, num_running)


def test_an_aborted_request_frees_its_slot_whatever_it_was_doing() -> None:
    for num_steps in range(8):
        stack = make_stack(
            LANGUAGE,
            make_drafter("draft_model", LANGUAGE),
            num_slots=2,
            max_num_tokens=20,
            draft_lengths=[2],
            entropy=lambda tokens: 1.0,
        )
        aborted = make_request(random_prompt(5, 60), policy=PRESETS["reference"], request_id="aborted")
        other = make_request(random_prompt(6, 50), policy=PRESETS["reference"], max_tokens=20)
        stack.loop.add([aborted, other])
        stack.step(num_steps)
        stack.loop.abort(aborted)
        stack.check()
        assert aborted.slot == -1
        stack.run()
        assert (aborted.finish_reason, other.finish_reason) == ("abort", "length")
        assert other.output_token_ids == greedy(LANGUAGE, other.prompt_token_ids, 20)


def test_the_gauges_follow_the_requests_also_after_an_abort() -> None:
    stack = make_stack(LANGUAGE, num_slots=1, max_seq_len=50)  # of 256 that it was built for
    running, waiting = requests_of(9, 9)
    stack.loop.add([running, waiting])
    stack.step()
    assert (stack.counted("num_requests_running"), stack.counted("num_requests_waiting")) == (1, 1)
    assert stack.counted("kv_cache_usage_perc") == running.num_cached / 50
    stack.loop.abort(waiting)
    stack.loop.abort(running)
    assert (stack.counted("num_requests_running"), stack.counted("num_requests_waiting")) == (0, 0)
    assert stack.counted("kv_cache_usage_perc") == 0
    assert stack.counted('request_success_total{finished_reason="abort"}') == 2
