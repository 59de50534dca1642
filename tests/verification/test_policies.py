"""Every acceptance policy against its definition one position at a time, on random rounds with ties, impossible tokens,
stop tokens and positions that say nothing."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import policy_oracles as oracles
from fly_trt.verification import NOTHING, AcceptancePolicy, DraftSource, Evidence
from policy_oracles import Answer
from random_rounds import STOPS, TOP_K, VOCAB_SIZE, assert_follows, beginning, decide, make, random_rounds, stands

NUM_CASES = 10_000
CASES_A_SETTING = 10
IS_SAMPLED = {"cactus"}


# --- what each rule says of a round's positions -----------------------------------------------------------------------


def probabilities(logprobs: np.ndarray) -> list[float]:
    return [math.exp(logprob) for logprob in logprobs.tolist()]


def fly_rule(e: Evidence, preset: str, theta: float, window: int) -> list[Answer]:
    is_full, theta, window, lookahead = oracles.fly_numbers(preset, VOCAB_SIZE, theta, window)
    gate = e.target.entropy if is_full else e.target.entropy_topk
    matches = (e.draft == e.choices[: len(e.draft)]).tolist()
    return list(oracles.fly(matches, gate.tolist(), e.num_draft, theta, window, lookahead))


def relaxed_rule(e: Evidence, top_n: int, delta: float) -> list[Answer]:
    p, p_max = probabilities(e.target.draft_logprob), probabilities(e.target.argmax_logprob)
    top = e.target.top_ids.tolist()
    return [oracles.relaxed(x, p[j], p_max[j], top[j], top_n, delta) for j, x in enumerate(e.draft.tolist())]


def typical_rule(e: Evidence, epsilon: float, alpha: float) -> list[Answer]:
    p, entropy = probabilities(e.target.draft_logprob), e.target.entropy.tolist()
    return [oracles.typical(p[j], entropy[j], epsilon, alpha) for j in range(len(e.draft))]


def conditional_rule(e: Evidence, alpha: float, beta: float, floor: float, apply_to: str) -> list[Answer]:
    p, p_max = probabilities(e.target.draft_logprob), probabilities(e.target.argmax_logprob)
    entropy, applies = e.target.entropy.tolist(), (e.sources == DraftSource.LOOKUP) | (apply_to == "all")
    return [
        bool(applies[j]) and oracles.conditional(p[j], p_max[j], entropy[j], alpha, beta, floor)
        for j in range(len(e.draft))
    ]


def margin_rule(e: Evidence, threshold: float) -> list[Answer]:
    ids, logprobs = e.target.top_ids.tolist(), e.target.top_logprobs.tolist()
    return [oracles.margin(x, ids[j], logprobs[j], threshold) for j, x in enumerate(e.draft.tolist())]


def cactus_rule(e: Evidence, delta: float) -> list[Answer]:
    p, uniforms = probabilities(e.target.draft_logprob), e.target.uniforms.tolist()
    return [oracles.cactus(p[j], uniforms[j], delta) for j in range(len(e.draft))]


Rule = Callable[..., list[Answer]]
RULES: dict[str, tuple[Rule, Callable[[np.random.Generator], dict[str, Any]]]] = {
    "fly": (
        fly_rule,
        lambda rng: {
            "preset": str(rng.choice(["reference", "paper", "vllm"])),
            "fly_entropy_threshold": float(rng.choice([0.0, 0.1, 0.3, 0.7])),
            "fly_window_size": int(rng.integers(0, 4)),
        },
    ),
    "relaxed": (
        relaxed_rule,
        lambda rng: {
            "relaxed_top_n": int(rng.integers(1, TOP_K + 1)),
            "relaxed_delta": float(rng.choice([0, 0.1, 0.6, 1])),
        },
    ),
    "typical": (
        typical_rule,
        lambda rng: {
            "typical_threshold": float(rng.choice([0.02, 0.09, 0.5])),
            "typical_alpha": float(rng.uniform(0.05, 0.9)),
        },
    ),
    "conditional": (
        conditional_rule,
        lambda rng: {
            "conditional_alpha": float(rng.choice([0.0, 0.1, 0.3])),
            "conditional_beta": float(rng.uniform(0, 1)),
            "conditional_floor": float(rng.choice([0.0, 0.01, 0.2])),
            "conditional_apply_to": str(rng.choice(["ngram", "all"])),
        },
    ),
    "margin": (margin_rule, lambda rng: {"margin_threshold": float(rng.choice([0.0, 0.25, 0.5, 1.0]))}),
    "cactus": (cactus_rule, lambda rng: {"cactus_delta": float(rng.choice([0.0, 0.05, 0.75, 1.0, 3.0]))}),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "fly": {"preset": "reference", "fly_entropy_threshold": 0.3, "fly_window_size": 6},
    "relaxed": {"relaxed_top_n": 3, "relaxed_delta": 0.6},
    "typical": {"typical_threshold": 0.09, "typical_alpha": 0.3},
    "conditional": {
        "conditional_alpha": 0.1,
        "conditional_beta": 0.4,
        "conditional_floor": 0.01,
        "conditional_apply_to": "ngram",
    },
    "margin": {"margin_threshold": 0.5},
    "cactus": {"cactus_delta": 0.75},
}


@pytest.mark.parametrize("name", RULES)
def test_a_policy_follows_its_definition(name: str) -> None:
    rule, random_settings = RULES[name]
    rng = np.random.default_rng(1)
    num_loosened, num_open = 0, 0
    settings, policy = DEFAULTS[name], make(name)
    for case, evidence in enumerate(random_rounds(2, NUM_CASES, is_sampled=name in IS_SAMPLED)):
        if case and case % CASES_A_SETTING == 0:
            settings = random_settings(rng)
            policy = make(name, **settings)
        answers = stands(evidence, rule(evidence, *settings.values()))
        verdict = decide(policy, evidence)
        assert_follows(verdict, evidence, answers)
        num_loosened += evidence.num_loosened(verdict.num_accepted)
        num_open += answers.count(None)
    assert num_loosened > NUM_CASES / 50, "the cases exercise the rule"
    assert num_open < NUM_CASES / 50, "the definition decides"


@pytest.mark.parametrize("name", RULES)
def test_the_default_settings_are_the_sources(name: str) -> None:
    rule, _ = RULES[name]
    policy = make(name)
    for evidence in random_rounds(3, 1000, is_sampled=name in IS_SAMPLED):
        assert_follows(decide(policy, evidence), evidence, stands(evidence, rule(evidence, *DEFAULTS[name].values())))


def test_exact_accepts_what_the_target_chose() -> None:
    for is_sampled in (False, True):
        for evidence in random_rounds(4, NUM_CASES // 2, is_sampled=is_sampled):
            answers = stands(evidence, [False] * len(evidence.draft))
            assert_follows(decide(make("exact"), evidence), evidence, answers)


def test_a_sampled_request_is_loosened_by_the_same_definitions() -> None:
    for name in RULES:
        rule, _ = RULES[name]
        policy = make(name)
        for evidence in random_rounds(5, 1000, is_sampled=True):
            answers = stands(evidence, rule(evidence, *DEFAULTS[name].values()))
            assert_follows(decide(policy, evidence), evidence, answers)


# --- what holds of every rule -----------------------------------------------------------------------------------------

LOOSE = [*RULES, "adaptive"]


def rounds_of(name: str, seed: int, num: int) -> Iterator[Evidence]:
    return random_rounds(seed, num, is_sampled=name in IS_SAMPLED)


def seasoned(name: str, **settings: Any) -> AcceptancePolicy:
    """A request's policy after rounds that it learned from, if it learns."""
    policy = make(name, **settings).for_request()
    for evidence in rounds_of(name, 7, 50):
        policy.observe(evidence, len(evidence.draft))
    return policy


