#!/usr/bin/env python3
"""What the steps of an engine take on this machine's GPUs, and which share of them the sums between the ranks have.

usage: plugins/check/steps.py ENGINE_DIR [--runs 50] [--hidden 4096] [--json]

Steps of the target, from one token of one row to 16 tokens of 16 rows, behind 200 cached tokens: the median of so many
runs after the first ones, and whether a step is a CUDA graph, or why not. For an engine of several ranks also the sum
(all-reduce) of one product, [tokens, hidden] in 16 bits, on the same GPUs by itself: launched, and in a CUDA graph; and
which share of the step its sums have, that of the logits, [tokens, vocabulary], among them.
--hidden is the model's hidden size; without it config.json of the checkpoint that fly.json names is read.
"""

import argparse
import json
import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fly_trt import FlyError
from fly_trt.engines import Engine, cuda, nccl
from fly_trt.engines.directory import LoadedEngines
from fly_trt.manifest import Manifest, read_manifest

SHAPES = [(1, 1), (1, 16), (4, 1), (4, 16), (16, 1), (16, 16)]
CACHED_TOKENS = 200
WARM_UP_RUNS = 5
NUM_IN_GRAPH = 100  # sums in one graph, so that launching it counts little
ANSWER_SECONDS = 120


@dataclass
class Row:
    """Times in ms. `no_graph` says why the step is not a CUDA graph. The sum's times are of one of `num_sums`, and its
    share is that of all of them, in a graph where they can be, of the step."""

    batch_size: int
    num_tokens: int
    step: float
    no_graph: str | None
    num_sums: int = 0
    sum_launched: float | None = None
    sum_in_graph: float | None = None
    share: float | None = None


