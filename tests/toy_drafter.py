"""A drafter that the product does not have, as its author would write it: one module."""

from collections.abc import Sequence

import numpy as np

from fly_trt.drafting import DraftParts, DraftRow, DraftSettings, FreeDrafter
from fly_trt.tokens import IntArray


class PeriodDrafter(FreeDrafter):
    """Proposes that the last few tokens come again."""

    def __init__(self, period: int) -> None:
        self._period = period

    def propose(self, rows: Sequence[DraftRow]) -> list[IntArray]:
        return [np.resize(tokens[-self._period :], num_tokens) for _, tokens, num_tokens in rows]


def period(settings: DraftSettings, parts: DraftParts) -> PeriodDrafter:
    return PeriodDrafter(settings.prompt_lookup_max)
