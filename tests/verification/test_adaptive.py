"""The adaptive rule: its distance is a bound, its threshold belongs to the request, and it does not feed itself."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

import policy_oracles as oracles
from fly_trt.verification import AdaptivePolicy, DraftScores, DraftSource, Evidence, Positions
from random_rounds import VOCAB_SIZE, assert_follows, decide, log_softmax, make, random_rounds, stands, top_of

NUM_CASES = 10_000
ROUNDS_A_REQUEST = 50


def distances(e: Evidence) -> list[float]:
    """The bound of each draft token, nan where either side says nothing."""
    sides = (e.target.top_ids, e.target.top_logprobs, e.scores.top_ids, e.scores.top_logprobs)
    found = []
    for ids, logprobs, their_ids, their_logprobs in zip(
        *(side[: len(e.draft)].tolist() for side in sides), strict=True
    ):
        if math.isnan(logprobs[0]) or math.isnan(their_logprobs[0]):
            found.append(math.nan)
            continue
        p = dict(zip(ids, map(math.exp, logprobs), strict=True))
        q = dict(zip(their_ids, map(math.exp, their_logprobs), strict=True))
        found.append(oracles.distance_bound(p, q))
    return found


def matches_of(e: Evidence) -> list[bool]:
    agrees: list[bool] = (e.draft == e.choices[: len(e.draft)]).tolist()
    return agrees


@pytest.mark.parametrize("is_sampled", [False, True])
def test_the_policy_follows_its_definition_round_after_round(is_sampled: bool) -> None:
    num_loosened, num_open = 0, 0
    for case, evidence in enumerate(random_rounds(20, NUM_CASES // 2, is_sampled=is_sampled)):
        if case % ROUNDS_A_REQUEST == 0:
            given = [None, 1.0, 0.2][case // ROUNDS_A_REQUEST % 3]
            policy = make("adaptive", adaptive_max_distance=given).for_request()
            oracle = oracles.Adaptive(0.5 if given is None else given)
        apart = distances(evidence)
        answers = stands(evidence, [oracle.stands(d) for d in apart])
        verdict = decide(policy, evidence)
        assert_follows(verdict, evidence, answers)
        policy.observe(evidence, verdict.num_accepted)
        oracle.observe(matches_of(evidence), apart, verdict.num_accepted)
        num_loosened += evidence.num_loosened(verdict.num_accepted)
        num_open += answers.count(None)
    assert num_loosened > NUM_CASES / 100
    assert num_open < NUM_CASES / 1000


# --- the bound --------------------------------------------------------------------------------------------------------


def test_the_bound_is_never_above_the_distance_and_is_the_distance_where_all_is_named() -> None:
    rng = np.random.default_rng(21)
    gaps = []
    for case in range(NUM_CASES // 4):
        scores = rng.normal(size=VOCAB_SIZE) * rng.choice([0.3, 1.0, 4.0])
        pair = np.array([scores, scores + rng.normal(size=VOCAB_SIZE) * rng.choice([0.0, 0.1, 1.0, 4.0])])
        p, q = log_softmax(pair)
        exact = oracles.distance(np.exp(p).tolist(), np.exp(q).tolist())
        k = 1 + case % VOCAB_SIZE
        tops = (top_of(p, k), top_of(q, k))
        sides = [dict(zip(ids.tolist(), np.exp(logprobs).tolist(), strict=True)) for ids, logprobs in tops]
        bound = oracles.distance_bound(*sides)
        assert bound <= exact + 1e-7
        if k == VOCAB_SIZE:
            assert bound == pytest.approx(exact, abs=1e-7)
        elif k == 4:
            gaps.append(exact - bound)
    assert np.median(gaps) < 0.1, "the bound says something"


def test_the_bound_of_disjoint_certainties_is_one_and_of_equals_zero() -> None:
    assert oracles.distance_bound({1: 1.0, 2: 0.0}, {3: 1.0, 2: 0.0}) == 1
    assert oracles.distance_bound({1: 0.5, 2: 0.3}, {2: 0.3, 1: 0.5}) == 0
    assert oracles.distance([0.5, 0.5, 0], [0, 0.5, 0.5]) == pytest.approx(math.sqrt(0.5))


# --- the guard against drift ------------------------------------------------------------------------------------------

NUM_TOKENS = 10_000
MATCH_SHARE = 0.2
SCALE = 0.02
FIRST_ID = 4  # no stop token
SHIFTS = np.linspace(0, 0.5, 2001)


def distances_of(laws: Callable[[float], tuple[list[float], list[float]]]) -> np.ndarray:
    return np.array([oracles.distance(*laws(shift)) for shift in SHIFTS.tolist()])


def differing(shift: float) -> tuple[list[float], list[float]]:
    """The target's and the draft model's law of two tokens, each with a favourite of its own."""
    return [0.5 - shift, 0.5 + shift], [0.5 + shift, 0.5 - shift]


def agreeing(shift: float) -> tuple[list[float], list[float]]:
    return [1 - shift, shift], [1.0, 0.0]


DISTANCES = {laws: distances_of(laws) for laws in (differing, agreeing)}


def one_token(laws: Callable[[float], tuple[list[float], list[float]]], distance: float) -> Evidence:
    """A round of one draft token, the draft model's favourite, whose two laws are `distance` apart and wholly named."""
    p, q = laws(float(np.interp(distance, DISTANCES[laws], SHIFTS)))
    with np.errstate(divide="ignore"):
        (ids, logprobs), (their_ids, their_logprobs) = (top_of(np.log(law).astype(np.float32), 2) for law in (p, q))
        draft_logprob = np.log(np.array([p[their_ids[0]], 1]))
    ids, their_ids = ids + FIRST_ID, their_ids + FIRST_ID
    target = Positions(
        choices=ids[:1].repeat(2),
        entropy=np.full(2, np.nan, np.float32),
        entropy_topk=np.zeros(2, np.float32),
        argmax_logprob=logprobs[:1].repeat(2),
        draft_logprob=draft_logprob.astype(np.float32),
        top_ids=np.array([ids, ids]),
        top_logprobs=np.array([logprobs, logprobs]),
        uniforms=np.full(2, np.nan),
    )
    scores = DraftScores(np.zeros(1, np.float32), their_logprobs[:1], their_ids[None], their_logprobs[None])
    return Evidence(1, draft=their_ids[:1], sources=np.zeros(1, np.uint8), scores=scores, target=target)


