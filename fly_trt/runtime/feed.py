"""What a row of a step is fed. The scheduler plans it, a round says what it needs, and the loop reads its row by it."""

from typing import NamedTuple

from fly_trt.tokens import NO_TOKENS, IntArray


class Feed(NamedTuple):
    """What one row of a step processes: committed tokens that are not cached yet, and draft tokens after them; within a
    round draft tokens come as context. `first` is the row's first position that a round wants to hear of, and
    `heard_from` the first one that the step speaks of, which somebody wants where the row `is_wanted`. Where it
    `takes_risks` there are draft tokens behind the first position, and one of them may spoil the row."""

    context: IntArray
    draft: IntArray = NO_TOKENS
    first: int = 0
    takes_risks: bool = False
    heard_from: int = 0
    is_wanted: bool = True

    @property
    def num_tokens(self) -> int:
        return len(self.context) + len(self.draft)

    @property
    def num_heard(self) -> int:
        """Positions that the step has to speak of."""
        return self.num_tokens - self.heard_from
