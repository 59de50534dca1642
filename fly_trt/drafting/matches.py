"""Where the end of a text occurred before: in the text itself, or in a bounded corpus of other texts. It knows tokens;
nothing of slots, models or requests.
"""

import threading
from collections import Counter, deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fly_trt.tokens import NO_TOKENS, IntArray

LEVELS = (8, 4, 2, 1)  # tokens that a chain's places have in common; the first chain with a place has the longest match
MAX_MATCH = 64  # tokens that are compared; a longer match justifies no longer draft
MAX_PLACES = 32  # the latest ones of a chain that are looked at
# Tokens are linked in blocks of so many, since one by one would cost more; behind the last block every place is looked
# at. No shorter than the longest level.
BLOCK = 64
LEAST_SHARE = 0.3  # of the places of a match: fewer of them justify no token
FIRST_CAPACITY = 1024
END = -1  # stands behind each text of a corpus and matches nothing
BYTES_PER_TOKEN = 4 + 8 * len(LEVELS)

Places = npt.NDArray[np.int32]
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Match(NamedTuple):
    """`tokens` int64 [n] that followed where the last `length` tokens of a text occurred before."""

    tokens: IntArray
    length: int


NO_MATCH = Match(NO_TOKENS, 0)


class SuffixIndex:
    """A growing text, and for each place in it the last one before it where the same tokens ended. Adding n tokens
    costs a few array operations of that size; a lookup looks at MAX_PLACES places, whatever the length. It takes
    BYTES_PER_TOKEN for each token, with room for a power of two of them."""

    def __init__(self) -> None:
        self._length = self._num_linked = 0
        self._allocate(FIRST_CAPACITY)

    def __len__(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        return self._tokens.nbytes + self._before.nbytes + self._last.nbytes

    def last(self, num_tokens: int) -> IntArray:
        """Its last tokens, int64."""
        return self._tokens[self._length - num_tokens : self._length].astype(np.int64)

    def extend(self, tokens: IntArray) -> None:
        start, self._length = self._length, self._length + len(tokens)
        if self._length > len(self._tokens):
            known = self._tokens[:start]
            self._allocate(1 << (self._length - 1).bit_length())
            self._tokens[:start] = known
        self._tokens[start : self._length] = tokens
        end = self._length // BLOCK * BLOCK  # follows from the length, and with it what a lookup finds
        if end > self._num_linked:
            for level, size in enumerate(LEVELS):
                self._link(level, size, max(self._num_linked, size - 1), end)
            self._num_linked = end

    def find(self, suffix: IntArray) -> tuple[Places, int]:
        """Where the longest end of `suffix` that there is ended before, latest first, and its length: places before
        the last one, of which each is the position of the token that followed. None are (empty, 0)."""
        ending: Places = suffix[-MAX_MATCH:].astype(np.int32)
        places: Places = np.arange(self._length - 1, self._num_linked, -1, dtype=np.int32)
        lengths = self._match(places, ending)
        for level, size in enumerate(LEVELS):
            if size > len(ending):
                continue
            linked = self._chain(level, ending[len(ending) - size :])
            linked_lengths = self._match(linked, ending)
            if (linked_lengths >= size).any():
                places, lengths = np.append(places, linked), np.append(lengths, linked_lengths)
                break
        longest = int(lengths.max(initial=0))
        return (places[lengths == longest], longest) if longest else (places[:0], 0)

    def match(self, suffix: IntArray, factor: float, most: int) -> Match:
        """What followed the longest end of `suffix`: at most `most` tokens, and `factor` for each that it is long, each
        the one that came next most often (the latest of equals) at the places that agree with those before it, as long
        as LEAST_SHARE of all places do. A copy that reaches the end of the text goes on with itself."""
        places, length = self.find(suffix)
        if not length:
            return NO_MATCH
        num_tokens = min(most, max(1, int(factor * length)))
        follow = self._follow if len(places) > 1 else self._follow_one
        return Match(follow(places, num_tokens), length)

    def _allocate(self, capacity: int) -> None:
        """Room for so many tokens, without any in it."""
        self._num_linked = 0  # places up to this one are in the chains
        self._tokens = np.full(capacity, END, np.int32)
        self._before = np.zeros((len(LEVELS), capacity), np.int32)  # by end - 1: the end before it; 0: none
        self._last = np.zeros((len(LEVELS), capacity), np.int32)  # by hash: the last end
        self._shift = np.uint64(64 - (capacity - 1).bit_length())

    def _hashes(self, tokens: Places, size: int) -> npt.NDArray[np.int64]:
        """Of the `size` tokens that end at each position, from the first one with so many on."""
        count = len(tokens) - size + 1
        mixed = np.zeros(count, np.uint64)
        for offset in range(size):
            mixed = (mixed ^ tokens[offset : offset + count].astype(np.uint64)) * MULTIPLIER
        return (mixed >> self._shift).astype(np.int64)

    def _link(self, level: int, size: int, start: int, end: int) -> None:
        """Adds the places after the positions from `start` to `end`."""
        hashes = self._hashes(self._tokens[start - size + 1 : end], size)
        order = np.argsort(hashes, kind="stable")
        ordered, places = hashes[order], (order + start + 1).astype(np.int32)
        is_first = np.append(True, ordered[1:] != ordered[:-1])
        before = np.append(np.int32(0), places[:-1])
        before[is_first] = self._last[level, ordered[is_first]]
        self._before[level, places - 1] = before
        is_last = np.append(is_first[1:], True)
        self._last[level, ordered[is_last]] = places[is_last]

    def _chain(self, level: int, ending: Places) -> Places:
        """The latest places before the last one where tokens with the hash of `ending` ended."""
        before = self._before[level]
        place = int(self._last[level, self._hashes(ending, len(ending))[0]])
        found: list[int] = []
        while place and len(found) < MAX_PLACES:
            if place < self._length:
                found.append(place)
            place = int(before[place - 1])
        return np.array(found, np.int32)

    def _match(self, places: Places, ending: Places) -> Places:
        """How many tokens before each place are the last ones of `ending`."""
        if not len(places):
            return places
        at = places[:, None] - np.arange(1, len(ending) + 1, dtype=np.int32)
        agrees = (self._tokens[at] == ending[::-1]) & (at >= 0)
        lengths: Places = np.where(agrees.all(1), len(ending), agrees.argmin(1)).astype(np.int32)
        return lengths

    def _follow_one(self, places: Places, num_tokens: int) -> IntArray:
        tokens = self._tokens[places[0] : min(places[0] + num_tokens, self._length)].astype(np.int64)
        ends = (tokens == END).nonzero()[0]
        return tokens[: ends[0]] if len(ends) else np.resize(tokens, num_tokens)

    def _follow(self, places: Places, num_tokens: int) -> IntArray:
        draft: list[int] = []
        least, left = LEAST_SHARE * len(places), places.tolist()
        while len(draft) < num_tokens:
            text, end = self._tokens, self._length
            following = [(place, int(text[place]) if place < end else draft[place - end]) for place in left]
            counts = Counter(token for _, token in following if token != END)
            token, count = counts.most_common(1)[0] if counts else (END, 0)
            if not count or count < least:
                break
            draft.append(token)
            left = [place + 1 for place, other in following if other == token]
        return np.array(draft, np.int64)


class SuffixCorpus:
    """Texts of at most `max_tokens` tokens, of which each counts one more. Full, it forgets the oldest ones until a
    quarter is free. Any number of threads may use it. It takes BYTES_PER_TOKEN for each token, with room for a power of
    two of them, and while it forgets twice that."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._index = SuffixIndex()
        self._lengths: deque[int] = deque()  # of the texts, oldest first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        return self._index.nbytes

    def add(self, text: IntArray) -> None:
        """Of a text that is too long, its end."""
        text = np.append(text[max(0, len(text) + 1 - self._max_tokens) :], END)
        with self._lock:
            if len(self._index) + len(text) > self._max_tokens:
                self._forget(max(0, self._max_tokens * 3 // 4 - len(text)))
            self._index.extend(text)
            self._lengths.append(len(text))

    def match(self, suffix: IntArray, factor: float, most: int) -> Match:
        """As SuffixIndex has it."""
        with self._lock:
            return self._index.match(suffix, factor, most)

    def _forget(self, num_kept: int) -> None:
        """All but the latest texts that together have at most so many tokens."""
        length = len(self._index)
        while self._lengths and length > num_kept:
            length -= self._lengths.popleft()
        kept = self._index.last(length)
        self._index = SuffixIndex()
        self._index.extend(kept)