@pytest.mark.parametrize("name", LOOSE)
def test_a_policy_accepts_at_least_what_exact_accepts(name: str) -> None:
    exact, policy = make("exact"), seasoned(name, **({"fly_window_size": 2} if name == "fly" else {}))
    num_more = 0
    for evidence in rounds_of(name, 8, 2000):
        least, accepted = decide(exact, evidence).num_accepted, decide(policy, evidence).num_accepted
        assert accepted >= least, evidence
        num_more += accepted > least
    assert num_more > 20


@pytest.mark.parametrize("name", [*LOOSE, "exact"])
def test_a_verdict_on_a_beginning_never_differs_from_the_one_on_the_whole(name: str) -> None:
    policy = seasoned(name)
    for whole in rounds_of(name, 9, 200):
        final = decide(policy, whole)
        assert final.next_token is not None
        for d in range(len(whole.draft) + 1):
            furthest = 0
            for v in range(len(whole.draft) + 2):
                part = decide(policy, beginning(whole, d, v))
                assert furthest <= part.num_accepted <= min(final.num_accepted, d, v), (whole, d, v)
                assert part.next_token is None or part == final, (whole, d, v)
                furthest = part.num_accepted
        assert decide(policy, whole) == final, "a verdict changes nothing"


@pytest.mark.parametrize("name", LOOSE)
def test_what_a_policy_does_not_ask_for_makes_no_difference(name: str) -> None:
    policy = seasoned(name)
    for evidence in rounds_of(name, 10, 1000):
        lacking = without(evidence, policy)
        assert decide(policy, lacking) == decide(policy, evidence), evidence


