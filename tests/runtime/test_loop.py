"""The generation loop on table engines: what it emits, when it ends, and what it counts."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from fly_trt.drafting import Drafter, Lookup, ModelDrafter, NgramDrafter
from fly_trt.engines.base import EXACT, AcceptancePolicy
from fly_trt.params import SamplingParams
from fly_trt.runtime.loop import GenerationLoop
from fly_trt.runtime.request import Request, RequestState
from fly_trt.sequence import TokenSequence
from fly_trt.tokenizer import Detokenizer
from fly_trt.verification import PRESETS
from table_engine import STOP_TOKEN, VOCAB_SIZE, NextToken, TableEngine, greedy, hashed

PROMPT = [3, 4, 5, 3, 4]
NUM_DRAFT_TOKENS = 15


def letters() -> Tokenizer:
    """Token i is one character, so that text shows tokens."""
    tokenizer = Tokenizer(models.WordLevel({chr(ord("A") + i): i for i in range(VOCAB_SIZE)}, unk_token="A"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def text_of(tokens: list[int]) -> str:
    return "".join(chr(ord("A") + token) for token in tokens)


def make_request(
    prompt: list[int] = PROMPT,
    *,
    policy: AcceptancePolicy = EXACT,
    max_tokens: int = 40,
    stop: tuple[str, ...] = (),
    stop_token_ids: frozenset[int] = frozenset(),
) -> Request:
    return Request(
        request_id="0",
        prompt=None,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens),
        policy=policy,
        max_tokens=max_tokens,
        end_token_ids=stop_token_ids | {STOP_TOKEN},
        stop_token_ids=stop_token_ids,
        detokenizer=Detokenizer(letters(), prompt, stop_strings=stop),
        sequence=TokenSequence(prompt),
    )


@dataclass
class Stack:
    """A loop and its engines."""

    target: TableEngine
    loop: GenerationLoop

    def run(self, *requests: Request) -> None:
        for request in requests:
            self.loop.add(request)
        while self.loop.has_requests():
            self.loop.step()


def make_stack(target: NextToken, drafter: Drafter | None = None, **engine_settings: object) -> Stack:
    engine = TableEngine(target, **engine_settings)
    return Stack(engine, GenerationLoop(engine, drafter, NUM_DRAFT_TOKENS, num_slots=1))


def sometimes_differs(target: NextToken, salt: int, out_of: int = 5) -> NextToken:
    """A draft model that agrees with the target but at one prefix in `out_of`."""

    def draft(tokens: tuple[int, ...]) -> int:
        token = target(tokens)
        return token if hash((salt, tokens)) % out_of else 2 + (token - 1) % (VOCAB_SIZE - 2)

    return draft


def drafters(target: NextToken, salt: int = 0) -> dict[str, Drafter | None]:
    draft = sometimes_differs(target, salt)
    return {
        "none": None,
        "ngram": NgramDrafter(4, 1),
        "draft_model": ModelDrafter(TableEngine(draft), VOCAB_SIZE),
        "multi_level": ModelDrafter(TableEngine(draft), VOCAB_SIZE, Lookup(4, 1, 6)),
    }


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


@given(salt=st.integers(0, 1000), max_tokens=st.integers(1, 40))
def test_fewer_tokens_are_a_prefix_of_more_tokens_also_when_loose(salt: int, max_tokens: int) -> None:
    language = hashed(12, salt)
    outputs = []
    for limit in (max_tokens, 40):
        request = make_request(policy=PRESETS["reference"], max_tokens=limit)
        drafter = drafters(language, salt)["multi_level"]
        make_stack(language, drafter, entropy=lambda tokens: 1.0).run(request)
        outputs.append(request.output_token_ids)
    assert len(outputs[0]) == max_tokens
    assert outputs[1][:max_tokens] == outputs[0]


def loose_request(**settings: object) -> tuple[Request, Stack]:
    """A request whose draft differs once, at the fourth token, where the target is uncertain."""
    language = lambda tokens: 2 + (len(tokens) * 3) % 20  # noqa: E731
    differs_at = len(PROMPT) + 3
    draft = lambda tokens: 25 if len(tokens) == differs_at else language(tokens)  # noqa: E731
    request = make_request(policy=PRESETS["reference"], **settings)
    stack = make_stack(language, ModelDrafter(TableEngine(draft), VOCAB_SIZE), entropy=lambda tokens: 1.0)
    return request, stack


def test_a_loosened_token_is_emitted_and_counted() -> None:
    request, stack = loose_request(max_tokens=16)
    stack.run(request)
    assert request.output_token_ids[3] == 25
    metrics = request.metrics
    assert (metrics.num_loosened_tokens, metrics.num_accepted_tokens, metrics.num_spec_steps) == (1, 15, 1)
    assert metrics.acceptance_histogram == [0] * 15 + [1]
    assert metrics.mean_acceptance_length == 16


def test_tokens_beyond_the_end_are_not_counted() -> None:
    request, stack = loose_request(max_tokens=3)
    stack.run(request)
    metrics = request.metrics
    assert (metrics.num_output_tokens, metrics.num_accepted_tokens, metrics.num_loosened_tokens) == (3, 3, 0)


def test_a_requests_own_stop_token_is_not_loosened_either() -> None:
    request, stack = loose_request(max_tokens=16, stop_token_ids=frozenset({25}))
    stack.run(request)
    assert request.output_token_ids[3] != 25
    assert request.metrics.num_loosened_tokens == 0


def test_nothing_is_emitted_after_an_accepted_end_of_sequence() -> None:
    language = lambda tokens: STOP_TOKEN if len(tokens) == 9 else 2 + len(tokens) % 20  # noqa: E731
    request = make_request()
    make_stack(language, ModelDrafter(TableEngine(language), VOCAB_SIZE)).run(request)
    assert request.output_token_ids == [7, 8, 9, 10, STOP_TOKEN]
    assert (request.finish_reason, request.stop_reason) == ("stop", None)
    assert request.metrics.num_accepted_tokens == 5


def test_a_stop_string_ends_the_text_before_it_wherever_a_round_ends() -> None:
    language = lambda tokens: 2 + len(tokens) % 20  # noqa: E731
    plain = greedy(language, PROMPT, 40)
    stop = text_of(plain[6:9])
    for name, drafter in drafters(language).items():
        request = make_request(stop=("ZZZ", stop))
        make_stack(language, drafter).run(request)
        assert request.output().outputs[0].text == text_of(plain[:6]), name
        assert request.output_token_ids == plain[:9], name
        assert (request.finish_reason, request.stop_reason) == ("stop", stop)


def test_a_long_prompt_is_prefilled_in_chunks_and_the_last_one_carries_drafts() -> None:
    language = hashed(8, 3)
    prompt = [2 + i % 6 for i in range(40)]
    request = make_request(prompt, max_tokens=1)
    stack = make_stack(language, NgramDrafter(4, 1), max_num_tokens=NUM_DRAFT_TOKENS + 16)
    stack.run(request)
    assert stack.target.num_runs == 3
    assert request.output_token_ids == greedy(language, prompt, 1)
    assert request.metrics.num_draft_tokens > 0


def test_requests_are_served_in_the_order_of_arrival_and_do_not_disturb_each_other() -> None:
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
    for request in (first, waiting, last):
        stack.loop.add(request)
    for _ in range(5):
        stack.loop.step()
    stack.loop.abort(first)
    stack.loop.abort(waiting)
    stack.loop.abort(first)
    stack.run()
    assert (first.finish_reason, first.output_token_ids) == ("abort", greedy(language, PROMPT, 5))
    assert (waiting.finish_reason, waiting.output_token_ids) == ("abort", [])
    assert (last.finish_reason, last.output_token_ids) == ("length", greedy(language, PROMPT, 30))
    assert last.state is RequestState.FINISHED


@pytest.mark.parametrize("length", [0, 511, 512, 513, 2000])
def test_a_sequence_holds_what_was_appended(length: int) -> None:
    sequence = TokenSequence([1, 2])
    sequence.append(np.arange(length))
    assert sequence.tokens.tolist() == [1, 2, *range(length)]
    sequence.truncate(1)
    sequence.append(np.array([9]))
    assert sequence.tokens.tolist() == [1, 9]
