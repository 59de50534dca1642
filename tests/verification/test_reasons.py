"""Reasons say what decided: the numbers in the words are those that the rule compared, on random rounds."""

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from fly_trt.acceptance import AcceptanceSettings
from fly_trt.verification import (
    POLICIES,
    PRESETS,
    AcceptancePolicy,
    Decision,
    Evidence,
    Limits,
    explain,
    fly_policy,
    num_agreeing,
)
from fly_trt.verification.policy import percent
from fly_trt.verification.reasons import EXACT_BECAUSE
from random_rounds import HEAD, STOPS, random_rounds
from toy_policy import LikelyPolicy

# Windows that often stand in drafts as short as these.
FLY = {name: fly_policy(name, HEAD.vocab_size, window=2) for name in PRESETS}
RULES: dict[str, AcceptancePolicy] = {f"fly {name}": policy for name, policy in FLY.items()}
RULES |= {
    name: AcceptanceSettings(acceptance=name, conditional_apply_to="all" if name == "conditional" else None).policy(
        HEAD
    )
    for name in POLICIES
    if name != "fly"
}
SHARE = r"(under 0\.1|[\d.]+) %"
NUM_ROUNDS = 400


def text(token: int) -> str:
    return f"<{token}>"


def decisions(policy: AcceptancePolicy, *, is_sampled: bool = False) -> Iterator[tuple[Decision, str]]:
    """Each position that a round decides, up to the target's own token."""
    limits = Limits(STOPS)
    for evidence in random_rounds(7, NUM_ROUNDS, is_sampled=is_sampled):
        wanted = policy.verdict(evidence, STOPS)
        verdict = limits.apply(wanted, evidence)
        for at in range(verdict.num_accepted + (verdict.next_token is not None)):
            if np.isnan(evidence.target.entropy_topk[at]):
                break  # a step that says nothing ends before it
            kind = kind_of(evidence, verdict.num_accepted, at)
            decision = Decision(kind, policy, evidence, at, is_limited=verdict is not wanted)  # type: ignore[arg-type]
            yield decision, explain(decision, limits, text)
        policy.observe(evidence, verdict.num_accepted)


def kind_of(evidence: Evidence, num_accepted: int, at: int) -> str:
    if at < num_accepted:
        return "matched" if evidence.matches[at] else "loosened"
    return "correction" if at < evidence.num_known else "bonus" if at else "plain"


def of_rule(decision: Decision, sentence: str) -> str | None:
    """What the rule itself said of a mismatch that it decided."""
    if decision.kind == "loosened":
        return sentence.removeprefix("loosened: ")
    if decision.kind == "correction" and not re.search("never loosened|must not come", sentence):
        return sentence.split("; ", 1)[1]
    return None


def share(said: str) -> float:
    return 0.05 if said.startswith("under") else float(said)


@pytest.mark.parametrize("name", RULES)
def test_every_token_has_one_line_that_begins_with_its_kind(name: str) -> None:
    policy = RULES[name].for_request()
    kinds: Counter[str] = Counter()
    for decision, sentence in decisions(policy, is_sampled=name == "cactus"):
        kinds[decision.kind] += 1
        assert re.match(rf"{decision.kind}\b", sentence)
        assert "\n" not in sentence
        assert "nan" not in sentence
        if decision.kind == "correction":
            choice = int(decision.evidence.choices[decision.position])
            assert sentence.startswith(f"correction: the target chose “<{choice}>”")
    assert {"matched", "correction", "bonus"} <= kinds.keys()
    assert ("loosened" in kinds) == (name != "exact")


@pytest.mark.parametrize("name", PRESETS)
def test_fly_says_gate_and_window(name: str) -> None:
    policy = FLY[name]
    seen: Counter[tuple[str, bool, bool]] = Counter()
    for decision, sentence in decisions(policy):
        said = of_rule(decision, sentence)
        if said is None:
            continue
        evidence, at = decision.evidence, decision.position
        gate = evidence.target.entropy[at] if policy.use_full_entropy else evidence.target.entropy_topk[at]
        is_over = bool(gate >= policy.entropy_threshold)
        assert said.startswith(f"{gate:.2f} nats, {'over' if is_over else 'under'} the gate of {policy.gate:.2f}")
        agreed = num_agreeing(policy, evidence, at, STOPS)
        found = re.search(r"(\d) of (\d) agree", said)
        if found:
            assert (int(found[1]), int(found[2])) == (agreed, policy.lookahead)
        if decision.kind == "loosened":
            assert found
            assert agreed == policy.lookahead
        elif not is_over:
            assert not found
            assert agreed is None
        seen[decision.kind, is_over, bool(found)] += 1
    assert {("loosened", True, True), ("correction", True, True), ("correction", False, False)} <= seen.keys()
    assert ("correction", True, False) in seen  # too near to the draft's end