def without(evidence: Evidence, policy: AcceptancePolicy) -> Evidence:
    """The same round of an engine that gives only what the policy needs."""
    target, scores = evidence.target, evidence.scores
    if not policy.needs_top:
        target = target._replace(top_ids=np.full_like(target.top_ids, -1))
        target = target._replace(top_logprobs=np.full_like(target.top_logprobs, np.nan))
    if not policy.needs_uniforms:
        target = target._replace(uniforms=np.full_like(target.uniforms, np.nan))
    if not policy.use_full_entropy:
        target = target._replace(entropy=np.full_like(target.entropy, np.nan))
    if not policy.needs_draft_scores:
        blank = (np.full_like(array, -1 if array.dtype == np.int64 else np.nan) for array in scores)
        scores = type(scores)(*blank)
    return replace(evidence, target=target, scores=scores)


TIGHTER_TO_LOOSER: list[tuple[str, str, list[Any], dict[str, Any]]] = [
    ("fly", "fly_entropy_threshold", [0.9, 0.5, 0.3, 0.0], {"fly_window_size": 1}),
    ("fly", "fly_window_size", [6, 3, 2, 1, 0], {"fly_entropy_threshold": 0.1}),
    ("relaxed", "relaxed_top_n", [1, 2, 3, 4], {}),
    ("relaxed", "relaxed_delta", [0.0, 0.05, 0.2, 0.6, 1.0], {}),
    ("typical", "typical_threshold", [0.4, 0.25, 0.09, 0.01], {"typical_alpha": 0.9}),
    ("typical", "typical_alpha", [0.9, 0.6, 0.3, 0.05], {"typical_threshold": 0.5}),
    ("conditional", "conditional_alpha", [0.0, 0.05, 0.1, 0.3], {}),
    ("conditional", "conditional_beta", [0.5, 0.4, 0.3, 0.1], {"conditional_apply_to": "all"}),
    ("conditional", "conditional_floor", [0.4, 0.2, 0.05, 0.0], {"conditional_beta": 0.0}),
    ("conditional", "conditional_apply_to", ["ngram", "all"], {}),
    ("margin", "margin_threshold", [0.0, 0.25, 0.5, 2.0], {}),
    ("adaptive", "adaptive_max_distance", [0.02, 0.05, 0.1, 0.2], {}),
    ("cactus", "cactus_delta", [0.0, 0.1, 0.75, 1.0, 3.0], {}),
]


@pytest.mark.parametrize(
    ("name", "setting", "values", "others"), TIGHTER_TO_LOOSER, ids=[setting for _, setting, *_ in TIGHTER_TO_LOOSER]
)
def test_a_looser_setting_accepts_no_less(name: str, setting: str, values: list[Any], others: dict[str, Any]) -> None:
    policies = [seasoned(name, **{setting: value}, **others) for value in values]
    totals = np.zeros(len(values), np.int64)
    for evidence in rounds_of(name, 11, 1000):
        accepted = [decide(policy, evidence).num_accepted for policy in policies]
        assert accepted == sorted(accepted), evidence
        totals += accepted
    assert (np.diff(totals) > 0).all(), "each step of the setting loosens something"


# --- edges ------------------------------------------------------------------------------------------------------------


def one_position(p: float, rival: float, x: int = 5, choice: int = 4, **changed: Any) -> Evidence:
    """A draft of one token x of log-probability p, where the target chose another of log-probability `rival`."""
    said = {
        "choices": [choice, 1],
        "entropy": [0.0, 0.0],
        "entropy_topk": [0.0, 0.0],
        "argmax_logprob": [rival, rival],
        "draft_logprob": [p, np.nan],
        "top_ids": [[choice, x, 8], [1, 2, 3]],
        "top_logprobs": [[rival, p, -9.0], [0.0, -np.inf, -np.inf]],
        "uniforms": [0.0, 0.0],
    }
    kinds = {"choices": np.int64, "top_ids": np.int64, "uniforms": np.float64}
    arrays = {name: np.array(changed.get(name, value), kinds.get(name, np.float32)) for name, value in said.items()}
    return Evidence(
        1,
        draft=np.array([x]),
        sources=np.array([changed.get("source", DraftSource.LOOKUP)], np.uint8),
        target=NOTHING._replace(**arrays),
    )


