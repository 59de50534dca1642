"""What an audit runs: the target reads an output again, and goes on exactly where that parts from its own choices.

Both go on step by step in a slot that is lent to them and may be taken away between two steps, after which they read
again what it held. They know steps, tokens and loans, and nothing of requests or of when they run.
"""

from collections.abc import Callable

import numpy as np

from fly_trt.engines.base import Engine, Step
from fly_trt.errors import EngineError
from fly_trt.runtime.audit import ExactComparison
from fly_trt.runtime.slots import Loan
from fly_trt.tokens import NO_TOKENS, IntArray

LEAST_LOGPROB = -100.0  # nats; what a token counts that the target says cannot come
SIZE_MULTIPLE = 16  # of a step's tokens: each shape is prepared once
NUM_COPIED = 7  # draft tokens of the exact text, copied from the output that it parted from
MATCH_TOKENS = 2  # after so many tokens that the two have in common

Ends = Callable[[int, int], bool]
"""Of a token and its position in the output: whether the output ends with it. Asked for each position, in order."""


class NotNumbersError(EngineError):
    """The target's numbers for an audited text are none."""


class Reading:
    """The likelihood of an output: `tokens` int64 [length] are the prompt, of num_prompt tokens, and the output, in
    steps of `size` tokens.

    Position t of a row predicts the token after it, so that a step begins with the last token of the one before. Steps
    have few shapes: the last one begins earlier, and that of a short text is padded."""

    def __init__(self, tokens: IntArray, num_prompt: int, size: int) -> None:
        self.tokens = tokens
        self.num_prompt = num_prompt
        self.log_likelihood = self.best_log_likelihood = 0.0
        self.num_differing = 0
        self.parted_at: int | None = None  # the first position of the output that is not the target's choice
        self.choice = -1  # which token the target would have had there
        self._size = size
        self._num_read = num_prompt  # tokens up to here are known: the prompt's, and what was read

    @property
    def is_done(self) -> bool:
        return self._num_read == len(self.tokens)

    def step(self, target: Engine, loan: Loan) -> None:
        """Reads on. Raises NotNumbersError, and what the target raises."""
        length, start = len(self.tokens), min(loan.num_tokens, self._num_read - 1)
        size = min(self._size, -(-(length - start) // SIZE_MULTIPLE) * SIZE_MULTIPLE)
        start = max(0, min(start, length - size))
        chunk = self.tokens[start : start + size]
        step = _run(target, loan, start, chunk, NO_TOKENS, size, first=0)
        end = start + len(chunk)
        loan.num_tokens = end
        if end > self._num_read:
            self._add(step, start, end)
            self._num_read = end

    def _add(self, step: Step, start: int, end: int) -> None:
        positions = step.at(0, self._num_read - 1 - start, end - 1 - start)
        of_tokens = step.token_logprob[0, positions].astype(np.float64)
        of_choices = step.argmax_logprob[0, positions].astype(np.float64)
        if not (np.isfinite(of_choices).all() and (of_tokens <= 0.5).all()):  # NaN is not, either
            raise NotNumbersError("the target's log-probabilities are not numbers")
        differing = np.flatnonzero(step.argmax[0, positions] != self.tokens[self._num_read : end])
        self.num_differing += len(differing)
        if self.parted_at is None and len(differing):
            self.parted_at = self._num_read + int(differing[0]) - self.num_prompt
            self.choice = int(step.argmax[0, positions][differing[0]])
        self.log_likelihood += float(np.maximum(of_tokens, LEAST_LOGPROB).sum())
        self.best_log_likelihood += float(np.maximum(of_choices, LEAST_LOGPROB).sum())


class ExactText:
    """The target's own text for the prompt of a reading that is done: what both have in common, and on from where they
    part, exactly, with copies of the output as drafts. `ends` says where it ends; `max_seq_len` is the cache's."""

    def __init__(self, reading: Reading, ends: Ends, max_seq_len: int, size: int) -> None:
        self._ends = ends
        self._size = size
        self._max_seq_len = max_seq_len
        self._num_prompt = reading.num_prompt
        self._output = reading.tokens[reading.num_prompt :]
        self._parted_at = reading.parted_at
        self._tokens = reading.tokens  # prompt and exact text
        self._num_asked = 0  # tokens of the text that `ends` was asked for
        self.is_done = self._parted_at is None
        if self._parted_at is not None:
            common = reading.tokens[: reading.num_prompt + self._parted_at]
            self._tokens = np.append(common, reading.choice)
            self._num_held = len(common)  # of what the loan holds of the output, what is the exact text too

    @property
    def text(self) -> IntArray:
        return self._tokens[self._num_prompt :]

    @property
    def num_tokens(self) -> int:
        """With the prompt."""
        return len(self._tokens)

    def comparison(self) -> ExactComparison:
        parted_at = self._parted_at
        return ExactComparison(len(self.text), parted_at, self.text.copy())

    def step(self, target: Engine, loan: Loan) -> None:
        """Decodes on, or asks for the ends of some tokens. Raises NotNumbersError, and what the target raises."""
        if self._ask_for_ends():
            return
        held = min(loan.num_tokens, self._num_held)
        context = self._tokens[held : held + self._size]
        is_whole = held + len(context) == len(self._tokens)
        draft = self._draft() if is_whole and len(context) == 1 else NO_TOKENS
        num_tokens = len(context) + len(draft) if len(context) == 1 else self._size
        step = _run(target, loan, held, context, draft, num_tokens, first=len(context) - 1)
        self._num_held = held + len(context)
        if is_whole:
            num_accepted = int(step.num_accepted[0])
            self._num_held += num_accepted
            self._tokens = np.concatenate([self._tokens, draft[:num_accepted], step.next_token])
        loan.num_tokens = self._num_held

    def _ask_for_ends(self) -> bool:
        """Whether something is left to ask, or the text has ended. A chunk at a time: each may cost a tokenizer."""
        for token in self.text[self._num_asked : self._num_asked + self._size].tolist():
            self._num_asked += 1
            if self._ends(token, self._num_asked - 1):
                self._tokens = self._tokens[: self._num_prompt + self._num_asked]
                self.is_done = True
                return True
        return self._num_asked < len(self.text)

    def _draft(self) -> IntArray:
        """What followed the last tokens where the output has them, nearest to here; nothing rather than a few."""
        text, output = self.text, self._output
        is_out_of_room = len(self._tokens) + NUM_COPIED > self._max_seq_len
        if len(text) < MATCH_TOKENS or self._size <= NUM_COPIED or is_out_of_room:
            return NO_TOKENS
        first, second = text[-MATCH_TOKENS:]
        places = np.flatnonzero((output[:-1] == first) & (output[1:] == second)) + MATCH_TOKENS
        places = places[places + NUM_COPIED <= len(output)]
        if not len(places):
            return NO_TOKENS
        nearest = places[np.abs(places - len(text)).argmin()]
        return output[nearest : nearest + NUM_COPIED]


def _run(
    target: Engine, loan: Loan, start: int, context: IntArray, draft: IntArray, num_tokens: int, *, first: int
) -> Step:
    """One step of one row in the loan's slot, which speaks of its positions from `first` on. Raises NotNumbersError
    where something in the row is none."""
    end = len(context) + len(draft)
    step = target.step(loan.slot, 1, num_tokens, num_positions=end - first)
    step.set_row(0, start, context, draft, first=first)
    target.run(step)
    if np.isnan(step.entropy_topk[0, step.at(0, first, end)]).any():
        target.clear_slot(loan.slot, start)
        loan.num_tokens = start
        raise NotNumbersError("the target's logits are not numbers")
    return step
