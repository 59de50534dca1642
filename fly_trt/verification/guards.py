"""What no acceptance rule may loosen: the last word on a verdict, whatever the rule.

A rule says which draft tokens stand; here the first one that differs from the target's choice where it must not ends
the round, with the target's choice in its place. That holds for stop tokens, for tokens that may not come (bad words
and whatever else has no probability), for copies of other sequences' text, for what a grammar forces, whose spelling is
the target's to choose, and for what a request asks to be exact. It knows tokens and, by a function, their text; it
knows nothing of rules.

What is forbidden rests on the sequence alone: on what was committed before the round and on the draft up to the token.
So it is the same however the round is cut.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fly_trt.tokens import IntArray
from fly_trt.verification.policy import DraftSource, Evidence, Verdict
from fly_trt.verification.regions import Region, make_region

BUDGET_TOKENS = 100
NEVER_LOOSENED = frozenset((DraftSource.CORPUS, DraftSource.GRAMMAR))

Piece = Callable[[int], str]
"""The text of one token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardSettings:
    """Where a request is decoded exactly although its rule is loose.

    exact_first: output tokens from the first on. exact_token_ids: never loosened, neither as draft tokens nor as
    choices. exact_within: regions of the output's text, see `regions`. max_loosened_per_100: of any 100 output tokens
    in a row; None means any number.
    """

    exact_first: int = 0
    exact_token_ids: frozenset[int] = frozenset()
    exact_within: Sequence[str] = ()
    max_loosened_per_100: int | None = None

    @property
    def is_empty(self) -> bool:
        return self == GuardSettings()

    def in_force(self) -> dict[str, Any]:
        """Those that are set, as JSON has them."""
        values = {
            "exact_first": self.exact_first,
            "exact_token_ids": sorted(self.exact_token_ids),
            "exact_within": list(self.exact_within),
        }
        given = {name: value for name, value in values.items() if value}
        budget = self.max_loosened_per_100
        return given if budget is None else given | {"max_loosened_per_100": budget}


def check_regions(names: Iterable[str]) -> None:
    """Raises ConfigError for a region that there is not."""
    for name in names:
        make_region(name)


class Guards:
    """Of one sequence. `piece` is asked only where a region of the text is exact."""

    def __init__(self, settings: GuardSettings, piece: Piece) -> None:
        self._settings = settings
        self._piece = piece
        self._regions: list[Region] = [make_region(name) for name in settings.exact_within]
        self._num_output = 0  # tokens before the round
        self._loosened: deque[int] = deque()  # output positions, of the last 100 tokens

    def start_round(self, output: Sequence[int]) -> None:
        """A round follows `output`, the tokens that are committed."""
        for token in output[self._num_output :] if self._regions else ():
            self._read(self._regions, token)
        self._num_output = len(output)
        while self._loosened and self._loosened[0] <= self._num_output - BUDGET_TOKENS:
            self._loosened.popleft()

    def end_round(self, evidence: Evidence, num_kept: int) -> None:
        """A round ended, of which `num_kept` draft tokens are part of the output."""
        if self._settings.max_loosened_per_100 is not None:
            self._loosened.extend((self._num_output + _differing(evidence, num_kept)).tolist())

    def that_forbids(self, evidence: Evidence, position: int) -> str | None:
        """The guard, by its setting, because of which the draft token at `position`, which differs from the target's
        choice, must not stand; of several the first one. None where it may stand."""
        settings = self._settings
        tokens = int(evidence.draft[position]), int(evidence.choices[position])
        if self._num_output + position < settings.exact_first:
            return "exact_first"
        if not settings.exact_token_ids.isdisjoint(tokens):
            return "exact_token_ids"
        if self._is_over_budget(evidence, position):
            return "max_loosened_per_100"
        return "exact_within" if self._is_within(evidence, position, tokens) else None

    def _is_over_budget(self, evidence: Evidence, position: int) -> bool:
        most = self._settings.max_loosened_per_100
        if most is None:
            return False
        oldest = self._num_output + position - BUDGET_TOKENS
        num_before = sum(1 for at in self._loosened if at > oldest)
        return num_before + len(_differing(evidence, position)) >= most

    def _is_within(self, evidence: Evidence, position: int, tokens: tuple[int, int]) -> bool:
        if not self._regions:
            return False
        regions = [region.copy() for region in self._regions]
        for token in evidence.draft[:position].tolist():
            self._read(regions, token)
        pieces = [self._text(token) for token in tokens]
        return any(region.has(piece) for region in regions for piece in pieces)

    def _read(self, regions: Iterable[Region], token: int) -> None:
        piece = self._text(token)
        for region in regions:
            region.read(piece)

    def _text(self, token: int) -> str:
        return self._piece(token) if token >= 0 else ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds in one round: `never_loosened` tokens, the sequence's own `guards`, and whether copied draft tokens
    stand only where they are the target's choice."""

    never_loosened: frozenset[int]
    guards: Guards | None = None
    exact_copies: bool = False

    @property
    def are_beyond_the_head(self) -> bool:
        """Whether more is forbidden than stop tokens, which an engine's head knows."""
        return self.guards is not None or self.exact_copies

    def forbid(self, evidence: Evidence, position: int) -> bool:
        """Whether the draft token at `position`, which differs from the target's choice, must not stand."""
        if self._are_beyond_guards(evidence, position):
            return True
        return self.guards is not None and self.guards.that_forbids(evidence, position) is not None

    def guard_that_forbids(self, evidence: Evidence, position: int) -> str | None:
        """The guard, by its setting, without which that token might stand."""
        if self.guards is None or self._are_beyond_guards(evidence, position):
            return None
        return self.guards.that_forbids(evidence, position)

    def _are_beyond_guards(self, evidence: Evidence, position: int) -> bool:
        """Whether the token must not stand in whatever sequence."""
        tokens = int(evidence.draft[position]), int(evidence.choices[position])
        if not self.never_loosened.isdisjoint(tokens) or np.isneginf(evidence.target.draft_logprob[position]):
            return True
        source = evidence.sources[position]
        return source in NEVER_LOOSENED or (self.exact_copies and source != DraftSource.MODEL)

    def apply(self, verdict: Verdict, evidence: Evidence) -> Verdict:
        """The verdict, or the shorter one that ends where a token stands, or waits to, that must not."""
        reached = min(verdict.num_accepted + (verdict.next_token is None), evidence.num_known)
        for position in _differing(evidence, reached).tolist():
            if self.forbid(evidence, position):
                return Verdict(position, int(evidence.choices[position]))
        return verdict


def make_guards(settings: GuardSettings, piece: Piece) -> Guards | None:
    """None where nothing is asked for. Raises ConfigError for a region that there is not."""
    return None if settings.is_empty else Guards(settings, piece)


def _differing(evidence: Evidence, end: int) -> IntArray:
    """The first `end` positions where the draft token is not the target's choice."""
    return np.flatnonzero(evidence.draft[:end] != evidence.choices[:end])
