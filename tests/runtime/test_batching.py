"""Any requests, arriving and ending at any time: each gets what it would get alone, and the loop's invariants hold."""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from examples import examples
from fly_trt.runtime.request import Request
from fly_trt.verification import EXACT, PRESETS, AcceptancePolicy
from loop_stack import DRAFTERS, SHORT_WINDOW, Stack, make_drafter, make_request, make_stack, random_prompt, text_of
from table_engine import greedy, most_probable, sometimes_differs, sometimes_uncertain, spread_logits

TEXTS = [random_prompt(seed, 60) for seed in range(2)]
ALONE = {"num_slots": 1, "max_num_tokens": 100, "draft_lengths": [], "adaptive_draft_length": False}
POLICIES = {"exact": EXACT, "short": SHORT_WINDOW, **PRESETS}
SAMPLING: list[dict[str, Any]] = [
    {},
    {},
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 6},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {3: 2.0}},
    {"bad_word_ids": [[3], [4, 5]], "min_tokens": 5},
    {"logprobs": 2},
    {"prompt_logprobs": 1},
]


@dataclass(frozen=True)
class Ask:
    """A request: the beginning of a text, tokens of its own, and what it wants."""

    text: int
    length: int
    tail: tuple[int, ...]
    policy: str
    params: dict[str, Any] = field(hash=False)

    @property
    def prompt(self) -> list[int]:
        return [*TEXTS[self.text][: self.length], *self.tail]

    def request(self, request_id: str = "alone") -> Request:
        policy: AcceptancePolicy = POLICIES[self.policy]
        return make_request(self.prompt, policy=policy, request_id=request_id, **self.params)


@dataclass(frozen=True)
class Abort:
    number: int


@dataclass(frozen=True)
class Steps:
    count: int


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    params: dict[str, Any] = dict(draw(st.sampled_from(SAMPLING)))
    params["max_tokens"] = draw(st.integers(max(1, params.get("min_tokens", 1)), 30))
    if draw(st.sampled_from([False, False, True])):
        params["stop_token_ids"] = [draw(st.integers(2, 9))]
    if draw(st.sampled_from([False, False, True])):
        params["stop"] = [text_of(draw(st.lists(st.integers(2, 9), min_size=1, max_size=3)))]
    params["ignore_eos"] = draw(st.booleans())
    params["num_speculative_tokens"] = draw(st.sampled_from([None, None, None, 0, 1, 4, 9]))
    return Ask(
        text=draw(st.integers(0, len(TEXTS) - 1)),
        length=draw(st.integers(0, len(TEXTS[0]))),
        tail=tuple(draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))),
        policy=draw(st.sampled_from(sorted(POLICIES))),
        params=params,
    )


operations = st.lists(
    st.one_of(asks(), asks(), st.builds(Steps, st.integers(1, 6)), st.builds(Abort, st.integers(0, 9))), max_size=14
)


@st.composite
def loops(draw: st.DrawFn) -> dict[str, Any]:
    """What a stack is made of; the language and the drafts come by `salt`."""
    num_slots = draw(st.integers(1, 4))
    num_draft_tokens = draw(st.sampled_from([1, 3, 8, 15]))
    return {
        "salt": draw(st.integers(0, 50)),
        "drafter": draw(st.sampled_from(DRAFTERS)),
        "num_slots": num_slots,
        "num_draft_tokens": num_draft_tokens,
        "max_num_tokens": draw(st.one_of(st.integers(num_slots, 12), st.integers(num_slots, 80))),
        "adaptive_draft_length": draw(st.booleans()),
        "prefix_caching": draw(st.booleans()),
        "draft_lengths": draw(st.lists(st.integers(0, num_draft_tokens), max_size=5)),
        "trim_block": draw(st.sampled_from([None, 1, 16])),
    }


def build(salt: int, drafter: str, num_slots: int, trim_block: int | None, **settings: Any) -> Stack:
    logits = spread_logits(salt)
    language = most_probable(logits)
    draft = make_drafter(drafter, sometimes_differs(language, salt, out_of=8), num_slots, trim_block=trim_block)
    return make_stack(
        language,
        draft,
        num_slots=num_slots,
        entropy=sometimes_uncertain(salt),
        logits=logits,
        trim_block=trim_block,
        **settings,
    )


def plain_decoding(salt: int, request: Request) -> list[int]:
    language = most_probable(spread_logits(salt))
    tokens = greedy(language, request.prompt_token_ids, request.max_tokens)
    ends = (i for i, token in enumerate(tokens, start=1) if token in request.end_token_ids)
    return tokens[: next(ends, None)]


def observed(request: Request) -> tuple:
    metrics = request.metrics
    rounds = (metrics.num_spec_steps, metrics.acceptance_histogram, metrics.num_loosened_tokens)
    return (
        request.output_token_ids,
        request.completion().text,
        request.finish_reason,
        request.stop_reason,
        request.logprobs,
        request.prompt_logprobs,
        rounds if request.policy.is_loose else None,
    )


@examples(120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(loops(), operations)
def test_whatever_arrives_and_leaves_each_request_gets_what_it_gets_alone(loop: dict[str, Any], todo: list) -> None:
    stack = build(**loop)
    served: list[tuple[Ask, Request]] = []
    for operation in todo:
        match operation:
            case Ask():
                served.append((operation, operation.request(str(len(served)))))
                stack.loop.add([served[-1][1]])
            case Steps(count):
                stack.step(count)
            case Abort(number) if served:
                stack.loop.abort(served[number % len(served)][1])
                stack.check()
    stack.run()
    assert stack.loop.scheduler.slots.active == []
    assert all(rows * tokens <= loop["max_num_tokens"] for _, rows, tokens in stack.target.shapes)
    for ask, request in served:
        if (most := ask.params["num_speculative_tokens"]) is not None:
            assert len(request.metrics.acceptance_histogram) <= most + 1
            assert request.metrics.num_draft_tokens <= most * request.metrics.num_spec_steps
        alone = ask.request()
        build(**loop | ALONE).run(alone)
        assert [alone.error, request.error] == [None, None]
        if request.finish_reason == "abort":
            assert request.output_token_ids == alone.output_token_ids[: len(request.output_token_ids)]
            continue
        assert observed(request) == observed(alone)
        if ask.policy == "exact" and request.sampler is None and "stop" not in ask.params:
            assert request.output_token_ids == plain_decoding(loop["salt"], request)
