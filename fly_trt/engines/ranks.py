"""Engines that span several GPUs: rank 0 lives in the caller's process, each other rank in a process of its own.

Rank 0 is an engine like any other and the only one that anybody listens to. Whatever it is told to do it first tells
the others, in one small message, and all of them then launch the same work in the same order; the sums between them are
the engine library's. So the others have rank 0's tokens, and bits that differ between ranks cannot part them.

One set of processes serves all engines of a directory. This module knows what ranks do together; it knows no process
and runs no engine library.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from fly_trt.engines import cuda, load_engine, nccl
from fly_trt.engines.base import Engine, EngineInfo, Step
from fly_trt.engines.rank_group import END_SECONDS, ENDED, Other, RankGroup
from fly_trt.engines.rank_messages import Op, pack_inputs, tested, unpack_tested
from fly_trt.engines.tensorrt_library import check_ranks
from fly_trt.errors import EngineDeadError, EngineError, one_line
from fly_trt.manifest import Manifest, ModelEngine, TensorRTPlan
from fly_trt.tokens import FloatArray

Result = TypeVar("Result")

TEST_TOKENS = 8
TEST_STRIDE = 7919  # a prime: the tokens lie all over the vocabulary
MOST_DIFFERENCE = 0.25  # of the standard deviation of what is compared


class RankEngine(Engine, Protocol):
    """One rank's part of an engine, as a backend that can span GPUs loads it."""

    def use_device(self) -> None:
        """Makes the rank's GPU the calling thread's current one."""
        ...

    def join(self, communicator: nccl.Communicator, agree: Callable[[bool], bool]) -> None:
        """What the rank sums with the others through, from the first step on; it must outlive the engine. `agree` says
        of something that this rank could do, or could not, whether all ranks could."""
        ...

    def rank_output(self, num_positions: int) -> FloatArray:
        """float32 [num_positions, RANK_CHANNELS]: what this rank's last step, of one row, ended with, before the
        vocabulary."""
        ...


class Ranks:
    """The ranks of a directory's engines, one on each of `devices`. The processes start with the first engine."""

    def __init__(self, devices: Sequence[int]) -> None:
        self._group = RankGroup(devices)
        self._num_engines = 0

    def when_failed(self, tell: Callable[[str], None]) -> None:
        """Has the bound method `tell` told why the ranks cannot run any more, in one line, once that is so."""
        self._group.when_failed(tell)

    def load(
        self, directory: Path, manifest: Manifest, model: ModelEngine, *, num_slots: int, num_spare_slots: int = 0
    ) -> "RankedEngine":
        """Loads `model` on as many ranks as it has, and compares what they say of one row. Raises EngineError, and
        ConfigError for a device that does not exist."""
        group, path = self._group, directory / model.model
        plan = check_ranks(path, model.tensorrt)
        cuda.check_devices(group.devices)
        nccl.load()  # before the engine library looks for libnccl
        group.start()
        number, self._num_engines = self._num_engines, self._num_engines + 1
        others = group.others[: model.tensor_parallel_size - 1]
        slots: dict[str, Any] = {"num_slots": num_slots, "num_spare_slots": num_spare_slots}
        engine: RankEngine | None = None
        try:
            for other in others:
                group.tell([other], Op.LOAD, number, payload=_wanted(directory, manifest, model, slots, other))
            loaded = load_engine(directory, manifest, model, device_id=group.devices[0], **slots)
            engine = cast(RankEngine, loaded)
            group.hear(others, Op.DONE)
            communicator = self._join(engine, number, others)
            ranked = RankedEngine(group, others, number, engine, communicator)
            ranked.compare(path, plan)
        except BaseException as error:
            group.fail(one_line(error))
            group.end()
            if engine is not None:
                engine.close()
            raise
        return ranked

    def end(self) -> None:
        """Ends the processes, after the engines were closed. Safe to call twice; leaves no process behind."""
        self._group.end()

    def _join(self, engine: RankEngine, number: int, others: Sequence[Other]) -> nccl.Communicator:
        """All ranks at once: each waits for the others."""
        num_ranks, shared_id = len(others) + 1, nccl.unique_id()

        def join() -> nccl.Communicator:
            engine.use_device()
            made = nccl.Communicator(num_ranks, 0, shared_id)
            self._group.add(made)  # here: nobody else aborts it where this thread was left behind
            return made

        self._group.tell(others, Op.JOIN, number, [num_ranks], shared_id)
        communicator = self._group.wait_for(join)
        engine.join(communicator, lambda could: self._agree(others, could))
        self._group.hear(others, Op.DONE)
        return communicator

    def _agree(self, others: Sequence[Other], could: bool) -> bool:
        answers = self._group.hear(others, Op.COULD)
        could_all = could and all(answer.numbers[0] for answer in answers)
        self._group.tell(others, Op.COULD, 0, [could_all])
        return could_all


