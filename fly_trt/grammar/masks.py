"""Which tokens may come at some positions, as bits, and what that leaves of the scores there."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fly_trt.tokens import FloatArray, IntArray

Words = npt.NDArray[np.uint32]

NO_TOKEN = -1
FEW = 16  # of the vocabulary, its 1 / FEW
WORD_BITS = 32


def num_words(vocab_size: int) -> int:
    return -(-vocab_size // WORD_BITS)


def words_of(token_ids: IntArray, vocab_size: int) -> Words:
    """The bits of some tokens, uint32 [num_words]."""
    words = np.zeros(num_words(vocab_size), np.uint32)
    np.bitwise_or.at(words, token_ids // WORD_BITS, np.left_shift(1, token_ids % WORD_BITS).astype(np.uint32))
    return words


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Of m positions: `words` uint32 [m, num_words], bit t % 32 of word t // 32 for token t, at least `vocab_size` of
    them."""

    words: Words
    vocab_size: int

    def has(self, token_ids: IntArray) -> npt.NDArray[np.bool_]:
        """bool [m]: whether each position allows its token of token_ids int64 [m]."""
        words = self.words[np.arange(len(token_ids)), token_ids // WORD_BITS]
        return (words >> (token_ids % WORD_BITS).astype(np.uint32) & 1).astype(np.bool_)

    def allowed(self, row: int) -> npt.NDArray[np.bool_]:
        """bool [V]: the tokens that one position allows."""
        bits = np.unpackbits(self.words[row].view(np.uint8), bitorder="little", count=self.vocab_size)
        return bits.view(np.bool_)

    def apply(self, scores: FloatArray) -> FloatArray:
        """A copy of scores float32 [m, V] with -inf for what is not allowed."""
        result = np.full(scores.shape, -np.inf, np.float32)
        for row in range(len(scores)):
            np.copyto(result[row], scores[row], where=self.allowed(row))
        return result

    def argmax(self, scores: FloatArray) -> tuple[IntArray, FloatArray]:
        """The choices int64 [m] among what is allowed, the lowest id among equals, and their scores float32 [m]; -1 and
        -inf where nothing is. Most positions allow what has the largest score of all, so that few are masked."""
        choices = np.asarray(scores.argmax(axis=1), np.int64)
        for row in np.flatnonzero(~self.has(choices)).tolist():
            choices[row] = _masked_argmax(scores[row], self.allowed(row))
        best = scores[np.arange(len(scores)), choices]
        return choices, np.where(choices == NO_TOKEN, np.float32(-np.inf), best)


def _masked_argmax(scores: FloatArray, allowed: npt.NDArray[np.bool_]) -> int:
    """Few tokens are looked up, of many none is left out one by one."""
    count = np.count_nonzero(allowed)
    if not count:
        return NO_TOKEN
    if count * FEW < len(allowed):
        ids = np.flatnonzero(allowed)
        return int(ids[scores[ids].argmax()])
    choice = int(np.where(allowed, scores, np.float32(-np.inf)).argmax())
    return choice if allowed[choice] else NO_TOKEN
