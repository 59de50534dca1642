"""The hybrid drafter: a copy where the match is worth it, the draft model's greedy text everywhere else."""

from typing import Any

import numpy as np
import pytest

from fly_trt.drafting import Draft, DraftParts, DraftRow, HybridDrafter, ModelDrafter, ReadsOutputs
from fly_trt.drafting.hybrid import hybrid
from fly_trt.drafting.stops import ConfidenceStop
from fly_trt.drafting.suffix import Copies
from fly_trt.params import SpeculativeConfig
from fly_trt.verification import AcceptancePolicy, ConditionalPolicy, DraftSource, FlyPolicy, TypicalPolicy
from loop_stack import make_request, make_stack
from table_engine import (
    VOCAB_SIZE,
    NextToken,
    TableEngine,
    greedy,
    hashed,
    most_probable,
    sometimes_differs,
    sometimes_uncertain,
    spread_logits,
)

MIN_MATCH, MOST = 3, 15
LANGUAGE = hashed(8, 1)
HIT = [2, 3, 4, 5, 6, 7, 2, 3, 4]
MISS = [2, 3, 4, 5, 7, 3]


def make_drafter(language: NextToken = LANGUAGE, *, num_slots: int = 4) -> tuple[TableEngine, HybridDrafter]:
    engine = TableEngine(language, max_batch_size=num_slots)
    return engine, HybridDrafter(Copies(2.0, MOST, None), ModelDrafter(engine, VOCAB_SIZE), MIN_MATCH)


def propose(drafter: HybridDrafter, tokens: list[int], count: int = 5, slot: int = 0, **row: Any) -> Draft:
    (draft,) = drafter.propose([DraftRow(slot, np.array(tokens), count, **row)])
    return draft


def test_a_match_is_copied_and_costs_no_step() -> None:
    engine, drafter = make_drafter()
    draft = propose(drafter, HIT)
    assert draft.tokens.tolist() == [5, 6, 7, 2, 3]
    assert set(draft.sources) == {DraftSource.LOOKUP}
    assert draft.is_whole
    assert engine.num_runs == 0


@pytest.mark.parametrize("text", [MISS, [2, 3, 4, 5, 2, 3], [9]])
def test_without_a_match_that_is_worth_it_the_model_drafts(text: list[int]) -> None:
    _, drafter = make_drafter()
    draft = propose(drafter, text)
    assert draft.tokens.tolist() == greedy(LANGUAGE, text, 5)
    assert set(draft.sources) == {DraftSource.MODEL}
    assert not draft.is_whole


@pytest.mark.parametrize("text", [HIT, MISS])
@pytest.mark.parametrize("num_committed", range(4))
def test_a_round_goes_on_as_it_began(text: list[int], num_committed: int) -> None:
    """Also where the committed part would make or break a match."""
    _, drafter = make_drafter()
    kept = propose(make_drafter()[1], text, 9).tokens.tolist()
    assert propose(drafter, text, 2).tokens.tolist() == kept[:2]
    tokens = [*text, *kept[:num_committed]]
    assert propose(drafter, tokens, 4, round_start=len(text)).tokens.tolist() == kept[num_committed:][:4]


def test_rows_of_both_kinds_keep_their_order() -> None:
    _, drafter = make_drafter()
    rows = [DraftRow(slot, np.array(text), 3) for slot, text in enumerate([MISS, HIT, [7, 6, 7], HIT])]
    drafts = [draft.tokens.tolist() for draft in drafter.propose(rows)]
    assert drafts == [greedy(LANGUAGE, MISS, 3), [5, 6, 7], greedy(LANGUAGE, [7, 6, 7], 3), [5, 6, 7]]


def test_the_model_reads_what_was_copied_when_it_is_asked_again() -> None:
    engine, drafter = make_drafter()
    propose(drafter, HIT)
    assert (engine.num_runs, drafter.num_unread(0, 30)) == (0, 0)
    text = [*HIT, 9]
    assert propose(drafter, text).tokens.tolist() == greedy(LANGUAGE, text, 5)
    assert engine.shapes[0] == (0, 1, len(text))
    assert drafter.num_unread(0, len(text) + 6) == 2, "after its own four drafts"


