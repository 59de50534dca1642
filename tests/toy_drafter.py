"""A drafter that the product does not have, as its author would write it: one module."""

from collections.abc import Sequence

import numpy as np

from fly_trt.drafting import Draft, DraftParts, DraftRow, DraftSettings, FreeDrafter
from fly_trt.verification import DraftSource


class PeriodDrafter(FreeDrafter):
    """Proposes that the last few tokens come again."""

    def __init__(self, period: int) -> None:
        self._period = period

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        return [Draft.of(np.resize(row.tokens[-self._period :], row.num_tokens), DraftSource.LOOKUP) for row in rows]


def period(settings: DraftSettings, parts: DraftParts) -> PeriodDrafter:
    return PeriodDrafter(settings.prompt_lookup_max)
