"""What is planned of one model before anything is built, and where it is built: sizes, ranks and steps.

It needs a checkpoint's configuration and no library that makes graphs, so that a backend whose own library reads
checkpoints plans and builds without one.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fly_build.checkpoint import Checkpoint
from fly_build.progress import Report
from fly_build.sharding import Sharding
from fly_build.tensors import INPUT_NAME, OUTPUT_NAME
from fly_trt.manifest import Head, Limits, ModelEngine

if TYPE_CHECKING:
    from fly_build.linear_form import Kernels


@dataclass(frozen=True)
class ModelPlan:
    """One engine to build: `folder` is its place in the engine directory; a draft made of the target leaves out the
    blocks `skipped` (blocks.py) and lies beside it, under `name`. `kernels` compute it, or another library, whose
    weights take `bits`: of linear layers and of the vocabulary projection. `sharding` is how it is spread over several
    ranks."""

    folder: str
    checkpoint: Checkpoint
    engine: ModelEngine
    skipped: tuple[int, ...] = ()
    name: str = ""
    kernels: "Kernels" = "cpu"
    bits: tuple[float, float] | None = None
    sharding: Sharding | None = None

    def weight_bytes(self) -> int:
        """Size of the stored weights of one rank; embeddings, norms and mixtures' experts stay unquantised."""
        plain = self._plain_bits
        bits, output_bits = self._bits_per_weight
        is_shared = self.checkpoint.config.tie_word_embeddings and output_bits == plain
        total = 0.0
        for name, shape in self.checkpoint.parameter_shapes.items():
            if name == OUTPUT_NAME and is_shared:
                continue
            own = shape if self.sharding is None else self.sharding.rank_shape(name, shape)
            is_linear = len(shape) == 2 and name != INPUT_NAME
            total += math.prod(own) * (output_bits if name == OUTPUT_NAME else bits if is_linear else plain)
        return int(total) // 8

    @property
    def _plain_bits(self) -> int:
        return 32 if self.engine.dtype == "float32" else 16

    @property
    def _bits_per_weight(self) -> tuple[float, float]:
        """Of linear layers and of the vocabulary projection."""
        if (scheme := self.checkpoint.scheme) is not None:
            return scheme.bits_per_weight, self._plain_bits
        if self.bits is not None:
            return self.bits
        from fly_build.linear_forms import bits_per_weight

        return bits_per_weight(self.kernels, self.engine.quantization, self._plain_bits)


@dataclass(frozen=True)
class Build:
    """What one model is built from and where: `workspace` becomes the engine directory."""

    model: ModelPlan
    limits: Limits
    head: Head
    workspace: Path
    report: Report

    @property
    def path(self) -> Path:
        """Of the file that the runtime loads."""
        return self.workspace / self.model.engine.model

    @contextlib.contextmanager
    def step(self, name: str, rank: int | None = None) -> Iterator[Callable[[float], None]]:
        """Reports the begin and the end of a step, and in between what the function is told, as a fraction. `rank` is
        that of a step which each rank of a sharded model has."""
        num_ranks = self.model.engine.tensor_parallel_size
        of_ranks = f" rank {rank} of {num_ranks}" if num_ranks > 1 and rank is not None else ""
        name = f"{self.model.name or self.model.folder}{of_ranks}: {name}"
        self.report(name, 0.0)
        yield lambda fraction: self.report(name, fraction)
        self.report(name, 1.0)
