"""Whether a request's next round may loosen: FLy's window is opened where it pays, by the request's own rounds.

A mismatch with an open gate waits for the tokens of its window, which are drafted and verified for nothing when the
draft leaves the target's way. With a draft that fits, windows lie inside what is drafted anyway; with one that does
not, each costs a step and its drafts, and next to none of them stands. So a request opens windows as long as

    p (L + 1)  >=  X r

p: the chance that a window of L tokens stands, a^L with a the share of draft tokens that are the target's choice, and
then what became of the request's own windows; L + 1: the tokens that one brings; X: what one costs in steps of one
token, less the more of it is drafted anyway; r: the tokens that a step of one token brings without it.

While that does not hold, the request is decoded exactly: first, as long as windows promise at least HOPE of their
price, in rounds that show how well the draft fits, until they have shown enough (but not with a draft model that is
too dear to read the prompt); then for so many tokens that looking again costs TRY_SHARE of them (or the window that
failed did).

This is part of the rule, since it decides tokens. So it rests on what is the same whatever is served beside the
request, however its rounds are cut and however fast the machine is: the rounds that `observe` is given, and two ratios
that are fixed when the engine is built. The published rule is the one that always opens windows.
"""

import math
from dataclasses import dataclass
from functools import cache

# What the costs are taken for where neither the engine nor the caller says anything.
DRAFT_TOKEN_COST = 0.1
VERIFICATION_TOKEN_COST = 0.05

TRY_SHARE = 0.005
MAX_PAUSE_TOKENS = 1024
MEMORY = 0.9  # what a round leaves of the evidence before it
FIRST_AGREEMENT, AGREEMENT_TOKENS = 0.79, 4.0  # taken for granted before the first round, and its weight in tokens
LOOK_TOKENS = 12.0  # draft tokens seen, the first ones included, that are enough to look away
HOPE = 0.35  # the share of their price that windows must promise to be looked at on
FIRST_READING = 0.02  # what reading a prompt's token may cost where nothing but a first look asks for it
CHANCE_WINDOWS = 1.0  # weight of a^L among the request's own windows


@dataclass(frozen=True, slots=True)
class StepCosts:
    """In steps of the target with one token: `draft_token`, a draft token; `verification_token`, each further token of
    a target step."""

    draft_token: float
    verification_token: float

    @property
    def reading(self) -> float:
        """A token of the sequence that the draft model reads."""
        return self.draft_token * self.verification_token

    def of_round(self, num_draft: int) -> float:
        """Drafting and verifying so many tokens."""
        return 1 + num_draft * (self.draft_token + self.verification_token)


@dataclass(slots=True)
class WindowCounts:
    """What one round shows: draft tokens, up to the first that did not stand, which were the target's choice, and
    others; windows that stood, and one that did not."""

    num_agreed: int
    num_differed: int
    num_stood: int
    num_failed: int


class Loosening:
    """One request's windows. Knows lengths and counts; nothing of tokens, engines or clocks.

    resume_at: the length of the sequence up to which it is decoded exactly, in rounds that show nothing here because
    their length follows the load. From there on every round is as long as the rule says and is observed; `is_open` says
    whether it may loosen.
    """

    __slots__ = (
        "_agreed",
        "_costs",
        "_differed",
        "_failed",
        "_lookahead",
        "_num_draft",
        "_stood",
        "is_open",
        "resume_at",
    )

    def __init__(self, costs: StepCosts, lookahead: int, num_draft: int, length: int) -> None:
        """lookahead L: tokens that a window waits for; num_draft: draft tokens of a round; length: of the sequence."""
        self._costs = costs
        self._lookahead = lookahead
        self._num_draft = num_draft
        self._agreed = FIRST_AGREEMENT * AGREEMENT_TOKENS
        self._differed = (1 - FIRST_AGREEMENT) * AGREEMENT_TOKENS
        self._stood = self._failed = 0.0
        self.is_open, self.resume_at = True, length
        self._decide(length, goes_on=self._costs.reading <= FIRST_READING)

    def observe(self, counts: WindowCounts, length: int) -> None:
        """A round ended, with so many tokens in the sequence."""
        self._agreed = MEMORY * self._agreed + counts.num_agreed
        self._differed = MEMORY * self._differed + counts.num_differed
        self._stood = MEMORY * self._stood + counts.num_stood
        self._failed = MEMORY * self._failed + counts.num_failed
        goes_on = not counts.num_failed and self._agreed + self._differed < LOOK_TOKENS
        self._decide(length, has_failed=counts.num_failed > 0, goes_on=goes_on)

    def _decide(self, length: int, *, has_failed: bool = False, goes_on: bool = False) -> None:
        """Opens windows where they pay. Otherwise pauses for as long as makes up for looking again or, where one has
        failed, for the window; `goes_on` looks at the next round already, where there is hope."""
        agreement = self._agreed / (self._agreed + self._differed)
        # To a percent: neighbours in it decide alike, and what is looked up is small.
        paying, speed = _best_exact_round(self._costs, self._num_draft, round(agreement, 2))
        num_tokens = self._lookahead + 1
        cost = max(0.0, 1 - paying / num_tokens) * self._costs.of_round(self._lookahead)
        weight = CHANCE_WINDOWS + self._stood + self._failed
        chance = (CHANCE_WINDOWS * agreement**self._lookahead + self._stood) / weight
        promise, price = chance * num_tokens, cost * speed
        self.is_open = promise >= price
        if self.is_open or (goes_on and promise >= HOPE * price):
            return
        steps = cost if has_failed else self._costs.of_round(1) - 1
        # Before it drafts again, the draft model may have to read all that was decoded without it.
        pause = math.inf if self._costs.reading > TRY_SHARE else steps * speed / TRY_SHARE
        self.resume_at = length + math.ceil(min(pause, MAX_PAUSE_TOKENS))


@cache
def _best_exact_round(costs: StepCosts, most: int, agreement: float) -> tuple[int, float]:
    """The number of draft tokens, 0 .. most, that brings the most tokens per step when each agrees with the target with
    this probability, and how many tokens that is."""
    best, best_speed, expected, chance = 0, 1.0, 1.0, 1.0
    for num_draft in range(1, most + 1):
        chance *= agreement
        expected += chance
        speed = expected / costs.of_round(num_draft)
        if speed > best_speed:
            best, best_speed = num_draft, speed
    return best, best_speed
