"""Draft tokens per round that a request asks for: its rounds have so many, and nobody else's change."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.drafting import Draft, DraftRow, ModelDrafter
from fly_trt.runtime.request import Request
from fly_trt.verification import EXACT, PRESETS, AcceptancePolicy
from loop_stack import (
    DRAFTERS,
    NUM_DRAFT_TOKENS,
    PROMPT,
    SHORT_WINDOW,
    make_drafter,
    make_request,
    make_stack,
    random_prompt,
)
from table_engine import VOCAB_SIZE, NextToken, TableEngine, greedy, hashed, sometimes_differs, sometimes_uncertain

POLICIES = {"exact": EXACT, "short": SHORT_WINDOW, **PRESETS}
CYCLE: NextToken = lambda tokens: 2 + (tokens[-1] - 1) % 7  # noqa: E731
CYCLE_PROMPT = greedy(CYCLE, [2], 30)


def observed(request: Request) -> tuple:
    metrics = request.metrics
    return (
        request.output_token_ids,
        metrics.num_spec_steps,
        metrics.num_accepted_tokens,
        metrics.num_loosened_tokens,
        metrics.acceptance_histogram,
    )


@pytest.mark.parametrize("policy", [EXACT, PRESETS["reference"]], ids=["exact", "fly"])
@pytest.mark.parametrize("drafter", DRAFTERS[1:])
@pytest.mark.parametrize("asked", [1, 4, 10, NUM_DRAFT_TOKENS, None])
def test_every_round_has_what_the_request_asks_for(drafter: str, policy: AcceptancePolicy, asked: int | None) -> None:
    length = NUM_DRAFT_TOKENS if asked is None else asked
    request = make_request(CYCLE_PROMPT, policy=policy, num_speculative_tokens=asked, max_tokens=4 * (length + 1))
    make_stack(CYCLE, make_drafter(drafter, CYCLE)).run(request)
    metrics = request.metrics
    assert (metrics.num_spec_steps, metrics.num_draft_tokens) == (4, 4 * length)
    assert metrics.acceptance_histogram == [0] * length + [4]


@examples(60)
@given(
    salt=st.integers(0, 1000),
    drafter=st.sampled_from(DRAFTERS[1:]),
    policy=st.sampled_from(sorted(POLICIES)),
    asked=st.integers(1, NUM_DRAFT_TOKENS),
)
def test_it_is_served_as_by_an_engine_that_is_configured_so(salt: int, drafter: str, policy: str, asked: int) -> None:
    language = hashed(6, salt)
    outcomes = []
    for configured in (asked, NUM_DRAFT_TOKENS):
        request = make_request(policy=POLICIES[policy], num_speculative_tokens=asked)
        make_stack(
            language,
            make_drafter(drafter, sometimes_differs(language, salt, out_of=8)),
            num_draft_tokens=configured,
            entropy=sometimes_uncertain(salt),
        ).run(request)
        outcomes.append(observed(request))
    assert outcomes[0] == outcomes[1]


def differs_once(at: int) -> NextToken:
    """A draft that differs from the cycle at one length of the sequence."""
    return lambda tokens: 25 if len(tokens) == at else CYCLE(tokens)


@pytest.mark.parametrize("cut", [(), (0,), (2,), (0, 9)])
def test_a_loose_window_must_lie_inside_the_round_that_was_asked_for(cut: tuple[int, ...]) -> None:
    """The fourth draft token differs; two more must follow it in the same round."""
    loosened = {}
    for asked in (5, 6, None):
        request = make_request([2], policy=SHORT_WINDOW, max_tokens=12, num_speculative_tokens=asked)
        drafter = ModelDrafter(TableEngine(differs_once(at=4)), VOCAB_SIZE)
        make_stack(CYCLE, drafter, entropy=lambda tokens: 1.0, draft_lengths=cut).run(request)
        loosened[asked] = (request.metrics.num_loosened_tokens, request.output_token_ids[3] == 25)
    assert loosened == {5: (0, False), 6: (1, True), None: (1, True)}


@pytest.mark.parametrize("policy", [EXACT, PRESETS["reference"]], ids=["exact", "fly"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("drafter", DRAFTERS[1:])
def test_without_draft_tokens_requests_take_the_steps_of_plain_decoding(
    drafter: str, adaptive: bool, policy: AcceptancePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("a draft was asked for, or its cost forgotten")

    language = hashed(12, 3)
    prompts = [PROMPT, random_prompt(0, 30)]
    shapes = []
    for name in ("none", drafter):
        draft = make_drafter(name, language)
        stack = make_stack(language, draft, num_slots=2, adaptive_draft_length=adaptive)
        if draft is not None:
            monkeypatch.setattr(draft, "propose", never)
            monkeypatch.setattr(stack.loop.speculation.draft_length, "rest", never)
        requests = [make_request(prompt, policy=policy, num_speculative_tokens=0) for prompt in prompts]
        stack.run(*requests)
        for request in requests:
            assert request.output_token_ids == greedy(language, request.prompt_token_ids, 40)
            assert (request.metrics.num_spec_steps, request.metrics.num_draft_tokens) == (0, 0)
        shapes.append(stack.target.shapes)
    assert shapes[0] == shapes[1]


class RecordingDrafter(ModelDrafter):
    """Notes the longest draft that was asked for, by the first token of the prompt."""

    def __init__(self, draft: NextToken) -> None:
        super().__init__(TableEngine(draft), VOCAB_SIZE)
        self.longest: dict[int, int] = {}

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        for row in rows:
            first = int(row.tokens[0])
            self.longest[first] = max(row.num_tokens, self.longest.get(first, 0))
        return super().propose(rows)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("cut", [(), (0,), (3, 0, 15)])
def test_each_request_of_a_batch_has_rounds_of_its_own_length(policy: str, cut: tuple[int, ...]) -> None:
    language = hashed(6, 5)

    def served(asked: dict[int, int | None]) -> tuple[list[Request], RecordingDrafter]:
        drafter = RecordingDrafter(sometimes_differs(language, 5, out_of=8))
        entropy = sometimes_uncertain(5)
        stack = make_stack(
            language, drafter, num_slots=4, max_num_tokens=80, entropy=entropy, draft_lengths=cut, prefix_caching=False
        )
        requests = [
            make_request([first, *PROMPT], policy=POLICIES[policy], num_speculative_tokens=number, max_tokens=60)
            for first, number in asked.items()
        ]
        stack.run(*requests)
        return requests, drafter

    asked = {2: None, 3: 0, 4: 7, 5: 2}
    together, drafter = served(asked)
    for (first, number), request in zip(asked.items(), together, strict=True):
        (alone,), _ = served({first: number})
        most = NUM_DRAFT_TOKENS if number is None else number
        assert drafter.longest.get(first, 0) <= most
        assert request.output_token_ids == alone.output_token_ids
        assert len(request.metrics.acceptance_histogram) <= most + 1
        assert request.metrics.num_draft_tokens <= most * request.metrics.num_spec_steps
        if request.policy.is_loose:
            assert observed(request) == observed(alone)
