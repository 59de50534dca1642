"""Drafts of requests that follow a grammar: what it forces stands in them for nothing, and what it forbids ends them.

The drafter is shown what stands so far as if the target had taken it, and proposes what comes next. Its tokens are
taken up to the first that the grammar forbids; there the draft goes on with what the grammar forces, or ends where it
forces nothing. A draft is asked for in parts that do not depend on how much of it is needed, and so is the same however
its round is cut. It knows drafts and grammars, and nothing of steps.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fly_trt.drafting import Draft, DraftRow
from fly_trt.grammar import GrammarMatcher
from fly_trt.runtime.rounds import Round
from fly_trt.tokens import IntArray
from fly_trt.verification import DraftScores, DraftSource

# A model's tokens are asked for in parts: behind one that is forbidden they were drafted for nothing.
PART_TOKENS = 4

Propose = Callable[[Sequence[DraftRow]], list[Draft]]


class GuidedDraft:
    """The draft of one round as it grows to what `row` asks for, and perhaps some more. output int64 [k]: the
    committed output tokens. is_free: the drafter's."""

    def __init__(
        self, row: DraftRow, round_: Round, grammar: GrammarMatcher, output: IntArray, *, is_free: bool
    ) -> None:
        self._row = row
        self._round = round_
        self._grammar = grammar
        self._output = output
        self._is_free = is_free
        self._most = round_.num_draft - round_.num_committed
        kept, evidence = slice(round_.num_committed, None), round_.evidence
        scores = DraftScores._make(array[kept] for array in evidence.scores)
        self._draft = Draft(evidence.draft[kept], evidence.sources[kept], scores, is_whole=is_free)
        self._has_ended = False

    @property
    def draft(self) -> Draft:
        return self._draft

    @property
    def is_growing(self) -> bool:
        return not self._has_ended and len(self._draft.tokens) < self._row.num_tokens

    @property
    def next_row(self) -> DraftRow:
        """Asks for the next part."""
        ahead = self._draft.tokens
        rest = self._most - len(ahead)
        tokens = np.concatenate([self._row.tokens, ahead]) if len(ahead) else self._row.tokens
        num_tokens = rest if self._is_free else min(PART_TOKENS, rest)
        return self._row._replace(tokens=tokens, num_tokens=num_tokens, num_ahead=len(ahead))

    def take(self, proposed: Draft, num_asked: int) -> None:
        """What the drafter says to `next_row`. Where one that is free has nothing, it may have behind what is forced;
        a model that says less than it is asked for has stopped."""
        num_proposed = len(proposed.tokens)
        count, forced = self._grammar.follow(self._output, self._draft.tokens, proposed.tokens)
        if count < num_proposed:
            scores = proposed.scores.first(count)
            proposed = Draft(proposed.tokens[:count], proposed.sources[:count], scores)
        self._add(proposed)
        is_cut, is_short = count < num_proposed, num_proposed < num_asked
        if is_short and not is_cut and not self._is_free:
            self._has_ended = True
            return
        forced = forced[: self._most - len(self._draft.tokens)]
        self._add(forced_draft(forced, is_scored=self._row.is_scored))
        self._has_ended = not len(forced) and (is_cut or is_short)
        self._round.is_cut = is_cut and self._has_ended

    def _add(self, more: Draft) -> None:
        if len(more.tokens):
            tokens, sources, scores, is_whole = self._draft
            tokens, sources = np.concatenate([tokens, more.tokens]), np.concatenate([sources, more.sources])
            self._draft = Draft(tokens, sources, scores.followed_by(more.scores), is_whole)


def forced_draft(tokens: IntArray, *, is_scored: bool) -> Draft:
    """Draft tokens that a grammar forces, beside those of a model that gives scores or not."""
    scores = DraftScores.none(len(tokens) if is_scored else 0)
    return Draft.of(tokens, DraftSource.GRAMMAR, scores, is_whole=False)


def propose_guided(rows: Sequence[DraftRow], guided: dict[int, GuidedDraft], propose: Propose) -> list[Draft]:
    """A draft for each of the rows, of which those with the indexes of `guided` follow a grammar."""
    asked = [guided[at].next_row if at in guided else row for at, row in enumerate(rows)]
    drafts = propose(asked)
    for at, draft in guided.items():
        draft.take(drafts[at], asked[at].num_tokens)
    while growing := [draft for draft in guided.values() if draft.is_growing]:
        asked = [draft.next_row for draft in growing]
        for draft, row, proposed in zip(growing, asked, propose(asked), strict=True):
            draft.take(proposed, row.num_tokens)
    return [guided[at].draft if at in guided else draft for at, draft in enumerate(drafts)]
