"""Draft stops, guards and rules of the host in the generation loop: the same tokens however rounds are cut and whatever
else is served, and what the engine is asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fly_trt.acceptance import AcceptanceSettings
from fly_trt.drafting import DRAFT_STOPS, ModelDrafter
from fly_trt.drafting.stops import DraftStop
from fly_trt.runtime.loosening import StepCosts
from fly_trt.runtime.request import Request
from fly_trt.verification import (
    EXACT,
    POLICIES,
    PRESETS,
    AcceptancePolicy,
    Guards,
    GuardSettings,
    HeadInfo,
)
from loop_stack import LOOKUP, PROMPT, SHORT_WINDOW, CheckedModelDrafter, Stack, make_request, make_stack
from table_engine import VOCAB_SIZE, Logits, NextToken, TableEngine, greedy, most_probable, spread_logits

NUM_DRAFT = 7
CUTS: list[Sequence[int]] = [(), (0,), (NUM_DRAFT, 0, 2), (3, 1)]
SALTS = {"margin": range(8)}  # with most languages none of its two most probable tokens are close
SETTINGS: dict[str, dict[str, Any]] = {"margin": {"margin_threshold": 1.5}}
HEAD = HeadInfo(VOCAB_SIZE, 3, has_top_tokens=True)


def entropy_of(logits: Logits) -> Callable[[tuple[int, ...]], float]:
    def entropy(tokens: tuple[int, ...]) -> float:
        p = np.exp(logits(tokens) - logits(tokens).max())
        top = np.sort(p / p.sum())[-3:]
        return float(-(top * np.log(top)).sum())

    return entropy


def policy_of(name: str, **settings: Any) -> AcceptancePolicy:
    return AcceptanceSettings(acceptance=name, **settings).policy(HEAD).for_request()


class Language:
    """Laws of target and draft that often agree, and drafters and stacks on them."""

    def __init__(self, salt: int) -> None:
        self.logits = spread_logits(salt)
        other = spread_logits(salt + 100)
        self.draft_logits: Logits = lambda tokens: self.logits(tokens) + 0.7 * other(tokens)
        self.draft: NextToken = most_probable(self.draft_logits)

    def stack(self, num_slots: int = 1, *, with_lookup: bool = False, **settings: Any) -> Stack:
        entropy = entropy_of(self.draft_logits)
        engine = TableEngine(self.draft, entropy=entropy, logits=self.draft_logits, max_batch_size=num_slots)
        drafter = CheckedModelDrafter(self.draft, engine, VOCAB_SIZE, LOOKUP if with_lookup else None)
        return make_stack(
            most_probable(self.logits),
            drafter,
            logits=self.logits,
            entropy=entropy_of(self.logits),
            num_slots=num_slots,
            num_draft_tokens=NUM_DRAFT,
            **settings,
        )


def stop_of(name: str) -> DraftStop:
    rule = DRAFT_STOPS[name]
    assert rule is not None
    return rule()


STOPS = [name for name, rule in DRAFT_STOPS.items() if rule is not None]


def outcome(request: Request) -> tuple[list[int], int]:
    """Tokens, and how many of them were loosened."""
    assert request.error is None
    return request.output_token_ids, request.metrics.num_loosened_tokens


@pytest.mark.parametrize("with_lookup", [False, True])
@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("salt", range(4))
def test_a_draft_that_ends_early_changes_no_token_of_an_exact_request(salt: int, name: str, with_lookup: bool) -> None:
    language = Language(salt)
    plain = greedy(most_probable(language.logits), PROMPT, 40)
    drafted = []
    for lengths in CUTS:
        for stop in (None, stop_of(name)):
            stack = language.stack(with_lookup=with_lookup, draft_lengths=lengths)
            request = make_request(policy=EXACT, ignore_eos=True)
            request.draft_stop = stop
            stack.run(request)
            assert request.output_token_ids == plain
            if not lengths:
                drafted.append(request.metrics.num_draft_tokens)
    without, with_stop = drafted
    assert with_stop < without, "it ended some drafts"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", [None, *STOPS])
@pytest.mark.parametrize("acceptance", sorted(set(POLICIES) - {"exact"}))
def test_a_loose_request_gets_the_same_tokens_however_it_is_cut_and_beside_whom(
    acceptance: str, name: str | None, temperature: float
) -> None:
    """Also with windows that are opened only where they pay, whose pauses have rounds of the load's length."""
    num_loosened = 0
    for salt in SALTS.get(acceptance, (0, 1)):
        language = Language(salt)
        for costs in (None, StepCosts(0.2, 0.1)) if acceptance == "fly" else (None,):
            outcomes = []
            for number, lengths in enumerate(CUTS):
                stack = language.stack(3, draft_lengths=lengths, step_costs=costs)
                policy = SHORT_WINDOW if acceptance == "fly" else policy_of(acceptance)
                request = make_request(policy=policy, ignore_eos=True, temperature=temperature, seed=salt)
                request.draft_stop = None if name is None else stop_of(name)
                neighbours = [make_request([5 + i, 3, 4 + number], request_id=f"n{i}") for i in range(number % 3)]
                stack.run(*neighbours[:1], request, *neighbours[1:])
                outcomes.append(outcome(request))
            assert outcomes == [outcomes[0]] * len(outcomes)
            num_loosened += outcomes[0][1]
    needs_more = (acceptance == "cactus" and not temperature) or acceptance == "conditional"
    # A stop at tokens that the model is unsure of leaves FLy's windows no room; conditional is for copies.
    if not needs_more and name is None:
        assert num_loosened > 0