class GraphWarnings(logging.Handler):
    """The engine warns when it could not capture a step."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def time_steps(directory: Path, runs: int) -> list[Row]:
    warnings = GraphWarnings()
    logging.getLogger("fly_trt.engines").addHandler(warnings)
    rows = []
    with LoadedEngines(directory) as engines:
        layers = engines.manifest.target.tensorrt.layers if engines.manifest.target.tensorrt else None
        for batch_size, num_tokens in SHAPES:
            if batch_size <= engines.max_batch_size:
                warnings.last = None
                step = _time(engines.target, batch_size, num_tokens, runs)
                num_sums = layers.collective if layers else 0
                rows.append(Row(batch_size, num_tokens, step, warnings.last, num_sums))
    return rows


def _time(engine: Engine, batch_size: int, num_tokens: int, runs: int) -> float:
    step = engine.step(0, batch_size, num_tokens)
    for row in range(batch_size):
        step.set_row(row, CACHED_TOKENS, np.ones(num_tokens, np.int64))
    return _median(lambda: engine.run(step), runs)


def _median(work: Callable[[], None], runs: int) -> float:
    """Milliseconds."""
    times = []
    for _ in range(WARM_UP_RUNS + runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[WARM_UP_RUNS:])


class _Array:
    """Device memory of 16-bit numbers, as nccl4py takes it."""

    def __init__(self, count: int) -> None:
        self.buffer = cuda.DeviceBuffer(2 * count)
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "<f2",
            "data": (self.buffer.address, False),
            "version": 3,
        }


def time_sums(num_ranks: int, counts: list[int], runs: int) -> dict[int, tuple[float, float | None]]:
    """By how many numbers are summed: ms of a sum that is launched, and of one in a CUDA graph, or None."""
    shared_id = nccl.unique_id()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = [(rank, num_ranks, shared_id, counts, runs, theirs if rank == 0 else None) for rank in range(num_ranks)]
    ranks = [context.Process(target=_rank, args=values, daemon=True) for values in arguments]
    for rank in ranks:
        rank.start()
    theirs.close()
    try:
        if not ours.poll(ANSWER_SECONDS):
            raise FlyError(f"{num_ranks} ranks have not summed in {ANSWER_SECONDS} s: see NCCL_DEBUG=INFO")
        times: dict[int, tuple[float, float | None]] = ours.recv()
        return times
    except EOFError:
        raise FlyError(f"{num_ranks} ranks: one of them ended while they summed: see above") from None
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _rank(rank: int, num_ranks: int, shared_id: bytes, counts: list[int], runs: int, answer: Connection | None) -> None:
    core = nccl.load()
    cuda.use_device(rank)
    stream = cuda.Stream()
    communicator = core.Communicator.init(num_ranks, rank, core.UniqueId.from_bytes(shared_id))
    times: dict[int, tuple[float, float | None]] = {}
    for count in counts:
        array = _Array(count)
        stream.clear(array.buffer.address, array.buffer.num_bytes)

        def add(array: _Array = array) -> None:
            communicator.allreduce(array, array, core.SUM, stream=stream.handle)

        def launched(add: Callable[[], None] = add) -> None:
            for _ in range(NUM_IN_GRAPH):
                add()
            stream.synchronize()

        plain = _median(launched, runs) / NUM_IN_GRAPH
        captured: float | None = None
        try:
            graph = stream.capture(lambda add=add: [add() for _ in range(NUM_IN_GRAPH)])  # type: ignore[misc]
        except FlyError as error:
            print(f"no sum in a CUDA graph: {error}", file=sys.stderr)
        else:

            def replayed(graph: cuda.Graph = graph) -> None:
                graph.launch()
                stream.synchronize()

            captured = _median(replayed, runs) / NUM_IN_GRAPH
        times[count] = plain, captured
    if answer is not None:
        answer.send(times)


def _hidden_size(manifest: Manifest) -> int | None:
    try:
        config = json.loads(Path(manifest.target.source.checkpoint, "config.json").read_text(encoding="utf-8"))
        return int(config["hidden_size"])
    except (OSError, ValueError, KeyError):
        return None


def _add_sums(rows: list[Row], num_ranks: int, hidden_size: int, vocab_size: int, runs: int) -> None:
    """All sums are of hidden states, but for that of the logits where the vocabulary is cut, which is where it can be
    divided."""
    widths = [hidden_size, vocab_size] if vocab_size % num_ranks == 0 else [hidden_size]
    counts = {row.batch_size * row.num_tokens * width for row in rows for width in widths}
    times = time_sums(num_ranks, sorted(counts), runs)
    for row in rows:
        (launched, captured), *of_logits = (times[row.batch_size * row.num_tokens * width] for width in widths)
        row.sum_launched, row.sum_in_graph = launched, captured
        is_launched = row.no_graph is not None or captured is None
        used = [pair[0] if is_launched or pair[1] is None else pair[1] for pair in ((launched, captured), *of_logits)]
        row.share = ((row.num_sums - len(of_logits)) * used[0] + sum(used[1:])) / row.step


def _print(rows: list[Row]) -> None:
    table = Table(title="Steps of the target, ms")
    for column in ("rows", "tokens", "step", "sums", "one sum launched", "in a graph", "share", "CUDA graph"):
        table.add_column(column, justify="left" if column == "CUDA graph" else "right")
    for row in rows:
        sums = ["" if time is None else f"{time:.4f}" for time in (row.sum_launched, row.sum_in_graph)]
        share = "" if row.share is None else f"{row.share:.0%}"
        sizes = f"{row.batch_size}", f"{row.num_tokens}", f"{row.step:.3f}", f"{row.num_sums}"
        table.add_row(*sizes, *sums, share, row.no_graph or "yes")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--hidden", type=int, help="the model's hidden size [of the checkpoint's config.json]")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        manifest = read_manifest(args.engine_dir)
        num_ranks, hidden_size = manifest.target.tensor_parallel_size, args.hidden or _hidden_size(manifest)
        if num_ranks > 1 and hidden_size is None:
            parser.error(f"--hidden: {manifest.target.source.checkpoint} has no config.json here: give the hidden size")
        rows = time_steps(args.engine_dir, args.runs)
        if num_ranks > 1 and hidden_size is not None:
            _add_sums(rows, num_ranks, hidden_size, manifest.target.vocab_size, args.runs)
    except FlyError as error:
        parser.exit(2, f"steps: {error}\n")
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _print(rows)


if __name__ == "__main__":
    main()
