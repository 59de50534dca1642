"""N-gram lookup in a prompt that the target has read: where a copied token is not what the target itself would have
said there, the draft is cut, or takes the target's token.

Source: alignment sampling of AASD (arXiv 2505.13204), in the form of one draft: the paper drafts a tree with up to two
more tokens at such a position. It reports that about 45 % of the tokens that are copied from a prompt are not the
model's own choice there and stand far less often. How the paper decides what is badly aligned is not known here; this
compares log-probabilities.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fly_trt.drafting.base import Draft, DraftParts, DraftRow, DraftSettings, common_prefix, exchange
from fly_trt.drafting.ngram import NgramDrafter
from fly_trt.tokens import NO_TOKENS, FloatArray, IntArray
from fly_trt.verification import DraftSource

PROMPT, ARGMAX, CUT = "prompt", "argmax", "cut"
ALIGNMENT_MODES = (PROMPT, ARGMAX, CUT)
UNKNOWN = -1
LEAST_REST = 1e-9  # a probability: what a most probable token leaves is no smaller


class Reading(NamedTuple):
    """Of the first n `tokens` int64 [n] of a sequence: what the target would have said in their place, `choices` int64
    [n], UNKNOWN where it was not heard, and how much more probable that is than the token, in nats: `gaps` float32 [n],
    NaN where the token's probability is unknown, and `least_gaps`, which needs none: the token has at most what the
    choice leaves."""

    tokens: IntArray
    choices: IntArray
    gaps: FloatArray
    least_gaps: FloatArray

    def first(self, num_tokens: int) -> "Reading":
        return Reading._make(array[:num_tokens] for array in self)

    def with_unknown(self, tokens: IntArray) -> "Reading":
        """All of `tokens`, of which these are the first."""
        num_more = len(tokens) - len(self.tokens)
        return Reading(
            tokens.copy(),
            np.append(self.choices, np.full(num_more, UNKNOWN)),
            np.append(self.gaps, np.full(num_more, np.nan, np.float32)),
            np.append(self.least_gaps, np.full(num_more, np.nan, np.float32)),
        )

    def followed_by(
        self, tokens: IntArray, choices: IntArray, logprobs: FloatArray, of_tokens: FloatArray
    ) -> "Reading":
        rest = np.maximum(-np.expm1(logprobs), LEAST_REST)
        return Reading(
            np.append(self.tokens, tokens),
            np.append(self.choices, choices),
            np.append(self.gaps, logprobs - of_tokens),
            np.append(self.least_gaps, logprobs - np.log(rest)),
        )


NOTHING = Reading(NO_TOKENS, NO_TOKENS, np.empty(0, np.float32), np.empty(0, np.float32))


class AlignmentDrafter(NgramDrafter):
    """margin: nats by which the target's choice is more probable than a token that is badly aligned. Positions of which
    nothing is known, as in the output and where the prompt came with a cache of other text, count as well aligned.

    The gap of a chunk's last token is not known before the next chunk is read; its lower bound stands in for it. A
    private row goes by lower bounds only, and its first round, whose draft is made while the prompt is being read, by
    nothing, so that it makes no difference how its prompt was cut.
    """

    def __init__(self, max_n: int, min_n: int, mode: str, margin: float) -> None:
        super().__init__(max_n, min_n)
        self._replaces = mode == ARGMAX
        self._margin = margin
        self._readings: dict[int, Reading] = {}

    def read_prompt(
        self,
        slot: int,
        tokens: IntArray,
        start: int,
        choices: IntArray,
        choice_logprobs: FloatArray,
        token_logprobs: FloatArray,
    ) -> None:
        before = tokens[: start + 1]
        reading = self._readings.get(slot, NOTHING)
        reading = reading.first(common_prefix(reading.tokens, before)).with_unknown(before)
        following = tokens[start + 1 : start + 1 + len(choices)]
        self._readings[slot] = reading.followed_by(following, choices, choice_logprobs, token_logprobs)

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        self.prepare(rows)
        drafts = [Draft.of(self._aligned(row), DraftSource.LOOKUP) for row in rows]
        self._forget_ahead(rows)
        return drafts

    def swap(self, first: int, second: int) -> None:
        super().swap(first, second)
        exchange(self._readings, first, second)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        if source in self._readings:
            self._readings[target] = self._readings[source].first(num_tokens)

    def reset(self) -> None:
        super().reset()
        self._readings.clear()

    def _aligned(self, row: DraftRow) -> IntArray:
        start = self._indexes[row.slot].find()
        draft = row.tokens[start : start + row.num_tokens].copy()
        if row.slot not in self._readings or (row.is_private and row.begins_at == row.num_prompt):
            return draft
        reading = self._readings[row.slot]
        reading = reading.first(common_prefix(reading.tokens, row.tokens))
        choices, gaps, least_gaps = (array[start : start + len(draft)] for array in reading[1:])
        if not row.is_private:
            least_gaps = np.where(np.isnan(gaps), least_gaps, gaps)
        differs = (choices != UNKNOWN) & (choices != draft[: len(choices)])
        misaligned = np.flatnonzero(differs & (least_gaps > self._margin))
        if self._replaces:
            draft[misaligned] = choices[misaligned]
        elif len(misaligned):
            return draft[: misaligned[0]]
        return draft


def alignment(settings: DraftSettings, parts: DraftParts) -> NgramDrafter:
    sizes = settings.prompt_lookup_max, settings.prompt_lookup_min
    if settings.alignment_mode == PROMPT:
        return NgramDrafter(*sizes)
    return AlignmentDrafter(*sizes, settings.alignment_mode, settings.alignment_margin)
