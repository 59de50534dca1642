"""Drafts of requests that follow a grammar: what it forces stands in them for nothing, and what it forbids ends them.

The drafter is shown what stands so far as if the target had taken it, and proposes what comes next. Its tokens are
taken as they are up to the first that the grammar forbids; there the draft goes on with what the grammar forces, or
ends where it forces nothing. So a draft is the same in whichever parts it is asked for. It knows drafts and grammars,
and nothing of steps.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fly_trt.drafting import Draft, DraftRow
from fly_trt.grammar import GrammarMatcher
from fly_trt.runtime.rounds import Round
from fly_trt.tokens import IntArray
from fly_trt.verification import DraftScores, DraftSource

# A model's tokens are asked for in parts: behind one that is forbidden they were drafted for nothing.
PART = 4

Propose = Callable[[Sequence[DraftRow]], list[Draft]]


class GuidedDraft:
    """The draft of one round as it grows to the tokens that `row` asks for. output int64 [k]: what is committed."""

    def __init__(self, row: DraftRow, round_: Round, grammar: GrammarMatcher, output: IntArray) -> None:
        self._row = row
        self._round = round_
        self._grammar = grammar
        self._output = output
        self._most = round_.num_draft - round_.num_committed
        kept = slice(round_.num_committed, None)
        evidence = round_.evidence
        scores = DraftScores._make(array[kept] for array in evidence.scores)
        self._draft = Draft(evidence.draft[kept], evidence.sources[kept], scores)
        self._num_asked = 0
        self._has_ended = False

    @property
    def is_growing(self) -> bool:
        return not self._has_ended and len(self._draft.tokens) < self._row.num_tokens

    def next_row(self, num_tokens: int) -> DraftRow:
        """Asks for at most so many tokens more."""
        ahead = self._draft.tokens
        self._num_asked = min(num_tokens, self._row.num_tokens - len(ahead))
        if not len(ahead):
            return self._row._replace(num_tokens=self._num_asked)
        tokens = np.concatenate([self._row.tokens, ahead])
        return self._row._replace(tokens=tokens, num_tokens=self._num_asked, num_ahead=len(ahead))

    def take(self, proposed: Draft, *, is_free: bool) -> None:
        """What the drafter says to the row. One that is free may have more to say behind what is forced."""
        num_proposed = len(proposed.tokens)
        ahead = np.concatenate([self._draft.tokens, proposed.tokens])
        num_allowed = self._grammar.num_allowed(self._output, ahead) - len(self._draft.tokens) if num_proposed else 0
        if num_allowed < num_proposed:
            proposed = _first(proposed, num_allowed)
        self._draft = _joined(self._draft, proposed)
        is_cut, is_short = num_allowed < num_proposed, num_proposed < self._num_asked
        if is_cut or (is_short and is_free):
            forced = self._grammar.forced(self._output, self._draft.tokens)
            forced = forced[: self._most - len(self._draft.tokens)]
            self._has_ended = not len(forced)
            self._round.is_cut = is_cut and self._has_ended
            self._draft = _joined(self._draft, forced_draft(forced, is_scored=self._row.is_scored))
        else:
            self._has_ended = is_short

    def result(self, *, is_whole: bool) -> Draft:
        """is_whole: see Draft."""
        return self._draft._replace(is_whole=is_whole)


def forced_draft(tokens: IntArray, *, is_scored: bool) -> Draft:
    """Draft tokens that a grammar forces, beside those of a model that gives scores or not."""
    scores = DraftScores.none(len(tokens) if is_scored else 0)
    return Draft.of(tokens, DraftSource.GRAMMAR, scores, is_whole=False)


def propose_guided(
    rows: Sequence[DraftRow], guided: dict[int, GuidedDraft], propose: Propose, *, is_free: bool
) -> list[Draft]:
    """A draft for each of the rows, of which those with the indexes of `guided` follow a grammar. is_free: the
    drafter's; such drafts are made as a whole."""
    # Beside rows that want a whole draft, parts would only make more steps.
    part = PART if not is_free and len(guided) == len(rows) else max(row.num_tokens for row in rows)
    asked = [guided[at].next_row(part) if at in guided else row for at, row in enumerate(rows)]
    drafts = propose(asked)
    for at, draft in guided.items():
        draft.take(drafts[at], is_free=is_free)
    while growing := [draft for draft in guided.values() if draft.is_growing]:
        parts = propose([draft.next_row(PART if not is_free else part) for draft in growing])
        for draft, proposed in zip(growing, parts, strict=True):
            draft.take(proposed, is_free=is_free)
    for at, draft in guided.items():
        drafts[at] = draft.result(is_whole=is_free)
    return drafts


def _first(draft: Draft, num_tokens: int) -> Draft:
    scores = draft.scores.first(num_tokens)
    return Draft(draft.tokens[:num_tokens], draft.sources[:num_tokens], scores, draft.is_whole)


def _joined(draft: Draft, more: Draft) -> Draft:
    if not len(more.tokens):
        return draft
    tokens = np.concatenate([draft.tokens, more.tokens])
    return Draft(tokens, np.concatenate([draft.sources, more.sources]), draft.scores.followed_by(more.scores))
