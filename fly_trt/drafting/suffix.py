"""Drafts without a model by the longest suffix match, in the sequence itself and in what earlier sequences emitted.

Source: SuffixDecoding (arXiv 2411.04975), in the form of one draft instead of a tree: a draft has at most
max_spec_factor tokens for each token of its match, and ends where the places of the match disagree. Where the paper has
suffix trees, `matches` has chains of the places where the same few tokens ended.

What other requests emitted decides how fast a request is, and so could be guessed at by its caller; what a request
emits never rests on it. A corpus of 0 tokens switches that off.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fly_trt.drafting.base import Draft, DraftParts, DraftRow, DraftSettings, FreeDrafter, exchange
from fly_trt.drafting.matches import NO_MATCH, Match, SuffixCorpus, SuffixIndex
from fly_trt.tokens import NO_TOKENS, IntArray
from fly_trt.verification import DraftSource


@dataclass(slots=True)
class _Slot:
    """`index` has what was committed when the round began, after `decided_at` tokens, and its `match` was found."""

    index: SuffixIndex = field(default_factory=SuffixIndex)
    decided_at: int = -1
    match: Match = NO_MATCH
    source: DraftSource = DraftSource.LOOKUP


class Copies:
    """What the sequences in the slots may copy: `most` tokens, and `factor` for each token of a match. A row that is
    private has its own text only, so that its match follows from that."""

    def __init__(self, factor: float, most: int, corpus: SuffixCorpus | None) -> None:
        self._limits = factor, most
        self._corpus = corpus
        self._slots: dict[int, _Slot] = {}

    def match(self, row: DraftRow) -> Match:
        """That of the row's round, whatever was added since to the sequence or to the corpus."""
        return self._decided(row).match

    def draft(self, row: DraftRow) -> tuple[IntArray, DraftSource]:
        """The part of the round's match that follows the row's tokens: none where these are not those of the match,
        because a grammar had its say."""
        state = self._decided(row)
        since = row.tokens[row.begins_at :]
        start = len(since)
        if not np.array_equal(state.match.tokens[:start], since):
            return NO_TOKENS, state.source
        return state.match.tokens[start : start + row.num_tokens], state.source

    def read_output(self, tokens: IntArray) -> None:
        if self._corpus is not None:
            self._corpus.add(tokens)

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def swap(self, first: int, second: int) -> None:
        exchange(self._slots, first, second)

    def reset(self) -> None:
        self._slots.clear()

    def _decided(self, row: DraftRow) -> _Slot:
        state = self._slots.setdefault(row.slot, _Slot())
        if state.decided_at == row.begins_at:
            return state
        state.decided_at = row.begins_at
        tokens = row.tokens[: row.begins_at]
        state.index.extend(tokens[len(state.index) :])
        state.match, state.source = state.index.match(tokens, *self._limits), DraftSource.LOOKUP
        if self._corpus is not None and not row.is_private:
            match = self._corpus.match(tokens, *self._limits)
            if match.length > state.match.length:
                state.match, state.source = match, DraftSource.CORPUS
        return state


class SuffixDrafter(FreeDrafter):
    """Copies whatever matches."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        return [Draft.of(*self._copies.draft(row)) for row in rows]

    def release(self, slot: int) -> None:
        self._copies.release(slot)

    def swap(self, first: int, second: int) -> None:
        self._copies.swap(first, second)

    def reset(self) -> None:
        self._copies.reset()

    def read_output(self, slot: int, tokens: IntArray) -> None:
        self._copies.read_output(tokens)


def suffix(settings: DraftSettings, parts: DraftParts) -> SuffixDrafter:
    corpus = SuffixCorpus(settings.suffix_corpus_tokens) if settings.suffix_corpus_tokens else None
    return SuffixDrafter(Copies(settings.suffix_max_spec_factor, settings.num_speculative_tokens, corpus))
