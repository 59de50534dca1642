"""The engine thread: callers hand over requests and get their outputs."""

import threading
from itertools import chain, pairwise
from typing import Any

import pytest

from fly_trt.errors import FlyError, QueueFullError, RequestError
from fly_trt.outputs import RequestOutput
from fly_trt.params import RequestOutputKind
from fly_trt.runtime.loop import GenerationLoop
from fly_trt.runtime.thread import EngineThread
from loop_stack import random_prompt, text_of
from stepped_engine import DELTA, FINAL_ONLY, LANGUAGE, SECONDS, Inbox, SteppedEngine, is_over, make_group, make_loop
from table_engine import VOCAB_SIZE, greedy

# --- outputs ----------------------------------------------------------------------------------------------------------


def test_requests_of_several_threads_are_answered_completely_and_in_order(
    thread: EngineThread, engine: SteppedEngine
) -> None:
    wrong: list[str] = []

    def call(caller: int) -> None:
        try:
            for number in range(6):
                prompt = random_prompt(10 * caller + number, 5 + 7 * number)
                want = greedy(LANGUAGE, prompt, 12)
                kind = list(RequestOutputKind)[number % 3]
                inbox = Inbox()
                thread.submit([make_group(prompt, inbox, f"{caller}-{number}", kind, max_tokens=12)])
                outputs = inbox.all()
                parts = [output.outputs[0].token_ids for output in outputs]
                if kind is DELTA:
                    assert all(parts)
                    assert list(chain(*parts)) == want
                else:
                    assert parts[-1] == want
                    assert all(len(a) < len(b) and b[: len(a)] == a for a, b in pairwise(parts))
                assert len(parts) == 1 or kind is not FINAL_ONLY
                assert outputs[-1].outputs[0].finish_reason == "length"
                assert inbox.is_empty()
        except BaseException as error:
            wrong.append(f"{caller}: {error!r}")

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(SECONDS)
    assert wrong == []
    assert is_over(thread, engine)


def test_deltas_join_to_the_text_also_around_stop_strings(thread: EngineThread) -> None:
    prompt = [3, 4, 5]
    text = text_of(greedy(LANGUAGE, prompt, 40))
    for stop in ([text[7:10]], [text[3] + "?", text[9:15]], ["?"], []):
        inboxes = Inbox(), Inbox()
        for inbox, kind in zip(inboxes, (DELTA, FINAL_ONLY), strict=True):
            thread.submit([make_group(prompt, inbox, str(kind), kind, max_tokens=40, stop=stop)])
        deltas, (final,) = (inbox.all() for inbox in inboxes)
        assert "".join(output.outputs[0].text for output in deltas) == final.outputs[0].text
        assert deltas[-1].outputs[0].stop_reason == final.outputs[0].stop_reason


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_a_prompt_with_several_sequences_is_finished_when_all_are(
    thread: EngineThread, kind: RequestOutputKind
) -> None:
    inbox = Inbox()
    group = make_group([3, 4, 5], inbox, kind=kind, n=3, temperature=1.0, seed=4, max_tokens=9)
    for request, max_tokens in zip(group.requests, (3, 9, 5), strict=True):
        request.max_tokens = max_tokens
    thread.submit([group])
    outputs = inbox.all()
    counts = [0, 0, 0]
    for output in outputs:
        for completion in output.outputs:
            size = len(completion.token_ids)
            counts[completion.index] = size + (counts[completion.index] if kind is DELTA else 0)
    assert counts == [3, 9, 5]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].metrics.num_output_tokens == 17


# --- aborts -----------------------------------------------------------------------------------------------------------


