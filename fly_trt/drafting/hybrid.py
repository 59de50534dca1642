"""Copies where the sequence has a match that is worth it, and the draft model's text everywhere else.

A copy goes straight to the target, which is the only one to verify it: it costs nothing to draft, and where it stands
it is longer than what a draft model would be asked for. What a round is, copy or model, is decided when it begins and
kept. A copied token stands only where it is the target's choice, unless the acceptance rule is meant for copies. What
others emitted is not copied: it would displace drafts of the model that stand longer.
"""

from collections.abc import Sequence

from fly_trt.drafting.base import Draft, Drafter, DraftParts, DraftRow, DraftSettings
from fly_trt.drafting.model import draft_model
from fly_trt.drafting.suffix import Copies
from fly_trt.verification import NO_DRAFT_SCORES, DraftScores


class HybridDrafter:
    """min_match: tokens that a match must have. The model reads what was copied once it is asked again."""

    is_free = False
    has_exact_copies = True

    def __init__(self, copies: Copies, model: Drafter, min_match: int) -> None:
        self._copies = copies
        self._model = model
        self._min_match = min_match
        self._copying: set[int] = set()  # slots of which the last round was a copy

    @property
    def num_preparations(self) -> int:
        return self._model.num_preparations

    def num_unread(self, slot: int, length: int) -> int:
        """A sequence that copies is taken to go on copying, and the model then reads nothing."""
        return 0 if slot in self._copying else self._model.num_unread(slot, length)

    def prepare(self, rows: Sequence[DraftRow]) -> None:
        if asked := [row for row in rows if not self._copies_in(row)]:
            self._model.prepare(asked)

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        asked = [row for row in rows if not self._copies_in(row)]
        models = iter(self._model.propose(asked) if asked else [])
        return [self._copy(row) if row.slot in self._copying else next(models) for row in rows]

    def release(self, slot: int) -> None:
        self._copying.discard(slot)
        self._copies.release(slot)
        self._model.release(slot)

    def swap(self, first: int, second: int) -> None:
        if (first in self._copying) != (second in self._copying):
            self._copying ^= {first, second}
        self._copies.swap(first, second)
        self._model.swap(first, second)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        self._model.copy(source, target, num_tokens)

    def reset(self) -> None:
        self._copying.clear()
        self._copies.reset()
        self._model.reset()

    def trim(self, num_tokens: int) -> None:
        self._model.trim(num_tokens)

    def _copies_in(self, row: DraftRow) -> bool:
        """Whether the row's round is a copy."""
        match = self._copies.match(row)
        is_copy = match.length >= self._min_match and len(match.tokens) > 0
        (self._copying.add if is_copy else self._copying.discard)(row.slot)
        return is_copy

    def _copy(self, row: DraftRow) -> Draft:
        tokens, source = self._copies.draft(row)
        return Draft.of(tokens, source, DraftScores.none(len(tokens)) if row.is_scored else NO_DRAFT_SCORES)


def hybrid(settings: DraftSettings, parts: DraftParts) -> HybridDrafter:
    copies = Copies(settings.suffix_max_spec_factor, settings.num_speculative_tokens, None)
    return HybridDrafter(copies, draft_model(settings, parts), settings.hybrid_min_match)
