"""Whether guesses pay for a draft model that makes several steps in one call. They save steps and cost calls: which is
more depends on model, machine and text, so that proposals with guesses and without are measured beside each other. It
knows numbers of rows and seconds.
"""

RETRY = 8  # proposals, of which one is the other way
NEW = 0.25  # weight of the last proposal beside those before


class GuessTrials:
    """Seconds of a draft token in proposals with guesses and without, by rows."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, bool], float] = {}
        self._num_chosen: dict[int, int] = {}

    def choose(self, num_rows: int) -> bool:
        """Whether the next proposal for so many rows is one with guesses: mostly as pays better."""
        for way in (True, False):
            if (num_rows, way) not in self._seconds:
                return way
        number = self._num_chosen[num_rows] = self._num_chosen.get(num_rows, 0) + 1
        pays = self._seconds[num_rows, True] <= self._seconds[num_rows, False]
        return pays != (number % RETRY == 0)

    def observe(self, num_rows: int, num_tokens: int, seconds: float, *, has_guesses: bool) -> None:
        """A proposal of `num_tokens` tokens in all."""
        each = seconds / num_tokens
        before = self._seconds.get((num_rows, has_guesses), each)
        self._seconds[num_rows, has_guesses] = before + NEW * (each - before)