def test_slots_that_change_keep_their_kind_and_their_text() -> None:
    _, drafter = make_drafter()
    propose(drafter, HIT, slot=0)
    propose(drafter, MISS, slot=1)
    drafter.swap(0, 1)
    assert drafter.num_unread(1, 50) == 0 < drafter.num_unread(0, 50)
    assert propose(drafter, [*HIT, 5], slot=1).tokens.tolist() == [6, 7, 2, 3, 4]
    assert propose(drafter, [*MISS, 2], slot=0).tokens.tolist() == greedy(LANGUAGE, [*MISS, 2], 5)
    drafter.release(1)
    assert drafter.num_unread(1, 50) == 50
    drafter.copy(0, 1, len(MISS))
    assert propose(drafter, [*MISS, 6], slot=1).tokens.tolist() == greedy(LANGUAGE, [*MISS, 6], 5)
    drafter.reset()
    assert propose(drafter, MISS, slot=1).tokens.tolist() == greedy(LANGUAGE, MISS, 5)


def test_what_others_emitted_is_not_copied() -> None:
    config = SpeculativeConfig(method="hybrid", hybrid_min_match=MIN_MATCH)
    assert not isinstance(hybrid(config, DraftParts(lambda: make_drafter()[0], VOCAB_SIZE, True)), ReadsOutputs)


def test_copies_have_scores_that_say_nothing_where_scores_are_wanted() -> None:
    _, drafter = make_drafter()
    assert len(propose(drafter, HIT).scores.entropy) == 0
    for wish in ({"wants_scores": True}, {"stop": ConfidenceStop()}):
        scores = propose(drafter, HIT, **wish).scores
        assert np.isnan(scores.entropy).tolist() == [True] * 5


# --- in the loop ------------------------------------------------------------------------------------------------------

POLICIES = {
    "exact": None,
    "fly": FlyPolicy(entropy_threshold=0.1, use_full_entropy=False, window=2, lookahead=2),
    "typical": TypicalPolicy(use_full_entropy=True, threshold=0.02),
    "conditional": ConditionalPolicy(use_full_entropy=True),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("salt", range(6))
def test_in_any_company_a_request_has_its_own_text(salt: int, name: str) -> None:
    """However its rounds are cut, and under exact it is plain decoding's."""
    logits, policy = spread_logits(salt, 3), POLICIES[name]
    target = most_probable(logits)
    prompt = np.random.default_rng(salt).integers(2, 5, 30).tolist()
    loosened = []

    def served(others: tuple[int, ...] = (), **settings: Any) -> list[int]:
        _, drafter = make_drafter(sometimes_differs(target, salt))
        entropy = sometimes_uncertain(salt)
        stack = make_stack(target, drafter, logits=logits, entropy=entropy, num_slots=4, num_draft_tokens=6, **settings)
        stack.run(*[make_request(prompt[:length], request_id=f"a{length}", max_tokens=20) for length in others])
        stack.loop.add([make_request(prompt[:length], request_id=f"n{length}", max_tokens=9) for length in others])
        stack.step(salt % 4 if others else 0)
        request = make_request(prompt, ignore_eos=True, max_tokens=16, **({"policy": policy} if policy else {}))
        stack.run(request)
        loosened.append(request.metrics.num_loosened_tokens)
        return request.output_token_ids

    alone = served()
    assert policy is not None or alone == greedy(target, prompt, 16)
    for others, lengths, max_num_tokens in (((), [6], 16), ((30, 17), [2, 0], 16), ((29, 25, 3), [5, 1], 12)):
        assert served(others, draft_lengths=lengths, max_num_tokens=max_num_tokens) == alone
    assert len(set(loosened)) == 1


@pytest.mark.parametrize("policy", [POLICIES["fly"], POLICIES["typical"]])
def test_a_copy_is_verified_exactly_under_a_rule_that_is_not_meant_for_copies(policy: AcceptancePolicy) -> None:
    """With a draft model that is the target, what is loosened could only be a copy."""
    num_rejected = 0
    for salt in range(8):
        logits = spread_logits(salt, 3)
        target = most_probable(logits)
        prompt = np.random.default_rng(salt).integers(2, 5, 40).tolist()
        stack = make_stack(
            target, make_drafter(target)[1], logits=logits, entropy=lambda tokens: 1.0, num_draft_tokens=6
        )
        request = make_request(prompt, policy=policy, ignore_eos=True, max_tokens=30)
        stack.run(request)
        assert request.output_token_ids == greedy(target, prompt, 30)
        num_rejected += request.metrics.num_draft_tokens - request.metrics.num_accepted_tokens
    assert num_rejected > 0
