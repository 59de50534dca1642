"""Why a token came to be, in words: one sentence for each, from the numbers that decided.

What a rule says of a mismatch is `AcceptancePolicy.why`, the rule's own; the rest is the same for all of them. It knows
one round, by arrays, and nothing of requests or engines.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from fly_trt.outputs import TokenKind
from fly_trt.verification.guards import Limits
from fly_trt.verification.policy import AcceptancePolicy, Evidence, percent

EXACT_BECAUSE = {
    "windows": "windows do not pay here, so it is exact for a while",
    "breaker": "the circuit breaker is tripped, so it is exact",
}


class Decision(NamedTuple):
    """One position of a round that is decided. exact_because: of a round that is exact although its request is loose,
    one of EXACT_BECAUSE. is_limited: the rule wanted a token to stand that must not; guard: the setting that says so,
    where it is one."""

    kind: TokenKind
    policy: AcceptancePolicy
    evidence: Evidence
    position: int
    exact_because: str | None = None
    is_limited: bool = False
    guard: str | None = None


def explain(decision: Decision, limits: Limits, text: Callable[[int], str]) -> str:
    """The sentence, such as "loosened: 1.20 nats, over the gate of 0.30; 5 of 5 agree after it". text: of a token."""
    kind, policy, evidence, at = decision[:4]
    if kind == "plain":
        return "plain: nothing was drafted here"
    if kind == "bonus":
        return "bonus: the whole draft stood, so the target’s own token comes free"
    choice = int(evidence.choices[at])
    likely = percent(choice_logprob(evidence, at))
    if kind == "matched":
        return f"matched: the target’s own choice, with {likely}" if likely else "matched: the target’s own choice"
    if kind == "loosened":
        return f"loosened: {policy.why(evidence, at)}"
    chosen = f"correction: the target chose {_quoted(text(choice))}" + (f" with {likely}" if likely else "")
    return f"{chosen}; {_objection(decision, limits) or policy.why(evidence, at)}"


def num_agreeing(policy: AcceptancePolicy, evidence: Evidence, position: int, stops: frozenset[int]) -> int | None:
    """How many tokens in a row agree after a mismatch, of those that the rule waits for. None where it waits for none:
    what lies behind a token that is rejected at once may not have been looked at. stops: tokens that are never
    loosened."""
    if not policy.lookahead or not policy.opens_window(evidence, position, stops):
        return None
    ahead = evidence.matches[position + 1 : position + 1 + policy.lookahead]
    return len(ahead) if ahead.all() else int(ahead.argmin())


def choice_logprob(evidence: Evidence, position: int) -> float:
    """Of the target's choice at a position, in nats; NaN where nothing says it."""
    said, choice = evidence.target, evidence.choices[position]
    if said.top_ids.size:
        named = (said.top_ids[position] == choice).nonzero()[0]
        if len(named):
            return float(said.top_logprobs[position, named[0]])
    if position < evidence.num_known and evidence.draft[position] == choice:
        return float(said.draft_logprob[position])
    return math.nan


def _objection(decision: Decision, limits: Limits) -> str | None:
    """What stands above the rule and speaks against a draft token."""
    _, policy, evidence, at = decision[:4]
    if decision.guard is not None:
        return f"{decision.guard} wants it exact, though the rule was willing"
    if decision.exact_because is not None:
        return EXACT_BECAUSE[decision.exact_because]
    if not policy.is_loose:
        return None
    if not limits.never_loosened.isdisjoint((int(evidence.draft[at]), int(evidence.choices[at]))):
        return "the end of a text is never loosened"
    if math.isinf(evidence.target.draft_logprob[at]):
        return "what was drafted must not come here"
    return "what comes from elsewhere is never loosened" if decision.is_limited else None


def _quoted(text: str) -> str:
    """In one line, with what has no looks of its own as its code."""
    shown = (letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    return f"“{''.join(shown)}”"