class RankedEngine:
    """Rank 0's engine and those of the other ranks as one (base.Engine)."""

    info: EngineInfo

    def __init__(
        self,
        group: RankGroup,
        others: Sequence[Other],
        number: int,
        engine: RankEngine,
        communicator: nccl.Communicator,
    ) -> None:
        self.info = engine.info
        self._group = group
        self._others = others
        self._number = number
        self._engine = engine
        self._communicator = communicator
        self._is_closed = False

    @property
    def num_preparations(self) -> int:
        return self._engine.num_preparations

    def step(
        self,
        first_slot: int,
        batch_size: int,
        num_tokens: int,
        *,
        num_positions: int | None = None,
        with_logits: bool = False,
        with_top: bool = False,
    ) -> Step:
        outputs: dict[str, Any] = {"num_positions": num_positions, "with_logits": with_logits, "with_top": with_top}
        return self._engine.step(first_slot, batch_size, num_tokens, **outputs)

    def run(self, step: Step) -> None:
        numbers = step.first_slot, *step.input_ids.shape, step.num_positions
        self._do(Op.RUN, numbers, lambda: self._engine.run(step), pack_inputs(step))

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        numbers = source, target, num_tokens
        self._do(Op.COPY_SLOT, numbers, lambda: self._engine.copy_slot(*numbers))

    def swap_slots(self, first: int, second: int, num_tokens: int) -> None:
        numbers = first, second, num_tokens
        self._do(Op.SWAP_SLOTS, numbers, lambda: self._engine.swap_slots(*numbers))

    def clear_slot(self, slot: int, start: int) -> None:
        self._do(Op.CLEAR_SLOT, (slot, start), lambda: self._engine.clear_slot(slot, start))

    def trim(self, num_tokens: int) -> int:
        return self._do(Op.TRIM, (num_tokens,), lambda: self._engine.trim(num_tokens))

    def close(self) -> None:
        """Of this rank and the others, which need not be there any more."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(EngineDeadError):
            self._group.tell(self._others, Op.CLOSE, self._number)
        self._engine.close()
        self._communicator.abort_within(END_SECONDS)

    def compare(self, path: Path, plan: TensorRTPlan) -> None:
        """Runs one row on all ranks. All of them have its hidden states and logits, and they agree only where the sums
        were made, since each rank has other weights. Raises EngineError where they do not: there are libraries that
        leave the sums out without a word."""
        num_tokens = min(TEST_TOKENS, self.info.max_num_tokens)
        step = self._engine.step(0, 1, num_tokens, with_logits=True)
        step.set_row(0, 0, np.arange(1, num_tokens + 1) * TEST_STRIDE % self.info.vocab_size)
        self._do(Op.TEST, (0, 1, num_tokens, num_tokens), lambda: self._engine.run(step), pack_inputs(step))
        answers = self._group.hear(self._others, Op.TESTED)
        ours = tested(self._engine, step)
        theirs = [unpack_tested(answer.payload, ours) for answer in answers]
        for what in ours:
            spread = float(ours[what].std())
            differences = [_difference(ours[what], said[what]) for said in theirs]
            worst = int(np.argmax(differences))
            if not differences[worst] <= MOST_DIFFERENCE * spread:
                raise EngineError(
                    f"{path}: the ranks do not sum: {what} of one row differ by {differences[worst]:.3g} between ranks "
                    f"0 and {self._others[worst].rank}, with a standard deviation of {spread:.3g}: {plan.library} "
                    f"{plan.version} leaves sums out of this engine, or its files are of different builds: install a "
                    "newer version and rebuild with fly-build"
                )

    def _do(self, op: Op, numbers: Sequence[int], work: Callable[[], Result], payload: bytes = b"") -> Result:
        try:
            self._group.tell(self._others, op, self._number, numbers, payload)
            return self._group.together(work)
        except (KeyboardInterrupt, SystemExit) as error:  # some ranks may have done it and others not
            self._group.fail(f"{one_line(error)} in the middle of {op.name}: {ENDED}")
            raise


def _wanted(directory: Path, manifest: Manifest, model: ModelEngine, slots: Mapping[str, int], other: Other) -> bytes:
    """What a rank needs to know to load its part."""
    return json.dumps(
        {
            "directory": str(directory.resolve()),
            "manifest": manifest.model_dump(mode="json"),
            "model": model.model_dump(mode="json"),
            "slots": slots,
            "rank": other.rank,
            "device_id": other.device,
        }
    ).encode()


def _difference(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """The largest; infinite where something is not a number."""
    difference = float(np.abs(one - other).max())
    return difference if np.isfinite(difference) else np.inf
