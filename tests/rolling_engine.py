"""A table engine with rollouts, whose steps are those of the table."""

from typing import Any

import numpy as np

from fly_trt.engines.rollouts import ROLLOUT_OUTPUTS, Rollout
from table_engine import TableEngine


class RollingEngine(TableEngine):
    """Keeps the rows and steps of each rollout in `rollouts`; what it is fed is checked as the table checks steps. What
    follows a step that is not a number is none either. The full entropies are always there."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.has_rollouts = True
        self.rollouts: list[tuple[int, int, int]] = []  # first slot, rows and steps

    def rollout(self, first_slot: int, batch_size: int, num_steps: int) -> Rollout:
        return Rollout.make(first_slot, batch_size, num_steps)

    def run_rollout(self, rollout: Rollout) -> None:
        batch_size = len(rollout.input_ids)
        self.rollouts.append((rollout.first_slot, batch_size, rollout.num_steps))
        step = self.step(rollout.first_slot, batch_size, 1)
        tokens = rollout.input_ids[:, 0].copy()
        for k in range(rollout.num_steps):
            for row in range(batch_size):
                step.set_row(row, int(rollout.write_indices[row]) + k, tokens[row : row + 1])
            step.use_full_entropy[:] = True
            self.run(step)
            for name in ROLLOUT_OUTPUTS:
                getattr(rollout, name)[k] = getattr(step, name)
            tokens = np.clip(step.argmax[:, 0], 0, self.info.vocab_size - 1)
