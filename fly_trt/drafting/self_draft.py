"""Drafting with parts of the target itself, for engine directories without a draft model.

There may be several such drafts, each for sequences from some length on. Which one a sequence has is settled when it is
first seen, by its length then: each draft has a cache of its own, so that changing it would mean reading everything
again. It knows drafters and lengths; which parts of the target a draft has was chosen when it was built.
"""

from bisect import bisect_right
from collections.abc import Sequence

from fly_trt.drafting.base import Draft, DraftParts, DraftRow, DraftSettings, exchange
from fly_trt.drafting.levels import Lookup
from fly_trt.drafting.model import ModelDrafter


class SelfDrafter:
    """One of several `drafters` for each sequence: that of the last of `min_tokens`, which rise from 0, that its length
    reaches when it is first seen. Sequences of one drafter are drafted for together."""

    is_free = False
    has_exact_copies = False

    def __init__(self, min_tokens: Sequence[int], drafters: Sequence[ModelDrafter]) -> None:
        self._min_tokens = min_tokens
        self._drafters = drafters
        self._chosen: dict[int, ModelDrafter] = {}  # by slot

    @property
    def num_preparations(self) -> int:
        return sum(drafter.num_preparations for drafter in self._drafters)

    def num_unread(self, slot: int, length: int) -> int:
        return self._drafter(slot, length).num_unread(slot, length)

    def prepare(self, rows: Sequence[DraftRow]) -> None:
        for drafter, indexes in self._by_drafter(rows):
            drafter.prepare([rows[index] for index in indexes])

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        drafts: dict[int, Draft] = {}
        for drafter, indexes in self._by_drafter(rows):
            drafts.update(zip(indexes, drafter.propose([rows[index] for index in indexes]), strict=True))
        return [drafts[index] for index in range(len(rows))]

    def release(self, slot: int) -> None:
        self._chosen.pop(slot, None)
        for drafter in self._drafters:
            drafter.release(slot)

    def swap(self, first: int, second: int) -> None:
        exchange(self._chosen, first, second)
        for drafter in self._drafters:
            drafter.swap(first, second)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        self._chosen.pop(target, None)
        for drafter in self._drafters:  # whichever the new sequence will have
            drafter.copy(source, target, num_tokens)

    def reset(self) -> None:
        self._chosen.clear()
        for drafter in self._drafters:
            drafter.reset()

    def trim(self, num_tokens: int) -> None:
        for drafter in self._drafters:
            drafter.trim(num_tokens)

    def _drafter(self, slot: int, length: int) -> ModelDrafter:
        if (chosen := self._chosen.get(slot)) is not None:
            return chosen
        return self._drafters[bisect_right(self._min_tokens, length) - 1]

    def _by_drafter(self, rows: Sequence[DraftRow]) -> list[tuple[ModelDrafter, list[int]]]:
        """Each drafter that has rows, with their indexes. Settles which one a new sequence has."""
        indexes: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            drafter = self._chosen[row.slot] = self._drafter(row.slot, row.num_prompt or len(row.tokens))
            indexes.setdefault(self._drafters.index(drafter), []).append(index)
        return [(self._drafters[which], indexes[which]) for which in sorted(indexes)]


def self_draft(settings: DraftSettings, parts: DraftParts) -> SelfDrafter:
    """With n-gram lookup in front, as multi_level has it."""
    lookup = Lookup(settings.prompt_lookup_max, settings.prompt_lookup_min, settings.prompt_lookup_num_tokens)
    min_tokens, drafters = [], []
    previous = None
    for least, engine in parts.load_self_drafts():
        if engine is not previous:  # neighbours may be one engine, which has one cache
            min_tokens.append(least)
            drafters.append(ModelDrafter(engine, parts.target_vocab_size, lookup, reuse_cache=parts.reuse_cache))
        previous = engine
    return SelfDrafter(min_tokens, drafters)