def accepts(name: str, evidence: Evidence, **settings: Any) -> bool:
    return decide(make(name, **settings), evidence).num_accepted == 1


HALF = float(np.log(np.float32(0.5)))
BELOW_HALF = float(np.nextafter(np.float32(HALF), np.float32(-1)))


def test_a_tie_is_as_probable() -> None:
    assert accepts("relaxed", one_position(HALF, HALF), relaxed_delta=0.0, relaxed_top_n=2)
    assert not accepts("relaxed", one_position(BELOW_HALF - 1e-5, HALF), relaxed_delta=0.0, relaxed_top_n=2)
    assert accepts("margin", one_position(HALF, HALF), margin_threshold=0.0)
    assert not accepts("margin", one_position(BELOW_HALF, HALF), margin_threshold=0.0)
    strict = {"conditional_alpha": 0.0, "conditional_beta": 1.0}
    assert accepts("conditional", one_position(HALF, HALF), **strict)
    assert not accepts("conditional", one_position(BELOW_HALF - 1e-5, HALF), **strict)


def test_the_threshold_itself_is_near_enough() -> None:
    assert accepts("margin", one_position(-1.5, -1.0), margin_threshold=0.5)
    assert not accepts("margin", one_position(float(np.nextafter(np.float32(-1.5), np.float32(-2))), -1.0))
    assert accepts("typical", one_position(0.0, -np.inf), typical_threshold=1.0, typical_alpha=1.0)


def test_a_threshold_is_compared_as_the_engine_gives_numbers() -> None:
    gate = float(np.float32(0.3))
    evidence = one_position(-2.0, -1.0, entropy_topk=[gate, gate])
    assert accepts("fly", evidence, fly_window_size=0, fly_entropy_threshold=0.3)
    assert accepts("fly", evidence, fly_window_size=0, fly_entropy_threshold=0.0)


def test_the_floor_holds_where_the_formula_accepts_anything() -> None:
    unsure = {"entropy": [4.5, 0.0]}
    assert not accepts("conditional", one_position(-5.0, -3.0, **unsure))
    assert accepts("conditional", one_position(-4.5, -3.0, **unsure))
    assert accepts("conditional", one_position(-20.0, -3.0, **unsure), conditional_floor=0.0)


def test_conditional_is_for_tokens_that_were_looked_up_unless_it_says_all() -> None:
    assert not accepts("conditional", one_position(-0.75, -0.7, source=DraftSource.MODEL))
    assert accepts("conditional", one_position(-0.75, -0.7, source=DraftSource.MODEL), conditional_apply_to="all")


LOOSEST: dict[str, dict[str, Any]] = {
    "fly": {"fly_entropy_threshold": 0.0, "fly_window_size": 0},
    "relaxed": {"relaxed_delta": 1.0},
    "typical": {"typical_threshold": 0.0},
    "conditional": {"conditional_beta": 0.0, "conditional_floor": 0.0},
    "margin": {"margin_threshold": 99.0},
    "cactus": {"cactus_delta": 99.0},
}


@pytest.mark.parametrize("name", LOOSEST)
def test_the_loosest_rule_keeps_the_guards(name: str) -> None:
    (stop,) = STOPS
    settings = LOOSEST[name]
    assert accepts(name, one_position(-1.0, -0.5), **settings)
    assert not accepts(name, one_position(-1.0, -0.5, x=stop), **settings)
    assert not accepts(name, one_position(-1.0, -0.5, choice=stop), **settings)
    assert not accepts(name, one_position(-np.inf, -0.5), **settings)
    assert not accepts(name, one_position(-1.0, -0.5, source=DraftSource.CORPUS), **settings)


@pytest.mark.parametrize("apply_to", ["ngram", "all"])
def test_conditional_without_slack_is_exact(apply_to: str) -> None:
    settings = {"conditional_alpha": 0.0, "conditional_beta": 1.0, "conditional_apply_to": apply_to}
    for evidence in random_rounds(12, 1000):
        runner_up = evidence.target.top_logprobs[: len(evidence.draft), 1]
        if (runner_up == evidence.target.argmax_logprob[: len(evidence.draft)]).any():
            continue  # a tied token is as probable as the choice
        assert decide(make("conditional", **settings), evidence) == decide(make("exact"), evidence)
