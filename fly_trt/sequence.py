"""The tokens of one request: prompt and committed output in one growing array."""

import numpy as np

from fly_trt.engines.base import IntArray

GROWTH_TOKENS = 512


class TokenSequence:
    """`tokens` is a view of the committed tokens, int64 [length]; it stays valid until the next append."""

    __slots__ = ("_buffer", "_length")

    def __init__(self, tokens: list[int]) -> None:
        self._length = len(tokens)
        self._buffer = np.empty(self._length + GROWTH_TOKENS, np.int64)
        self._buffer[: self._length] = tokens

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> IntArray:
        return self._buffer[: self._length]

    def append(self, tokens: IntArray | list[int]) -> None:
        end = self._length + len(tokens)
        if end > len(self._buffer):
            self._buffer = np.concatenate([self._buffer[: self._length], np.empty(end + GROWTH_TOKENS, np.int64)])
        self._buffer[self._length : end] = tokens
        self._length = end

    def truncate(self, length: int) -> None:
        self._length = length
