"""One request in the generation loop: what it emits, when it ends, and what is counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.drafting import ModelDrafter, NgramDrafter
from fly_trt.errors import EngineError
from fly_trt.runtime.request import Request, RequestState
from fly_trt.tokens import TokenSequence
from fly_trt.verification import EXACT, PRESETS, AcceptancePolicy
from loop_stack import (
    DRAFTERS,
    NUM_DRAFT_TOKENS,
    PROMPT,
    Stack,
    drafters,
    make_drafter,
    make_request,
    make_stack,
    random_prompt,
    text_of,
)
from table_engine import (
    STOP_TOKEN,
    VOCAB_SIZE,
    TableEngine,
    greedy,
    hashed,
    sometimes_differs,
    sometimes_uncertain,
)


@examples(40)
@given(
    salt=st.integers(0, 1000),
    vocabulary=st.integers(3, 12),
    prompt=st.lists(st.integers(2, 9), min_size=1, max_size=40),
)
def test_exact_speculation_emits_what_plain_decoding_emits(salt: int, vocabulary: int, prompt: list[int]) -> None:
    language = hashed(vocabulary, salt)
    want = greedy(language, prompt, 40)
    for name, drafter in drafters(language, salt).items():
        request = make_request(prompt)
        make_stack(language, drafter).run(request)
        assert request.output_token_ids == want, name
        assert (request.finish_reason, request.stop_reason) == ("length", None)


@examples(40)
@given(salt=st.integers(0, 1000), max_tokens=st.integers(1, 40))
def test_fewer_tokens_are_a_prefix_of_more_tokens_also_when_loose(salt: int, max_tokens: int) -> None:
    language = hashed(12, salt)
    outputs = []
    for limit in (max_tokens, 40):
        request = make_request(policy=PRESETS["reference"], max_tokens=limit)
        drafter = make_drafter("multi_level", sometimes_differs(language, salt))
        make_stack(language, drafter, entropy=lambda tokens: 1.0).run(request)
        outputs.append(request.output_token_ids)
    assert len(outputs[0]) == max_tokens
    assert outputs[1][:max_tokens] == outputs[0]


def loose_request(*, draft_lengths: tuple[int, ...] = (), **params: object) -> tuple[Request, Stack]:
    """A request whose draft differs once, at the fourth token, where the target is uncertain."""
    language = lambda tokens: 2 + (len(tokens) * 3) % 20  # noqa: E731
    differs_at = len(PROMPT) + 3
    draft = lambda tokens: 25 if len(tokens) == differs_at else language(tokens)  # noqa: E731
    request = make_request(policy=PRESETS["reference"], **params)
    drafter = ModelDrafter(TableEngine(draft), VOCAB_SIZE)
    return request, make_stack(language, drafter, entropy=lambda tokens: 1.0, draft_lengths=draft_lengths)


EVERY_CUT = [(), (0,), (1,), (2,), (5,), (0, 7), (3, 0, 1)]


@pytest.mark.parametrize("cut", EVERY_CUT)
def test_a_loosened_token_is_emitted_and_counted(cut: tuple[int, ...]) -> None:
    request, stack = loose_request(max_tokens=16, draft_lengths=cut)
    stack.run(request)
    assert request.output_token_ids[3] == 25
    metrics = request.metrics
    assert (metrics.num_loosened_tokens, metrics.num_accepted_tokens, metrics.num_spec_steps) == (1, 15, 1)
    assert metrics.acceptance_histogram == [0] * 15 + [1]
    assert metrics.mean_acceptance_length == 16


@pytest.mark.parametrize("cut", EVERY_CUT)
def test_tokens_beyond_the_end_are_not_counted(cut: tuple[int, ...]) -> None:
    request, stack = loose_request(max_tokens=3, draft_lengths=cut)
    stack.run(request)
    metrics = request.metrics
    assert (metrics.num_output_tokens, metrics.num_accepted_tokens, metrics.num_loosened_tokens) == (3, 3, 0)


@pytest.mark.parametrize("cut", EVERY_CUT)
def test_a_requests_own_stop_token_is_not_loosened_either(cut: tuple[int, ...]) -> None:
    request, stack = loose_request(max_tokens=16, stop_token_ids=[25], draft_lengths=cut)
    stack.run(request)
    assert request.output_token_ids[3] != 25
    assert request.metrics.num_loosened_tokens == 0


@pytest.mark.parametrize("cut", EVERY_CUT)
def test_nothing_is_emitted_after_an_accepted_end_of_sequence(cut: tuple[int, ...]) -> None:
    language = lambda tokens: STOP_TOKEN if len(tokens) == 9 else 2 + len(tokens) % 20  # noqa: E731
    for policy in (PRESETS["reference"], None):
        request = make_request(**({"policy": policy} if policy else {}))
        make_stack(language, ModelDrafter(TableEngine(language), VOCAB_SIZE), draft_lengths=cut).run(request)
        assert request.output_token_ids == [7, 8, 9, 10, STOP_TOKEN]
        assert (request.finish_reason, request.stop_reason) == ("stop", None)


def test_an_accepted_end_of_sequence_counts_as_accepted() -> None:
    language = lambda tokens: STOP_TOKEN if len(tokens) == 9 else 2 + len(tokens) % 20  # noqa: E731
    request = make_request()
    make_stack(language, ModelDrafter(TableEngine(language), VOCAB_SIZE)).run(request)
    assert request.metrics.num_accepted_tokens == 5


def test_a_stop_string_ends_the_text_before_it_wherever_a_round_ends() -> None:
    language = lambda tokens: 2 + len(tokens) % 20  # noqa: E731
    plain = greedy(language, PROMPT, 40)
    stop = text_of(plain[6:9])
    for name, drafter in drafters(language).items():
        request = make_request(stop=("ZZZ", stop))
        make_stack(language, drafter).run(request)
        assert request.completion().text == text_of(plain[:6]), name
        assert request.output_token_ids == plain[:9], name
        assert (request.finish_reason, request.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("min_tokens", [0, 8, 9, 10, 28, 29, 40])
def test_a_stop_string_counts_only_after_min_tokens(drafter: str, min_tokens: int) -> None:
    language = lambda tokens: 2 + len(tokens) % 20  # noqa: E731
    plain = greedy(language, PROMPT, 40)
    request = make_request(stop=text_of(plain[6:9]), min_tokens=min_tokens)
    make_stack(language, make_drafter(drafter, language)).run(request)
    length = next((end for end in (9, 29) if end > min_tokens), 40)
    assert request.output_token_ids == plain[:length]
    assert request.finish_reason == ("stop" if length < 40 else "length")


@examples(60)
@given(
    salt=st.integers(0, 1000),
    drafter=st.sampled_from(DRAFTERS[1:]),
    preset=st.sampled_from(sorted(PRESETS)),
    lengths=st.lists(st.integers(0, NUM_DRAFT_TOKENS), min_size=1, max_size=6),
    num_draft_tokens=st.integers(1, NUM_DRAFT_TOKENS),
)
def test_where_a_round_is_cut_changes_neither_tokens_nor_rounds(
    salt: int, drafter: str, preset: str, lengths: list[int], num_draft_tokens: int
) -> None:
    language = hashed(6, salt)
    outcomes = []
    for cut in ([], lengths):
        request = make_request(policy=PRESETS[preset])
        make_stack(
            language,
            make_drafter(drafter, sometimes_differs(language, salt, out_of=8)),
            num_draft_tokens=num_draft_tokens,
            draft_lengths=cut,
            entropy=sometimes_uncertain(salt),
        ).run(request)
        metrics = request.metrics
        outcomes.append(
            (
                request.output_token_ids,
                metrics.num_spec_steps,
                metrics.num_accepted_tokens,
                metrics.num_loosened_tokens,
                metrics.acceptance_histogram,
            )
        )
    assert outcomes[0] == outcomes[1]


def test_without_a_drafter_nothing_is_counted_as_speculation() -> None:
    request = make_request(max_tokens=10)
    make_stack(hashed(12, 1)).run(request)
    metrics = request.metrics
    assert (metrics.num_spec_steps, metrics.num_draft_tokens, metrics.mean_acceptance_length) == (0, 0, 0.0)


def test_the_last_chunk_of_a_lone_prompt_carries_drafts() -> None:
    language = hashed(8, 3)
    prompt = [2 + i % 6 for i in range(40)]
    request = make_request(prompt, max_tokens=1)
    stack = make_stack(language, NgramDrafter(4, 1), max_num_tokens=NUM_DRAFT_TOKENS + 16)
    stack.run(request)
    assert stack.target.num_runs == 2
    assert request.output_token_ids == greedy(language, prompt, 1)
    assert request.metrics.num_draft_tokens > 0


def test_requests_in_one_slot_are_served_in_turn_and_do_not_disturb_each_other() -> None:
    language = hashed(12, 9)
    prompts = [[3, 4, 5], [6, 7], [8, 9, 3, 4]]
    requests = [make_request(prompt, max_tokens=10) for prompt in prompts]
    make_stack(language, drafters(language)["multi_level"]).run(*requests)
    assert [r.output_token_ids for r in requests] == [greedy(language, prompt, 10) for prompt in prompts]
    assert sorted(r.metrics.time_to_first_token for r in requests) == [r.metrics.time_to_first_token for r in requests]


def test_an_aborted_request_keeps_what_it_emitted_and_frees_its_slot() -> None:
    language = hashed(12, 4)
    first, waiting, last = (make_request(max_tokens=30) for _ in range(3))
    stack = make_stack(language)
    stack.loop.add([first, waiting, last])
    for _ in range(5):
        stack.loop.step()
    stack.loop.abort(first)
    stack.loop.abort(waiting)
    stack.loop.abort(first)
    stack.run()
    emitted = len(first.output_token_ids)
    assert 5 <= emitted <= 6
    assert (first.finish_reason, first.output_token_ids) == ("abort", greedy(language, PROMPT, emitted))
    assert (waiting.finish_reason, waiting.output_token_ids) == ("abort", [])
    assert (last.finish_reason, last.output_token_ids) == ("length", greedy(language, PROMPT, 30))
    assert last.state is RequestState.FINISHED


def test_a_step_returns_the_requests_that_emitted_or_ended_and_no_others() -> None:
    language = hashed(12, 4)
    long, short = make_request(max_tokens=3), make_request(max_tokens=1)
    late = make_request()
    stack = make_stack(language, num_slots=2)
    stack.loop.add([long, short, late])
    seen = []
    while not long.is_finished:
        before = [len(r.output_token_ids) for r in (long, short, late)]
        changed = stack.loop.step()
        after = [len(r.output_token_ids) for r in (long, short, late)]
        assert changed
        emitted = [r for r, b, a in zip((long, short, late), before, after, strict=True) if a > b]
        assert set(map(id, changed)) == set(map(id, emitted))
        seen += changed
    assert short in seen


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_step_in_which_the_engine_prepares_itself_is_not_measured(drafter: str) -> None:
    """Compiling kernels or capturing a graph takes long once; measured, it would stop speculation for long."""
    language = hashed(12, 4)
    stack = make_stack(language, make_drafter(drafter, language), num_slots=2)
    stack.run(make_request([7, 8, 9]), make_request(random_prompt(0, 30)))
    shapes = stack.target.shapes
    assert len(set(shapes)) > 2
    assert stack.loop.speculation.draft_length.target_cost.num_observed == len(shapes) - len(set(shapes))


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_warming_up_measures_small_and_full_steps_and_changes_no_result(drafter: str, num_slots: int) -> None:
    language = hashed(12, 4)
    stack = make_stack(language, make_drafter(drafter, language), num_slots=num_slots, max_num_tokens=64)
    stack.loop.warm_up()
    stack.check()
    measured = {rows * tokens for _, rows, tokens in stack.target.shapes}
    full = NUM_DRAFT_TOKENS + 1 if drafter != "none" else 1
    assert {1, num_slots, full, num_slots * full} <= measured
    assert len(stack.loop.speculation.draft_length.target_cost) > 0
    request = make_request(random_prompt(0, 30))
    stack.run(request)
    assert request.output_token_ids == greedy(language, request.prompt_token_ids, 40)


def test_warming_up_takes_no_step_beyond_max_num_tokens() -> None:
    language = hashed(12, 4)
    stack = make_stack(language, make_drafter("draft_model", language), num_slots=4, max_num_tokens=20)
    stack.loop.warm_up()
    assert max(rows * tokens for _, rows, tokens in stack.target.shapes) <= 20


@pytest.mark.parametrize("length", [0, 511, 512, 513, 2000])
def test_a_sequence_holds_what_was_appended(length: int) -> None:
    sequence = TokenSequence([1, 2])
    sequence.append(np.arange(length))
    assert sequence.tokens.tolist() == [1, 2, *range(length)]
    sequence.truncate(1)
    sequence.append(np.array([9]))
    assert sequence.tokens.tolist() == [1, 9]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("policy", [EXACT, PRESETS["reference"]])
def test_a_target_whose_logits_are_not_numbers_ends_that_request_alone(drafter: str, policy: AcceptancePolicy) -> None:
    """The head gives NaN entropies there; the request keeps what it emitted before."""
    language = hashed(12, 3)
    broken = make_request(policy=policy, ignore_eos=True)
    other = make_request([7, 8, 9], ignore_eos=True, max_tokens=30)
    after = [*broken.prompt_token_ids, *greedy(language, broken.prompt_token_ids, 10)]

    def entropy(tokens: tuple[int, ...]) -> float:
        return float("nan") if list(tokens) == after else 0.0

    make_stack(language, make_drafter(drafter, language), entropy=entropy).run(other, broken)
    assert isinstance(broken.error, EngineError)
    assert "are not numbers: a float16 engine overflows where one of --dtype bfloat16" in str(broken.error)
    assert broken.finish_reason == "abort"
    assert broken.output_token_ids == after[len(broken.prompt_token_ids) :][: len(broken.output_token_ids)]
    assert other.error is None
    assert other.output_token_ids == greedy(language, [7, 8, 9], 30)
