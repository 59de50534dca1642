"""N-gram prompt lookup: proposes what followed the same few tokens earlier in the prompt or the output.

Source: prompt lookup decoding as in arXiv 2511.22972, section 3.4: the longest n-gram that ends the sequence is
matched, n = prompt_lookup_max .. prompt_lookup_min, at its earliest occurrence.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from fly_trt.drafting.base import Draft, DraftParts, DraftRow, DraftSettings, FreeDrafter, exchange
from fly_trt.tokens import IntArray
from fly_trt.verification import DraftSource


class NgramIndex:
    """Where each n-gram of a growing sequence occurred first. Adding or removing a token costs max_n dict operations;
    a lookup costs max_n, whatever the length."""

    def __init__(self, max_n: int, min_n: int) -> None:
        self._max_n = max_n
        self._min_n = min_n
        self._tokens: list[int] = []
        self._first_end: dict[tuple[int, ...], int] = {}
        self._added: list[list[tuple[int, ...]]] = []  # by position: the n-grams that occurred there first

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        held, first_end, max_n, min_n = self._tokens, self._first_end, self._max_n, self._min_n
        end = len(held)
        for token in tokens:
            held.append(token)
            end += 1
            last, added = tuple(held[-max_n:]), []
            for start in range(len(last) - min_n, -1, -1):
                ngram = last[start:]
                if first_end.setdefault(ngram, end) == end:
                    added.append(ngram)
            self._added.append(added)

    def truncate(self, length: int) -> None:
        """Forgets every token from position `length` on."""
        while len(self._tokens) > length:
            self._tokens.pop()
            for ngram in self._added.pop():
                del self._first_end[ngram]

    def sync(self, tokens: IntArray, num_kept: int) -> None:
        """Makes the index hold `tokens`, of which it already has the first `num_kept`."""
        self.truncate(num_kept)
        self.extend(tokens[num_kept:].tolist())

    def propose(self, num_tokens: int) -> IntArray:
        """At most `num_tokens` tokens that followed the earliest earlier match; empty without one.

        With tokens 1 2 3 4 1 2 3, max_n 4 and min_n 1, the 3-gram 1 2 3 occurred first at the start, so 4 1 2 3 is
        proposed.
        """
        start = self.find()
        return np.array(self._tokens[start : start + num_tokens], np.int64)

    def find(self) -> int:
        """Where the tokens stand that followed the earliest earlier match; the length without one."""
        length = len(self._tokens)
        for n in range(min(self._max_n, length), self._min_n - 1, -1):
            end = self._first_end[tuple(self._tokens[length - n :])]
            if end < length:
                return end
        return length


class NgramDrafter(FreeDrafter):
    """Drafts without a model: what followed the last few tokens where they occurred first. Reading a token costs a few
    dictionary operations, and so does a copy: nothing of it is worth keeping."""

    def __init__(self, max_n: int, min_n: int) -> None:
        self._max_n = max_n
        self._min_n = min_n
        self._indexes: dict[int, NgramIndex] = {}

    def prepare(self, rows: Sequence[DraftRow]) -> None:
        for row in rows:
            index = self._indexes.get(row.slot)
            if index is None:
                index = self._indexes[row.slot] = NgramIndex(self._max_n, self._min_n)
            index.sync(row.tokens, len(index))

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        self.prepare(rows)
        drafts = [Draft.of(self._indexes[row.slot].propose(row.num_tokens), DraftSource.LOOKUP) for row in rows]
        self._forget_ahead(rows)
        return drafts

    def release(self, slot: int) -> None:
        self._indexes.pop(slot, None)

    def rewind(self, slot: int, num_tokens: int) -> None:
        """Of the sequence in the slot nothing but the first `num_tokens` tokens is known to be left."""
        if (index := self._indexes.get(slot)) is not None:
            index.truncate(num_tokens)

    def swap(self, first: int, second: int) -> None:
        exchange(self._indexes, first, second)

    def reset(self) -> None:
        self._indexes.clear()

    def _forget_ahead(self, rows: Sequence[DraftRow]) -> None:
        """Keeps what is committed: the rest need not become part of the sequences."""
        for row in rows:
            if row.num_ahead:
                self.rewind(row.slot, row.num_committed)


def ngram(settings: DraftSettings, parts: DraftParts) -> NgramDrafter:
    return NgramDrafter(settings.prompt_lookup_max, settings.prompt_lookup_min)