@pytest.mark.parametrize("lengths", CUTS)
@pytest.mark.parametrize("acceptance", ["fly", "typical"])
def test_guards_hold_however_a_round_is_cut(acceptance: str, lengths: Sequence[int]) -> None:
    language = Language(1)
    texts = [chr(97 + token % 26) for token in range(VOCAB_SIZE)]
    settings = GuardSettings(
        exact_first=4, exact_token_ids=frozenset({5}), exact_within=("after:eh",), max_loosened_per_100=3
    )
    outcomes = []
    for cut in ((), lengths):
        stack = language.stack(2, draft_lengths=cut)
        policy = SHORT_WINDOW if acceptance == "fly" else policy_of(acceptance)
        request = make_request(policy=policy, ignore_eos=True)
        request.guards = Guards(settings, texts.__getitem__)
        stack.run(request, make_request([9, 8, 7], request_id="neighbour"))
        outcomes.append(outcome(request))
    assert outcomes[0] == outcomes[1]
    tokens, num_loosened = outcomes[0]
    assert num_loosened <= 3
    exact = greedy(most_probable(language.logits), PROMPT, 40)
    assert tokens[:4] == exact[:4]


def test_guards_that_forbid_everything_are_exact() -> None:
    language = Language(2)
    for settings in (GuardSettings(exact_first=1000), GuardSettings(max_loosened_per_100=0)):
        for policy in (SHORT_WINDOW, policy_of("typical"), policy_of("relaxed")):
            stack = language.stack()
            request = make_request(policy=policy, ignore_eos=True)
            request.guards = Guards(settings, str)
            stack.run(request)
            assert request.output_token_ids == greedy(most_probable(language.logits), PROMPT, 40)
            assert request.metrics.num_loosened_tokens == 0


def test_the_most_probable_tokens_are_asked_for_where_a_rule_reads_them_and_nowhere_else() -> None:
    language = Language(0)
    for policy, reads_targets, reads_drafts in (
        (EXACT, False, False),
        (PRESETS["reference"], False, False),
        (policy_of("typical"), False, False),
        (policy_of("relaxed"), True, False),
        (policy_of("margin"), True, False),
        (policy_of("adaptive"), True, True),
    ):
        stack = language.stack()
        stack.run(make_request(policy=policy, ignore_eos=True))
        drafter = stack.loop.speculation.drafter
        assert isinstance(drafter, ModelDrafter)
        engine = drafter._engine
        assert isinstance(engine, TableEngine)
        assert (bool(stack.target.top_shapes), bool(engine.top_shapes)) == (reads_targets, reads_drafts), policy.name


def test_the_full_entropy_of_a_draft_is_asked_for_where_a_stop_reads_it() -> None:
    """The engine leaves it out otherwise, and a rule that compares with it never ends a draft."""
    language = Language(0)
    for name in STOPS:
        stack = language.stack()
        request = make_request(policy=EXACT, ignore_eos=True)
        request.draft_stop = stop_of(name)
        stack.run(request)
        assert request.metrics.num_draft_tokens < request.metrics.num_spec_steps * NUM_DRAFT


def test_what_was_drafted_and_accepted_is_counted_by_source_and_policy() -> None:
    language = Language(0)
    stack = language.stack()
    request = make_request(policy=policy_of("typical"), ignore_eos=True)
    stack.run(request)
    metrics = request.metrics
    assert metrics.num_draft_tokens_by_source == {"model": metrics.num_draft_tokens}
    assert metrics.num_accepted_tokens_by_source == {"model": metrics.num_accepted_tokens}
    labels = 'acceptance="typical"'
    accepted = stack.counted(f'spec_decode_num_accepted_tokens_by_source_total{{{labels},source="model"}}')
    assert accepted == metrics.num_accepted_tokens > 0
    loosened = stack.counted(f"spec_decode_num_loosened_tokens_by_policy_total{{{labels}}}")
    assert loosened == metrics.num_loosened_tokens > 0


@pytest.mark.parametrize("name", STOPS)
def test_a_step_has_no_room_for_tokens_that_were_not_drafted(name: str) -> None:
    language = Language(3)
    stack = language.stack()
    request = make_request(policy=EXACT, ignore_eos=True)
    request.draft_stop = stop_of(name)
    stack.run(request)
    num_verified = sum(tokens for _, _, tokens in stack.target.shapes)
    assert num_verified == len(PROMPT) + request.metrics.num_draft_tokens + request.metrics.num_spec_steps - 1
