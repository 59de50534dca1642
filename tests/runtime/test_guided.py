"""Drafts under a grammar: what it forces is drafted for nothing, what it forbids ends them, and no token changes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.drafting import Draft, DraftRow
from fly_trt.runtime.request import Request
from fly_trt.runtime.rounds import Round
from fly_trt.runtime.speculation import Speculation
from fly_trt.verification import (
    EXACT,
    PRESETS,
    AcceptancePolicy,
    DraftSource,
    Evidence,
    Limits,
    Positions,
    TypicalPolicy,
)
from loop_stack import (
    DRAFTERS,
    NUM_DRAFT_TOKENS,
    SHORT_WINDOW,
    Stack,
    make_drafter,
    make_request,
    make_stack,
    random_prompt,
)
from table_engine import most_probable, sometimes_differs, sometimes_uncertain, spread_logits
from toy_grammar import SilentGrammar, ToyGrammar

POLICIES: list[AcceptancePolicy] = [SHORT_WINDOW, *PRESETS.values(), TypicalPolicy()]
SAMPLED = {"temperature": 0.9, "top_k": 12, "seed": 5}
WITH_DRAFTS = [name for name in DRAFTERS if name != "none"]
lengths = st.lists(st.integers(0, NUM_DRAFT_TOKENS), max_size=5)
seeds = st.integers(0, 2**40)


def build(salt: int, drafter: str, **settings: Any) -> Stack:
    logits = spread_logits(salt)
    language = most_probable(logits)
    draft = make_drafter(drafter, sometimes_differs(language, salt))
    return make_stack(language, draft, logits=logits, entropy=sometimes_uncertain(salt), **settings)


def served(stack: Stack, *others: Request, **params: Any) -> Request:
    request = make_request(**({"ignore_eos": True} | params))
    stack.run(*others, request)
    assert request.error is None
    return request


def num_rounds(request: Request) -> int:
    """Each brings one token that was not drafted."""
    return request.metrics.num_output_tokens - request.metrics.num_accepted_tokens


def assert_follows(request: Request, grammar: ToyGrammar) -> None:
    output = np.array(request.output_token_ids)
    assert grammar.num_allowed(output[:0], output) == len(output)


@given(st.sampled_from(WITH_DRAFTS), seeds, st.booleans(), lengths, st.booleans())
@examples(120)
def test_forced_tokens_change_no_token_of_exact_requests(
    drafter: str, salt: int, is_sampled: bool, draft_lengths: list[int], spells_twice: bool
) -> None:
    settings: dict[str, Any] = SAMPLED if is_sampled else {}
    grammar = ToyGrammar(salt, spells_twice=spells_twice)
    silent = SilentGrammar(salt, spells_twice=spells_twice)
    plain = served(build(salt, "none"), grammar=grammar, **settings)
    assert_follows(plain, grammar)
    assert len(plain.output_token_ids) == 40
    for each in (grammar, silent):
        request = served(build(salt, drafter, draft_lengths=draft_lengths), grammar=each, **settings)
        assert request.output_token_ids == plain.output_token_ids


@pytest.mark.parametrize("drafter", WITH_DRAFTS)
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_forced_tokens_save_rounds(drafter: str, settings: dict[str, Any]) -> None:
    """In half of the places there is no choice; the grammar has one spelling of it, so that every one stands."""
    guided = [served(build(7, drafter), grammar=ToyGrammar(3, spells_twice=False), **settings) for _ in range(2)]
    silent = served(build(7, drafter), grammar=SilentGrammar(3, spells_twice=False), **settings)
    assert guided[0].output_token_ids == silent.output_token_ids
    assert num_rounds(guided[0]) <= 0.7 * num_rounds(silent)
    drafted, stood = (getattr(guided[0].metrics, f"num_{name}_tokens_by_source") for name in ("draft", "accepted"))
    assert drafted["grammar"] >= stood["grammar"] > 10
    assert "grammar" not in silent.metrics.num_draft_tokens_by_source


def test_plain_decoding_stays_plain() -> None:
    grammar = ToyGrammar(3)
    request = served(build(7, "none"), grammar=grammar)
    assert num_rounds(request) == 40
    assert not grammar.num_asked
    grammar = ToyGrammar(3)
    request = served(build(7, "ngram"), grammar=grammar, num_speculative_tokens=0)
    assert num_rounds(request) == 40
    assert not grammar.num_asked


@given(st.sampled_from(WITH_DRAFTS), seeds, st.sampled_from(POLICIES), st.booleans(), lengths, st.booleans())
@examples(100)
def test_loose_rounds_are_the_same_however_they_are_cut(
    drafter: str, salt: int, policy: AcceptancePolicy, is_sampled: bool, draft_lengths: list[int], is_crowded: bool
) -> None:
    """Alone in whole rounds, and in rounds cut by the load, among others with and without a grammar."""
    settings: dict[str, Any] = {"policy": policy, **(SAMPLED if is_sampled else {})}
    alone = served(build(salt, drafter), grammar=ToyGrammar(salt), **settings)
    assert_follows(alone, ToyGrammar(salt))
    others = [
        make_request(random_prompt(salt % 1000, 9), request_id="1", max_tokens=23, policy=policy),
        make_request(
            random_prompt(3, 30), request_id="2", grammar=ToyGrammar(salt + 1), policy=policy, temperature=0.7
        ),
    ]
    stack = build(salt, drafter, num_slots=4, draft_lengths=draft_lengths, max_num_tokens=16 if is_crowded else 64)
    together = served(stack, *others, grammar=ToyGrammar(salt), **settings)
    assert together.output_token_ids == alone.output_token_ids
    assert together.metrics.num_loosened_tokens == alone.metrics.num_loosened_tokens


@pytest.mark.parametrize("drafter", WITH_DRAFTS)
def test_batch_mates_without_a_grammar_notice_nothing(drafter: str) -> None:
    def mates() -> list[Request]:
        made = (("1", EXACT, {}), ("2", SHORT_WINDOW, {}), ("3", PRESETS["reference"], SAMPLED))
        return [
            make_request(random_prompt(int(name), 8), request_id=name, policy=policy, **settings)
            for name, policy, settings in made
        ]

    alone, beside = mates(), mates()
    build(1, drafter, num_slots=4).run(*alone)
    served(build(1, drafter, num_slots=4), *beside, grammar=ToyGrammar(5))
    assert [request.output_token_ids for request in beside] == [request.output_token_ids for request in alone]


@pytest.mark.parametrize("drafter", WITH_DRAFTS)
@pytest.mark.parametrize("policy", [EXACT, SHORT_WINDOW], ids=["exact", "fly"])
def test_what_came_with_a_cache_changes_nothing(drafter: str, policy: AcceptancePolicy) -> None:
    prompt = random_prompt(11, 40)
    first = served(build(2, drafter), prompt=prompt, grammar=ToyGrammar(4), policy=policy)
    stack = build(2, drafter)
    served(stack, prompt=[*prompt[:35], 2, 3], grammar=ToyGrammar(9), policy=policy)
    again = served(stack, prompt=prompt, grammar=ToyGrammar(4), policy=policy)
    assert again.num_prefix_hits > 0 or drafter == "alignment", "which reads what it wants to know of a prompt"
    assert again.output_token_ids == first.output_token_ids


@pytest.mark.parametrize("drafter", ["ngram", "multi_level"])
def test_an_end_within_a_draft_ends_the_output(drafter: str) -> None:
    for salt in range(30):
        settings: dict[str, Any] = {"temperature": 1.0, "seed": salt, "ignore_eos": False, "logit_bias": {1: 4.0}}
        plain = served(build(salt, "none"), grammar=ToyGrammar(salt, ends=True), **settings)
        request = served(build(salt, drafter), grammar=ToyGrammar(salt, ends=True), **settings)
        assert request.output_token_ids == plain.output_token_ids
        assert request.finish_reason == plain.finish_reason


# --- what is learnt -----------------------------------------------------------------------------------------------


def round_of(sources: list[DraftSource], stood: int, *, is_cut: bool = False) -> Round:
    """A round that is decided, of which the first `stood` draft tokens stand."""
    num_draft = len(sources)
    evidence = Evidence(num_draft, draft=np.arange(num_draft), sources=np.array(sources, np.uint8))
    evidence.add(Positions(np.arange(num_draft + 1), *np.zeros((4, num_draft + 1), np.float32)))
    return Round(9, evidence, EXACT, Limits(frozenset()), num_committed=stood, is_guided=True, is_cut=is_cut)


G, M = DraftSource.GRAMMAR, DraftSource.MODEL


@pytest.mark.parametrize(
    ("sources", "stood", "is_cut", "counts"),
    [
        ([G, G, G], 3, False, (0, False)),
        ([G, G, G], 1, False, (0, False)),
        ([G, G, M, M], 4, False, (2, False)),
        ([G, G, M, M], 3, False, (1, True)),
        ([G, G, M, M], 1, False, (0, False)),
        ([M, M, G, G], 3, False, (2, False)),
        ([M, M, G, M], 4, True, (3, True)),
        ([M, M], 1, True, (1, True)),
        ([G], 1, True, (0, True)),
    ],
)
def test_what_is_forced_says_nothing_of_the_drafter(
    sources: list[DraftSource], stood: int, is_cut: bool, counts: tuple[int, bool]
) -> None:
    """A draft that ended at a forbidden token shows that one as rejected, once all before it stand."""
    assert round_of(sources, stood, is_cut=is_cut).counts_of_drafter() == counts


def test_rates_rest_on_the_drafters_own_tokens() -> None:
    drafter = make_drafter("ngram", lambda tokens: 2)
    speculation = Speculation(drafter, 4, is_adaptive=True, step_costs=None, stop_token_ids=frozenset())
    before = speculation.draft_length.usual_rate
    request = make_request(grammar=ToyGrammar(1))
    speculation.end_round(request, round_of([G, G, G], 3), 3)
    assert speculation.draft_length.usual_rate == before
    assert request.acceptance_rate is None
    speculation.end_round(request, round_of([G, G, M], 3), 3)
    assert request.acceptance_rate is not None
    assert request.acceptance_rate.value > before


# --- how drafters see what is not committed --------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_DRAFTS)
def test_a_drafter_goes_on_behind_a_draft_that_may_not_stand(name: str) -> None:
    """What it is shown ahead it forgets again: its next proposal is that of one that never saw it."""
    language = most_probable(spread_logits(3))
    drafters = [make_drafter(name, language) for _ in range(2)]
    tokens, ahead, others = [3, 4, 5, 6, 3, 4], [5, 6, 3], [9, 9]
    seen, fresh = drafters
    assert seen is not None
    assert fresh is not None

    def propose(drafter: Any, shown: list[int], num_ahead: int = 0) -> Draft:
        row = DraftRow(0, np.array(shown), 4, round_start=6 if num_ahead else None, num_ahead=num_ahead)
        return drafter.propose([row])[0]

    propose(seen, tokens)
    propose(fresh, tokens)
    behind = propose(seen, tokens + ahead, len(ahead)).tokens.tolist()
    if name not in ("draft_model", "multi_level"):
        assert behind[:1] == [4]
    else:
        assert len(behind) == 4
    after = [propose(drafter, tokens + others).tokens.tolist() for drafter in drafters]
    assert after[0] == after[1]
