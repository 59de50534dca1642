"""Rollouts: several greedy steps of one token a row in a single call, for a draft model whose steps cost little more
than their calls.

An engine need not have any. What a rollout chooses, and says of it, has the bits of as many steps.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fly_trt.engines.base import Engine
from fly_trt.errors import EngineError
from fly_trt.tokens import FloatArray, IntArray

NUM_STEPS = "num_steps"
# Per step and row [K, B, 1]; the first is the token that the next step reads.
ROLLOUT_OUTPUTS: dict[str, type[np.generic]] = {
    "argmax": np.int64,
    "argmax_logprob": np.float32,
    "entropy": np.float32,
    "entropy_topk": np.float32,
}
LONGEST_ROLLOUT = 16


@dataclass(slots=True)
class Rollout:
    """The buffers of K steps of B consecutive slots. Callers fill the inputs, `run_rollout` fills the outputs, and both
    stay valid until the same shape runs again.

    Inputs: input_ids int64 [B, 1], the token that each row reads first, at its position write_indices int64 [B].
    Outputs int64 and float32 [K, B, 1], as those of a step (base.Step) in which all rows use the full entropy:
    argmax[k] is what step k + 1 reads; of `idle_rows` nothing is promised."""

    first_slot: int
    input_ids: IntArray
    write_indices: IntArray
    argmax: IntArray
    argmax_logprob: FloatArray
    entropy: FloatArray
    entropy_topk: FloatArray
    binding: Any = None
    idle_rows: set[int] = field(init=False, default_factory=set)

    @classmethod
    def make(cls, first_slot: int, batch_size: int, num_steps: int) -> "Rollout":
        """Raises EngineError for more steps than LONGEST_ROLLOUT."""
        if not 1 <= num_steps <= LONGEST_ROLLOUT:
            raise EngineError(
                f"a rollout of {num_steps} steps: expected 1 to {LONGEST_ROLLOUT}: ask for the others in another one"
            )
        outputs: dict[str, Any] = {
            name: np.zeros((num_steps, batch_size, 1), dtype) for name, dtype in ROLLOUT_OUTPUTS.items()
        }
        return cls(first_slot, np.zeros((batch_size, 1), np.int64), np.zeros(batch_size, np.int64), **outputs)

    @property
    def num_steps(self) -> int:
        return len(self.argmax)

    def set_row(self, row: int, cached: int, token: int) -> None:
        """Fills row `row`: `cached` tokens lie in the slot, and `token` is read first."""
        self.write_indices[row], self.input_ids[row] = cached, token
        self.idle_rows.discard(row)

    def set_idle(self, row: int, cached: int) -> None:
        """Fills row `row`, of which nobody wants anything: it writes behind `cached` tokens, where nothing is held."""
        self.set_row(row, cached, 0)
        self.idle_rows.add(row)


@runtime_checkable
class RollsOut(Engine, Protocol):
    """An engine with rollouts, if `has_rollouts`."""

    has_rollouts: bool

    def rollout(self, first_slot: int, batch_size: int, num_steps: int) -> Rollout:
        """The buffers for slots first_slot .. first_slot + batch_size - 1 and num_steps, at most LONGEST_ROLLOUT; made
        once per shape. Raises EngineError for slots that do not exist, and for more steps."""
        ...

    def run_rollout(self, rollout: Rollout) -> None:
        """Runs the steps and waits for their outputs, as `Engine.run` does: it grows the cache, and after one that
        raised nobody knows what the slots hold."""
        ...
