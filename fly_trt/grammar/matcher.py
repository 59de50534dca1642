"""Where one sequence stands in its grammar: which tokens may come at each of several positions, and which must.

It follows the committed output, which only grows; draft tokens are looked at and never kept. It knows token ids and
scores, and nothing of requests or drafts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fly_trt.errors import RequestError
from fly_trt.grammar.masks import TokenMasks, Words
from fly_trt.tokens import NO_TOKENS, IntArray

MAX_ERROR_CHARACTERS = 300
MAX_RESTARTS = 8


class Beginning:
    """Of a grammar: llguidance's matcher, to be copied and never advanced. All copies share one lexer, so that what one
    of them has found out is found for the others too; but once it is full, that is an error of all of them. `make`
    compiles another one."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._matcher = make()

    def copy(self) -> Any:
        return self._matcher.deep_copy()

    def renew(self) -> Any:
        """A copy after another one is in error: with a lexer that is as good as new, for later ones too."""
        self._matcher = matcher = self._make()
        return matcher.deep_copy()


class GrammarMatcher:
    """One sequence in one grammar. An end token may come exactly where the grammar may end, and nothing after it; where
    the grammar leaves one way to spell what must come, that is all that may come."""

    def __init__(
        self,
        beginning: Beginning,
        name: str,
        vocab_size: int,
        ends: frozenset[int],
        end_words: Words,
        never_words: Words,
    ) -> None:
        """name: of the setting, for errors. ends: the sequence's end tokens; end_words uint32 [w]: they as bits of
        llguidance's vocabulary; never_words: of tokens that may never come."""
        self._beginning = beginning
        self._name = name
        self._vocab_size = vocab_size
        self._ends = ends
        self._end_words = end_words
        self._text_words = ~(end_words | never_words)
        self._matcher = beginning.copy()
        self._num_read = 0
        self._num_restarts = 0

    def masks(self, output: IntArray, ahead: IntArray, first: int = 0) -> TokenMasks:
        """Of positions `first` to a: what may follow output + ahead[:i], nothing where the grammar forbids one of
        ahead[:i] itself, or where it is an end token.

        output int64 [k]: the committed output tokens, which only grow from call to call. ahead int64 [a]: draft tokens
        that follow them. Raises RequestError where the grammar's cost is beyond its limits right after `output`; behind
        a draft token, which may not stand, nothing is allowed then."""
        self._read(output)
        words = np.zeros((len(ahead) + 1 - first, len(self._end_words)), np.uint32)
        self._fill_rows(words, ahead.tolist(), first)
        if self._restart_after_error(output):  # perhaps not of its own making
            words[:] = 0
            self._fill_rows(words, ahead.tolist(), first)
            if self._matcher.is_error() and not first and not words[0].any():
                self._raise_error()
        return TokenMasks(words, self._vocab_size)

    def forced(self, output: IntArray) -> IntArray:
        """The tokens int64 [n] that spell what the grammar leaves no choice about after `output`."""
        return self.follow(output, NO_TOKENS, NO_TOKENS)[1]

    def follow(self, output: IntArray, ahead: IntArray, proposed: IntArray) -> tuple[int, IntArray]:
        """How many of the first `proposed` tokens may follow `output` and the draft tokens `ahead`, as `masks` has it;
        and what is forced where they end, behind the last one or in place of the next. Nothing follows an end token, or
        is forced where the grammar's cost is beyond its limits: that is for `masks` to say, whose errors are the
        sequence's own, while drafts are made for all of a batch at once."""
        try:
            return self._look_ahead(output, ahead, proposed)
        except RequestError:
            return 0, NO_TOKENS

    def _look_ahead(self, output: IntArray, ahead: IntArray, proposed: IntArray) -> tuple[int, IntArray]:
        """`follow`. Raises RequestError as `masks` does."""
        self._read(output)
        tokens = ahead.tolist()
        if not self._ends.isdisjoint(tokens):
            return 0, NO_TOKENS
        num_read = self._matcher.try_consume_tokens(tokens)
        count, forced = 0, list[int]()
        if num_read == len(tokens):
            count, forced = self._follow(proposed.tolist())
            num_read += count - (count > 0 and int(proposed[count - 1]) in self._ends)
        self._matcher.rollback(num_read)
        self._restart_after_error(output)
        return count, np.array(forced, np.int64)

    def _follow(self, proposed: list[int]) -> tuple[int, list[int]]:
        """`follow` from where the matcher stands; it stays behind the last token that may come and is no end."""
        forced: list[int] = self._matcher.compute_ff_tokens()
        for count, token in enumerate(proposed):
            if forced[:1] not in ([], [token]):
                return count, forced
            if token in self._ends:
                return count + self._matcher.is_accepting(), []
            if not self._matcher.try_consume_tokens([token]):
                return count, []
            forced = forced[1:] or self._matcher.compute_ff_tokens()
        return len(proposed), forced

    def _fill_rows(self, words: Words, ahead: list[int], first: int) -> None:
        """Up to the first that is behind what is forbidden, or that costs too much."""
        num_ahead = 0
        for i in range(len(ahead) + 1):
            row = words[i - first] if i >= first else None
            if row is not None and not self._fill(row):
                break
            if i == len(ahead) or not self._may_follow(ahead[i], row):
                break
            if not self._matcher.try_consume_tokens([ahead[i]]):
                break
            num_ahead += 1
        self._matcher.rollback(num_ahead)

    def _may_follow(self, token: int, row: Words | None) -> bool:
        if token in self._ends:
            return False
        return row is None or bool(row[token // 32] >> (token % 32) & 1)

    def _fill(self, row: Words) -> bool:
        """Writes what may come next; False, and nothing, where that costs too much."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            row[:] = 0
            return False
        row &= self._text_words
        if self._matcher.is_accepting():
            row |= self._end_words
        return True

    def _restart_after_error(self, output: IntArray) -> bool:
        """Forgets what went wrong behind draft tokens, or because of what other sequences and earlier drafts left in
        the lexer; whether something did. Raises RequestError where it is the output's fault, or too frequent."""
        if not self._matcher.is_error():
            return False
        if self._num_restarts == MAX_RESTARTS:
            self._raise_error()
        self._num_restarts += 1
        self._matcher = self._beginning.renew()
        if not self._matcher.consume_tokens(output.tolist()):
            self._raise_error()
        self._num_read = len(output)
        return True

    def _read(self, output: IntArray) -> None:
        self._restart_after_error(output)
        new = output[self._num_read :].tolist()
        self._num_read = len(output)
        if new and not self._matcher.consume_tokens(new):
            self._restart_after_error(output)

    def _raise_error(self) -> None:
        raise RequestError(f"{self._name}: {short_error(self._matcher.get_error())}: make it simpler")


def short_error(message: str) -> str:
    """What llguidance says, without the listings below it."""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines() if line.strip()]
    cause = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = " ".join([*lines[:1], *cause]).removesuffix(":").encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[:MAX_ERROR_CHARACTERS] + "..."
