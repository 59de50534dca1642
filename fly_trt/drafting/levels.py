"""What stands between two levels of drafting: the lower one guesses, the draft model above verifies it in one step.

A lower level is n-gram lookup, or a draft model with a level of its own. It is told what the level above has written so
far, and which of that is taken back; what became of its guesses it finds out by itself, as every drafter does.
"""

from dataclasses import dataclass
from typing import Protocol

from fly_trt.drafting.base import Drafter
from fly_trt.drafting.ngram import NgramDrafter
from fly_trt.verification import DEFAULT_PRESET, EXACT, PRESETS, AcceptancePolicy

INNER_ACCEPTANCE: dict[str, AcceptancePolicy] = {"exact": EXACT, "fly": PRESETS[DEFAULT_PRESET]}
"""Which guesses of an inner draft model stand, by the name that `inner_acceptance` has."""


class Guesser(Drafter, Protocol):
    """A drafter whose sequences may lose tokens again: those that the level above had drafted and the target did not
    take."""

    def rewind(self, slot: int, num_tokens: int) -> None:
        """Of the sequence in the slot nothing but the first `num_tokens` tokens is known to be left."""
        ...


@dataclass(frozen=True, slots=True)
class Level:
    """The level below a draft model: it is asked for `num_tokens` at a time, and `policy` says which of them stand.

    A loose policy changes what is drafted, and never what an exact target emits."""

    guesser: Guesser
    num_tokens: int
    policy: AcceptancePolicy = EXACT


@dataclass(frozen=True, slots=True)
class Lookup:
    """N-gram lookup as the level below: match lengths, and tokens proposed per match."""

    max_n: int
    min_n: int
    num_tokens: int

    def level(self) -> Level:
        return Level(NgramDrafter(self.max_n, self.min_n), self.num_tokens)