def stream(seed: int) -> Iterator[tuple[bool, float]]:
    """Whether the draft token matches, and the distance: both of laws that stay the same. Most mismatches are near, a
    few far, so that every threshold has more of them above it."""
    rng = np.random.default_rng(seed)
    for _ in range(NUM_TOKENS):
        if rng.random() < MATCH_SHARE:
            yield True, SCALE * rng.random()
        else:
            yield False, min(0.99, SCALE * (1 + rng.pareto(1.5)))


def test_the_threshold_does_not_drift_over_10000_tokens() -> None:
    tokens = list(stream(22))
    policy = make("adaptive", adaptive_max_distance=1.0).for_request()
    loosened = np.zeros(NUM_TOKENS, bool)
    for t, (match, distance) in enumerate(tokens):
        evidence = one_token(agreeing if match else differing, distance)
        accepted = decide(policy, evidence).num_accepted
        assert accepted or not match
        loosened[t] = evidence.num_loosened(accepted)
        policy.observe(evidence, accepted)
    first, last = loosened[:2000].mean(), loosened[-2000:].mean()
    noise = math.sqrt(2 * loosened.mean() * (1 - loosened.mean()) / 2000)
    assert abs(last - first) < 3.5 * noise

    matches = np.array([distance for match, distance in tokens if match])
    mismatches = np.array([distance for match, distance in tokens if not match])
    threshold = (matches.mean() + mismatches.mean()) / 2
    assert loosened.mean() == pytest.approx((1 - MATCH_SHARE) * (mismatches < threshold).mean(), abs=0.03)

    # The paper's groups, by what was accepted, on the same tokens: the test above would see them drift.
    fed = oracles.UnguardedAdaptive(1.0)
    thresholds, stood = [], np.zeros(NUM_TOKENS, bool)
    for t, (match, distance) in enumerate(tokens):
        thresholds.append(fed.threshold)
        stood[t] = not match and fed.stands(distance) is True
        fed.observe([match], [distance], int(match or stood[t]))
    assert thresholds[-1] > 1.2 * thresholds[2000] > 2 * threshold
    assert stood[-2000:].mean() > 1.5 * last


def test_requests_do_not_share_what_they_learned() -> None:
    shared = make("adaptive")
    learned, fresh = shared.for_request(), shared.for_request()
    near = one_token(differing, 0.05)
    for evidence in (one_token(agreeing, 0.01), one_token(differing, 0.4)):
        assert decide(learned, near).num_accepted == 0, "both groups have a member before anything is loosened"
        learned.observe(evidence, decide(learned, evidence).num_accepted)
    assert decide(learned, near).num_accepted == 1
    for untouched in (fresh, shared.for_request()):
        assert decide(untouched, near).num_accepted == 0


def test_a_named_bound_caps_the_threshold() -> None:
    for given, distance, accepted in [(None, 0.45, 1), (None, 0.55, 0), (0.1, 0.09, 1), (0.1, 0.11, 0), (1.0, 0.55, 1)]:
        policy = make("adaptive", adaptive_max_distance=given).for_request()
        for far in (one_token(agreeing, 0.4), one_token(differing, 0.98)):
            policy.observe(far, 0)
        assert decide(policy, one_token(differing, distance)).num_accepted == accepted, (given, distance)


def test_a_token_without_draft_scores_is_never_loosened() -> None:
    policy = make("adaptive").for_request()
    for evidence in (one_token(agreeing, 0.01), one_token(differing, 0.4)):
        policy.observe(evidence, 0)
    near = one_token(differing, 0.05)
    unscored = DraftScores(*(np.full_like(a, -1 if a.dtype == np.int64 else np.nan) for a in near.scores))
    assert decide(policy, near).num_accepted == 1
    for source in (DraftSource.LOOKUP, DraftSource.CORPUS):
        copied = replace(near, sources=np.array([source], np.uint8), scores=unscored)
        assert decide(policy, copied).num_accepted == 0


def test_tokens_of_a_drafter_that_scores_none_are_not_loosened() -> None:
    policy = AdaptivePolicy().for_request()
    said = Positions(np.array([1, 2, 3]), *np.zeros((4, 3), np.float32), np.ones((3, 3), np.int64), np.zeros((3, 3)))
    for scores in (DraftScores.none(0), DraftScores.none(2)):
        evidence = Evidence(2, draft=np.array([1, 5]), sources=np.zeros(2, np.uint8), scores=scores, target=said)
        assert policy.verdict(evidence, frozenset()).num_accepted == 1
        policy.observe(evidence, 1)
    assert policy.threshold == 0
