"""The rule for sampled requests: what it emits has the law that it is written for, and its distance from the target's
law is bounded."""

import math
from collections import Counter

import numpy as np
import pytest

import policy_oracles as oracles
from fly_trt.verification import NOTHING, AcceptancePolicy, Evidence, UniformStream, sample
from random_rounds import decide, make, random_rounds
from sampling_definitions import follows

NUM_DRAWS = 4000
LAW = (0.02, 0.2, 0.0, 0.4, 0.08, 0.3)
LIMITS = (0.05, 0.75, 1.0, 3.0)


def one_token(p: float, choice: int, uniform: float, x: int = 1) -> Evidence:
    """A draft of one token x of probability p where `choice` was drawn."""
    with np.errstate(divide="ignore"):
        logprob = np.log(np.array([p, 1.0])).astype(np.float32)
    nothing = np.full(2, np.nan, np.float32)
    target = NOTHING._replace(
        choices=np.array([choice, 1]),
        entropy=nothing,
        entropy_topk=nothing,
        argmax_logprob=nothing,
        draft_logprob=logprob,
        top_ids=np.full((2, 3), -1),
        top_logprobs=np.full((2, 3), np.nan, np.float32),
        uniforms=np.array([uniform, 0.5]),
    )
    return Evidence(1, draft=np.array([x]), sources=np.zeros(1, np.uint8), target=target)


def emitted(policy: AcceptancePolicy, x: int, seed: int) -> Counter[int]:
    """The tokens at a position where x was drafted: x where it stands, otherwise the target's choice."""
    choices = sample(np.tile(np.array(LAW, np.float32), (NUM_DRAWS, 1)), UniformStream(seed, 0).at(0, NUM_DRAWS))
    uniforms = np.random.default_rng(seed).random(NUM_DRAWS)
    counts: Counter[int] = Counter()
    for choice, uniform in zip(choices.tolist(), uniforms.tolist(), strict=True):
        verdict = policy.verdict(one_token(LAW[x], choice, uniform, x), frozenset())
        counts[x if verdict.num_accepted else verdict.next_token or 0] += 1
    return counts


@pytest.mark.parametrize(("x", "delta"), [(0, 0.75), (1, 0.75), (3, 0.2), (4, 0.05), (5, 1.0), (2, 0.75)])
def test_the_emitted_token_has_the_raised_law(x: int, delta: float) -> None:
    counts = emitted(make("cactus", cactus_delta=delta), x, seed=x)
    assert follows(counts, np.array(oracles.raised_law(LAW, x, delta)))
    assert follows(counts, np.array(LAW)) == (LAW[x] == 0), "and no other: the test can tell them apart"


@pytest.mark.parametrize("x", range(len(LAW)))
def test_without_slack_the_law_is_the_targets(x: int) -> None:
    assert follows(emitted(make("cactus", cactus_delta=0.0), x, seed=x), np.array(LAW))


def raised_by(policy: AcceptancePolicy, p: float) -> float:
    """The probability that the policy gives a token of probability p, found by its verdicts."""
    low, high = 0.0, 1.0
    for _ in range(40):
        uniform = (low + high) / 2
        stands = policy.verdict(one_token(p, 3, uniform), frozenset()).num_accepted
        low, high = (uniform, high) if stands else (low, uniform)
    return p + low * (1 - p)


@pytest.mark.parametrize("delta", [0.0, *LIMITS])
def test_the_divergence_from_the_targets_law_is_bounded(delta: float) -> None:
    policy = make("cactus", cactus_delta=delta)
    for p in (1e-12, 1e-6, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999):
        p = math.exp(float(np.float32(math.log(p))))
        gamma = raised_by(policy, p)
        # The rest is p scaled, so the divergence of the laws is that of x against everything else.
        assert oracles.bernoulli_divergence(min(1.0, gamma), p) <= delta + 1e-6
        assert gamma == pytest.approx(oracles.raised(p, delta), rel=1e-5, abs=1e-9)
        law = [p, 0.6 * (1 - p), 0.4 * (1 - p)]
        raised = oracles.raised_law(law, 0, delta)
        assert sum(raised) == pytest.approx(1)
        divergence = sum(h * math.log(h / share) for h, share in zip(raised, law, strict=True) if h > 0)
        assert divergence <= delta + 1e-6


def test_the_first_formula_alone_would_break_the_bound() -> None:
    p, delta = 0.6, 0.2
    gamma = p + math.sqrt(2 * delta * p * (1 - p))
    assert oracles.bernoulli_divergence(gamma, p) > delta
    assert oracles.bernoulli_divergence(oracles.raised(p, delta), p) == pytest.approx(delta)


@pytest.mark.parametrize("p", [0.0, 1.0, math.nan])
def test_an_impossible_or_certain_token_is_not_raised(p: float) -> None:
    for uniform in (0.0, 0.5):
        assert make("cactus", cactus_delta=99.0).verdict(one_token(p, 3, uniform), frozenset()).num_accepted == 0


def test_a_greedy_request_is_never_loosened() -> None:
    policy, exact = make("cactus", cactus_delta=99.0), make("exact")
    for evidence in random_rounds(30, 1000):
        assert decide(policy, evidence) == decide(exact, evidence)