def test_an_aborted_request_ends_with_what_it_has() -> None:
    engine = SteppedEngine(num_slots=2, is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    inboxes = [Inbox() for _ in range(3)]
    prompts = [random_prompt(seed, 5) for seed in range(3)]
    for number, (prompt, inbox) in enumerate(zip(prompts, inboxes, strict=True)):
        thread.submit([make_group(prompt, inbox, str(number), max_tokens=30)])
    engine.allow(4)
    seen = inboxes[0].next()
    assert not seen.finished
    thread.abort("0")
    thread.abort("2")
    engine.let_go()
    last, waiting = inboxes[0].all()[-1], inboxes[2].all()[-1]
    assert last.outputs[0].finish_reason == "abort"
    count = len(last.outputs[0].token_ids)
    assert 0 < count < 30
    assert last.outputs[0].token_ids == greedy(LANGUAGE, prompts[0], count)
    assert waiting.outputs[0].finish_reason in ("abort", "length")
    assert inboxes[1].all()[-1].outputs[0].token_ids == greedy(LANGUAGE, prompts[1], 30)
    assert is_over(thread, engine)
    assert all(inbox.is_empty() for inbox in inboxes)


def test_an_abort_takes_effect_within_one_step() -> None:
    engine = SteppedEngine(is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    inbox = Inbox()
    thread.submit([make_group([3, 4, 5], inbox, max_tokens=200)])
    engine.allow(3)
    for _ in range(4):
        assert engine.arrived.acquire(timeout=SECONDS)
    thread.abort("0")
    engine.allow(1)
    assert inbox.all()[-1].outputs[0].finish_reason == "abort"
    assert engine.num_runs == 4
    assert is_over(thread, engine)


def test_an_abort_ends_all_sequences_of_a_prompt(thread: EngineThread, engine: SteppedEngine) -> None:
    engine.is_free = False
    inbox = Inbox()
    thread.submit([make_group([3, 4, 5], inbox, n=2, temperature=1.0, ignore_eos=True, max_tokens=200)])
    engine.allow(4)
    inbox.next()
    thread.abort("0")
    engine.let_go()
    assert [completion.finish_reason for completion in inbox.all()[-1].outputs] == ["abort", "abort"]


def test_aborting_what_is_not_served_is_no_error(thread: EngineThread, engine: SteppedEngine) -> None:
    thread.abort("never heard of")
    inbox = Inbox()
    thread.submit([make_group([3, 4, 5], inbox, "a")])
    inbox.all()
    thread.abort("a")
    again = Inbox()
    thread.submit([make_group([3, 4, 5], again, "b")])
    assert again.all()[-1].outputs[0].finish_reason == "length"
    assert is_over(thread, engine)
    assert inbox.is_empty()


def test_an_abort_ends_no_later_request_of_the_same_id() -> None:
    """It comes in the last step of the first one, whose caller asks again as soon as it has its last output."""
    engine = SteppedEngine(num_slots=1, is_free=False)
    thread = EngineThread(make_loop(engine), engine.close)
    first, second = Inbox(), Inbox()
    group = make_group([3, 4, 5], first, "mine", max_tokens=1)
    put = group.sink

    def ask_again(output: RequestOutput | FlyError) -> None:
        put(output)
        thread.submit([make_group([6, 7], second, "mine")])

    group.sink = ask_again
    thread.submit([group])
    assert engine.arrived.acquire(timeout=SECONDS)
    thread.abort("mine")
    engine.let_go()
    assert first.all()[-1].outputs[0].finish_reason == "length"
    assert second.all()[-1].outputs[0].finish_reason == "length"
    thread.abort_group(group)
    third = Inbox()
    thread.submit([make_group([6, 7], third, "mine")])
    assert third.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [6, 7], 40)
    assert is_over(thread, engine)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_request_id_in_use_is_refused_and_free_again_afterwards(thread: EngineThread, engine: SteppedEngine) -> None:
    engine.is_free = False
    inbox, refused = Inbox(), Inbox()
    thread.submit([make_group([3, 4, 5], inbox, "mine")])
    with pytest.raises(RequestError, match="request_id 'mine': already in use: give each request its own"):
        thread.submit([make_group([3, 4, 5], refused, "mine")])
    engine.let_go()
    inbox.all()
    thread.submit([make_group([3, 4, 5], inbox, "mine")])
    inbox.all()
    assert refused.is_empty()


def test_two_requests_of_one_call_need_their_own_ids_too(thread: EngineThread) -> None:
    inbox = Inbox()
    with pytest.raises(RequestError, match="request_id 'same': already in use"):
        thread.submit([make_group([3, 4, 5], inbox, "same"), make_group([3, 4, 5], inbox, "same")])
    thread.submit([make_group([3, 4, 5], inbox, "same")])
    assert inbox.all()[-1].outputs[0].finish_reason == "length"


def test_a_full_queue_refuses_all_of_a_call_and_takes_it_later() -> None:
    engine = SteppedEngine(num_slots=1, is_free=False)
    thread = EngineThread(make_loop(engine, max_queue_size=2), engine.close)
    first, inboxes = Inbox(), [Inbox() for _ in range(3)]
    groups = [make_group([3, 4, 5], inbox, str(i), max_tokens=3) for i, inbox in enumerate(inboxes)]
    thread.submit([make_group([7, 8], first, "first", max_tokens=3)])
    assert engine.arrived.acquire(timeout=SECONDS)
    with pytest.raises(QueueFullError, match="0 requests wait and max_queue_size is 2"):
        thread.submit(groups)
    engine.let_go()
    first.all()
    thread.submit(groups[:2])
    assert [inbox.all()[-1].outputs[0].finish_reason for inbox in inboxes[:2]] == ["length", "length"]
    assert is_over(thread, engine)
    assert inboxes[2].is_empty()


def test_a_request_that_fails_fails_alone_with_all_its_sequences(thread: EngineThread, engine: SteppedEngine) -> None:
    failing, other = Inbox(), Inbox()
    impossible = make_group([3, 4, 5], failing, "failing", n=2, bad_word_ids=[[token] for token in range(VOCAB_SIZE)])
    thread.submit([impossible, make_group([6, 7], other, "other")])
    assert isinstance(failing.error(), RequestError)
    assert other.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [6, 7], 40)
    assert all(request.is_finished and request.slot == -1 for request in impossible.requests)
    assert is_over(thread, engine)
    assert failing.is_empty()


def test_a_request_may_come_in_the_middle_of_a_step() -> None:
    """The step admits it and emits its first token while its caller is still handing it over."""
    engine = SteppedEngine(num_slots=3, is_free=False)
    late = Inbox()
    outputs: list[RequestOutput] = []

    class Loop(GenerationLoop):
        def add(self, requests: list[Any]) -> None:
            super().add(requests)
            if requests[0].request_id == "late":
                engine.let_go()
                outputs.append(late.next())

    thread = EngineThread(make_loop(engine, Loop), engine.close)
    thread.submit([make_group([3, 4, 5], Inbox(), "running", max_tokens=200)])
    engine.allow(3)
    for _ in range(4):
        assert engine.arrived.acquire(timeout=SECONDS)
    pair = make_group(random_prompt(0, 40), Inbox(), "pair", n=2, temperature=1.0, max_tokens=200)
    pair.requests[0].max_tokens = 1  # it leaves its slot in the middle of the step, before the verification
    thread.submit([pair])
    engine.allow(1)
    assert engine.arrived.acquire(timeout=SECONDS)
    thread.submit([make_group([7], late, "late", max_tokens=9)])
    assert outputs[0].outputs[0].token_ids
    assert late.all()[-1].outputs[0].token_ids == greedy(LANGUAGE, [7], 9)
    assert is_over(thread, engine)
