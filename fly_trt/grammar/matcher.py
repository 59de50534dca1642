"""Where one sequence stands in its grammar: which tokens may come at each of several positions, and which must.

It follows the committed output, which only grows; draft tokens are looked at and never kept. It knows token ids and
scores, and nothing of requests or drafts.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from fly_trt.tokens import NO_TOKENS, IntArray


class GrammarMatcher:
    """One sequence in one grammar, over a vocabulary of `vocab_size` tokens."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._num_read = 0

    def allowed(self, output: IntArray, ahead: IntArray) -> npt.NDArray[np.bool_]:
        """bool [a + 1, V]: row i has the tokens that may follow output + ahead[:i], none where the grammar forbids
        one of ahead[:i] itself.

        output int64 [k]: the committed output tokens, which only grow from call to call. ahead int64 [a]: draft tokens
        that follow them."""
        from llguidance import LLExecutor

        self._read(output)
        num_words = (self._vocab_size + 31) // 32
        masks = np.zeros((len(ahead) + 1, num_words), np.int32)
        to = masks.ctypes.data, num_words * 4, len(masks)
        if len(ahead):
            LLExecutor(1).unsafe_compute_mask_ptr_with_draft_token([(self._matcher, 0, ahead.tolist())], *to)
        else:
            LLExecutor(1).unsafe_compute_mask_ptr([(self._matcher, 0)], *to)
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
        return bits[:, : self._vocab_size].astype(np.bool_)

    def num_allowed(self, output: IntArray, ahead: IntArray) -> int:
        """How many of the first tokens of `ahead` the grammar allows after `output`."""
        self._read(output)
        return int(self._matcher.validate_tokens(ahead.tolist()))

    def forced(self, output: IntArray, ahead: IntArray = NO_TOKENS) -> IntArray:
        """The tokens int64 [n] that spell what the grammar leaves no choice about after `output` and `ahead`, which it
        allows. Others may spell the same, so that they are drafts like any other."""
        self._read(output)
        num_ahead = self._matcher.try_consume_tokens(ahead.tolist()) if len(ahead) else 0
        tokens = self._matcher.compute_ff_tokens()
        if num_ahead:
            self._matcher.rollback(num_ahead)
        return np.array(tokens, np.int64)

    def _read(self, output: IntArray) -> None:
        new = output[self._num_read :].tolist()
        if new:
            self._matcher.consume_tokens(new)
            self._num_read = len(output)
