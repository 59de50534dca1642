"""The seams that drafting ahead and reflective verification would use carry their test doubles."""

import numpy as np
import pytest

from fly_trt.verification import EXACT, DraftSource, Evidence, Positions
from loop_stack import PROMPT, make_request, make_stack
from table_engine import VOCAB_SIZE, TableEngine, greedy, hashed, sometimes_differs
from toy_seams import AheadDrafter, ReflectivePolicy

NUM_DRAFT = 4


@pytest.mark.parametrize("salt", range(4))
def test_what_was_drafted_ahead_is_the_next_draft_and_costs_no_step(salt: int) -> None:
    language = hashed(VOCAB_SIZE, salt)
    engine = TableEngine(sometimes_differs(language, salt, out_of=9), max_batch_size=1, max_num_tokens=64)
    stack = make_stack(language, AheadDrafter(engine, VOCAB_SIZE), num_draft_tokens=NUM_DRAFT)
    request = make_request(policy=EXACT, ignore_eos=True)
    stack.loop.add([request])
    num_hits = 0
    while stack.loop.has_requests():
        emitted, steps, rounds = len(request.output_token_ids), engine.num_runs, request.metrics.num_spec_steps
        stack.step()
        num_steps = engine.num_runs - steps  # a miss drafts anew: twice the draft and the guess between them
        num_hits += request.metrics.num_spec_steps > rounds and emitted > 0 and num_steps <= NUM_DRAFT + 1
    assert request.output_token_ids == greedy(language, PROMPT, 40)
    assert num_hits > 0


def test_a_token_that_stands_by_reflection_is_the_argmax_of_both_readings_mixed() -> None:
    rng = np.random.default_rng(0)
    num_reflected = 0
    for _ in range(3000):
        alpha = rng.random()
        logits = rng.normal(0, 2, (2, 5, 12))  # of two readings, at four draft positions and behind them
        first, second = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        draft = np.where(rng.random(4) < 0.5, second[:4].argmax(axis=1), rng.integers(0, 12, 4))
        following = np.append(draft, 0)
        said = Positions(
            first.argmax(axis=1),
            *np.full((2, 5), np.nan, np.float32),
            first.max(axis=1),
            first[np.arange(5), following],
        )
        evidence = Evidence(4, draft=draft, sources=np.full(4, DraftSource.MODEL, np.uint8), target=said)
        policy = ReflectivePolicy(
            second_reading=lambda tokens, by=second: by[np.arange(len(tokens)), tokens], alpha=alpha
        )
        verdict = policy.verdict(evidence, frozenset())
        mixed = ((1 - alpha) * first + alpha * second)[:4].argmax(axis=1)
        stands = (draft == said.choices[:4]) | (draft == mixed)
        assert stands[: verdict.num_accepted].all()
        assert verdict.num_accepted >= EXACT.verdict(evidence, frozenset()).num_accepted
        num_reflected += evidence.num_loosened(verdict.num_accepted)
    assert num_reflected > 50