@pytest.mark.parametrize("name", ["typical", "conditional"])
def test_what_is_wanted_is_reached_exactly_where_a_token_is_loosened(name: str) -> None:
    for decision, sentence in decisions(RULES[name]):
        if (said := of_rule(decision, sentence)) is not None:
            found = re.fullmatch(rf"{SHARE} probable, {SHARE} wanted at [\d.]+ nats", said)
            assert found, said
            likely, wanted = share(found[1]), share(found[2])
            assert likely >= 0.9 * wanted if decision.kind == "loosened" else likely <= 1.1 * wanted


def test_margin_and_relaxed_and_adaptive_and_cactus_say_their_comparison() -> None:
    for decision, sentence in decisions(RULES["margin"]):
        found = re.search(r"second choice, ([\d.]+|inf) nats behind the first, ([\d.]+) allowed", sentence)
        if decision.kind == "loosened":
            assert found
            assert float(found[1]) <= float(found[2]) + 0.01
        elif found:
            assert float(found[1]) >= float(found[2]) - 0.01
    for decision, sentence in decisions(RULES["relaxed"]):
        found = re.search(rf"(one|not one) of the 3 most probable, {SHARE} beside the best one’s {SHARE}, 60", sentence)
        if decision.kind == "loosened":
            assert found
            assert found[1] == "one"
            assert share(found[2]) >= share(found[3]) - 61
    seen = Counter()
    for decision, sentence in decisions(RULES["adaptive"].for_request()):
        found = re.search(r"distance ([\d.]+), (under|over) the threshold of ([\d.]+)", sentence)
        if found:
            assert found[2] == ("under" if decision.kind == "loosened" else "over")
        seen[decision.kind, bool(found)] += 1
    assert seen["loosened", True]
    assert not seen["loosened", False]
    for decision, sentence in decisions(RULES["cactus"], is_sampled=True):
        if (said := of_rule(decision, sentence)) is not None:
            assert re.fullmatch(rf"{SHARE} probable, kept with {SHARE}", said), said


def test_what_no_rule_may_loosen_is_said_as_such() -> None:
    seen = 0
    for decision, sentence in decisions(RULES["relaxed"]):
        tokens = decision.evidence.draft[decision.position : decision.position + 1].tolist()
        tokens.append(int(decision.evidence.choices[decision.position]))
        if decision.kind == "correction" and not STOPS.isdisjoint(tokens):
            assert sentence.endswith("the end of a text is never loosened")
            seen += 1
    assert seen


def test_guards_and_closed_windows_are_named() -> None:
    limits, policy = Limits(STOPS), RULES["fly reference"]
    for decision, sentence in decisions(policy):
        if of_rule(decision, sentence) is None or decision.kind != "correction":
            continue
        guarded = explain(decision._replace(guard="exact_first"), limits, text)
        assert guarded.endswith("; exact_first wants it exact, though the rule was willing")
        for because, said in EXACT_BECAUSE.items():
            exact = explain(decision._replace(policy=RULES["exact"], exact_because=because), limits, text)
            assert exact.endswith(f"; {said}")


def test_a_rule_that_says_nothing_of_its_own_is_named() -> None:
    sentences = {sentence for decision, sentence in decisions(LikelyPolicy()) if decision.kind == "loosened"}
    assert sentences == {"loosened: by the rule likely"}


def test_texts_without_looks_of_their_own_leave_the_sentence_in_one_line() -> None:
    decision = next(decision for decision, _ in decisions(RULES["exact"]) if decision.kind == "correction")
    sentence = explain(decision, Limits(STOPS), lambda token: "a\n\u202eé\ud800\u2028")
    assert "“a\\n\\u202eé\\ud800\\u2028”" in sentence


def test_probabilities_for_people() -> None:
    said = [percent(value) for value in (0.0, -0.01, -2.5, -6.0, -20.0, float("-inf"), float("nan"))]
    assert said == ["100 %", "99 %", "8.2 %", "0.2 %", "under 0.1 %", "under 0.1 %", ""]
