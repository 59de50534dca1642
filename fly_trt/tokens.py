"""The ground floor: arrays of tokens and of scores, and the tokens of one sequence in one growing array."""

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

NO_TOKENS: IntArray = np.empty(0, np.int64)

GROWTH_TOKENS = 512


class TokenSequence:
    """Prompt and committed output of one request.

    `tokens` is a view of the committed tokens, int64 [length]; it stays valid until the next append.
    """

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
