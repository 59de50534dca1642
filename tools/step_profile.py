"""Where a step's time goes, operator by operator, and what steps take, of one engine directory or of several by turns.

usage: tools/step_profile.py ENGINE_DIR [ENGINE_DIR ...] [--role target|draft|inner_draft] [--shapes 1x1 1x16 1x64 4x16]
       [--cached 128 ...] [--rounds 10] [--threads N] [--nodes N] [--json]

A shape is rows x tokens. What a step takes is measured first, without a profiler and by turns: shape by shape and,
where there are several directories, one beside the other, so that a noisy machine slows all of them; medians over the
rounds (lowest), and the ratio to the first directory's within a round. Then each model is loaded once more with ONNX
Runtime's profiler, and every operator's time is printed in ms a step, the mean of the faster half of the profiled
steps, without what nodes inside it (If) have as theirs. `between nodes` is ONNX Runtime's cost from one to the next,
the profiler's own included. --nodes N prints the slowest N single nodes of each shape. Engines of ONNX Runtime on the
CPU only.

    tools/step_profile.py engines/demo --shapes 1x1 1x64 --cached 100 3000
    tools/step_profile.py engines/before engines/after --shapes 1x16     # a change, by turns
"""

import argparse
import bisect
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from fly_trt.engines import onnxruntime
from fly_trt.engines.base import Engine, Step
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import ConfigError, FlyError

RUNS = 3  # of a step in a round
WARM_UP_RUNS = 2  # before them
WIDTH = 130  # columns where there is no terminal
SMALL = 0.005  # of a step: operators below are shown together
KERNEL = "_kernel_time"


class Shape(NamedTuple):
    """Of a step: rows of `num_tokens` tokens each, behind `num_cached` in each slot."""

    rows: int
    num_tokens: int
    num_cached: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.num_tokens} at {self.num_cached}"


class Event(NamedTuple):
    """A node's run in a profile: seconds from its start."""

    operator: str
    node: str
    started: float
    seconds: float


class ProfiledRun(NamedTuple):
    """Of a session: its seconds, and the nodes in the order of their starts."""

    seconds: float
    events: list[Event]


@dataclass
class Operators:
    """Of one shape: ms a step, and by operator ms and nodes a step; ms a step by node."""

    total: float = 0.0
    milliseconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_nodes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    nodes: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@contextlib.contextmanager
def profiled(folder: str) -> Iterator[None]:
    """Sessions of engines that are loaded in here write a profile."""
    make = onnxruntime.session_options

    def options(num_threads: int | None = None) -> ort.SessionOptions:
        made = make(num_threads)
        made.enable_profiling = True
        made.profile_file_prefix = f"{folder}/profile"
        return made

    onnxruntime.session_options = options
    try:
        yield
    finally:
        onnxruntime.session_options = make


def make_step(engine: Engine, shape: Shape) -> Step:
    step = engine.step(0, shape.rows, shape.num_tokens)
    rng = np.random.default_rng(0)
    for row in range(shape.rows):
        step.set_row(row, shape.num_cached, rng.integers(0, engine.info.vocab_size, shape.num_tokens))
    return step


def check(engine: Engine, shape: Shape) -> None:
    """Raises ConfigError for a shape that the engine cannot run."""
    info, num_tokens = engine.info, shape.num_cached + shape.num_tokens
    for found, limit, name in (
        (shape.rows, info.max_batch_size, "rows, and was built with --max-batch-size"),
        (shape.rows * shape.num_tokens, info.max_num_tokens, "tokens a step, and was built with --max-num-tokens"),
        (num_tokens, info.max_seq_len, "tokens a row, and was built with --max-seq-len"),
    ):
        if found > limit:
            raise ConfigError(f"shape {shape}: asks for {found} {name} {limit}: choose a smaller one, or rebuild")


def run_steps(engine: Engine, shape: Shape, num_runs: int) -> float:
    """ms of a step, the mean of `num_runs` after WARM_UP_RUNS that bind the shape. Slots hold nothing but this shape's
    room: what is allocated beyond what is cached would cost time too."""
    engine.trim(0)
    step = make_step(engine, shape)
    engine.run(step)
    for row in range(shape.rows):
        engine.clear_slot(row, 0)  # memory that was never written need not be read
    engine.run(step)
    with onnxruntime.held_cores():  # as the thread that serves
        started = time.perf_counter()
        for _ in range(num_runs):
            engine.run(step)
        return 1e3 * (time.perf_counter() - started) / num_runs


def read_profile(path: Path) -> list[ProfiledRun]:
    """Every run of the session whose profile this is; microseconds there."""
    events = json.loads(path.read_text(encoding="utf-8"))
    begun = sorted((event["ts"], event["dur"]) for event in events if event.get("name") == "model_run")
    runs = [ProfiledRun(seconds / 1e6, []) for _, seconds in begun]
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(KERNEL)]
    starts = [started for started, _ in begun]
    for node in sorted(nodes, key=lambda node: (node["ts"], -node["dur"])):
        events = runs[bisect.bisect_right(starts, node["ts"]) - 1].events
        name = node["name"].removesuffix(KERNEL)
        events.append(Event(node["args"]["op_name"], name, node["ts"] / 1e6, node["dur"] / 1e6))
    return runs


def sum_up(runs: Sequence[ProfiledRun]) -> Operators:
    """Means over the faster half of the runs. A node's time is without that of nodes that ran inside it."""
    runs = sorted(runs, key=lambda run: run.seconds)[: (len(runs) + 1) // 2]
    found = Operators(1e3 * sum(run.seconds for run in runs) / len(runs))
    for run in runs:
        open_nodes: list[Event] = []
        for event in run.events:
            while open_nodes and event.started >= open_nodes[-1].started + open_nodes[-1].seconds:
                open_nodes.pop()
            share = 1e3 * event.seconds / len(runs)
            if open_nodes:
                found.milliseconds[open_nodes[-1].operator] -= share
                found.nodes[open_nodes[-1].node] -= share
            found.milliseconds[event.operator] += share
            found.num_nodes[event.operator] += 1 / len(runs)
            found.nodes[event.node] += share
            open_nodes.append(event)
    return found


def profile(directory: Path, role: str, shapes: Sequence[Shape], num_runs: int, threads: int | None) -> list[Operators]:
    """By shape."""
    with (
        tempfile.TemporaryDirectory() as folder,
        profiled(folder),
        LoadedEngines(directory, num_threads=threads) as engines,
    ):
        engine = getattr(engines, role)
        for shape in shapes:
            run_steps(engine, shape, num_runs)
        runs = read_profile(Path(engine._session.end_profiling()))
    each_shape = WARM_UP_RUNS + num_runs
    each = [runs[start + WARM_UP_RUNS : start + each_shape] for start in range(0, len(runs), each_shape)]
    return [sum_up(of_shape) for of_shape in each]


def measure(
    engines: Sequence[LoadedEngines], role: str, shapes: Sequence[Shape], rounds: int
) -> list[list[list[float]]]:
    """ms by directory, shape and round."""
    found: list[list[list[float]]] = [[[] for _ in shapes] for _ in engines]
    for _ in range(rounds):
        for number, shape in enumerate(shapes):
            for directory, loaded in enumerate(engines):
                found[directory][number].append(run_steps(getattr(loaded, role), shape, RUNS))
    return found


def steps_table(args: argparse.Namespace, shapes: Sequence[Shape], measured: list[list[list[float]]]) -> Table:
    table = Table(title=f"{args.role}: ms a step, median of {args.rounds} rounds (lowest)")
    table.add_column("rows x tokens at cached")
    for directory in args.engine_dirs:
        table.add_column(str(directory), justify="right")
    for directory in args.engine_dirs[1:]:
        table.add_column(f"{directory} / first", justify="right")
    for number, shape in enumerate(shapes):
        of_shape = [by_shape[number] for by_shape in measured]
        times = [f"{statistics.median(rounds):.2f} ({min(rounds):.2f})" for rounds in of_shape]
        ratios = [
            f"{statistics.median(own / first for own, first in zip(rounds, of_shape[0], strict=True)):.2f}"
            for rounds in of_shape[1:]
        ]
        table.add_row(str(shape), *times, *ratios)
    return table


def operators_table(
    directory: Path, shapes: Sequence[Shape], found: Sequence[Operators], measured: list[list[float]]
) -> Table:
    """Slowest first, by the sum over the shapes."""
    table = Table(title=f"{directory}: ms a step by operator, profiled")
    table.add_column("operator")
    table.add_column("nodes", justify="right")
    for shape in shapes:
        table.add_column(str(shape), justify="right")
    names = sorted({name for each in found for name in each.milliseconds}, key=lambda name: -_sum(found, name))
    small = [name for name in names if all(each.milliseconds[name] < SMALL * each.total for each in found)]

    def add(title: str, of: Sequence[str]) -> None:
        nodes = max(sum(each.num_nodes[name] for name in of) for each in found)
        times = [sum(each.milliseconds[name] for name in of) for each in found]
        table.add_row(title, f"{nodes:.0f}", *(f"{time:.3f}" for time in times))

    for name in names:
        if name not in small:
            add(name, [name])
    if small:
        add(f"{len(small)} others", small)
    table.add_section()
    add("all nodes", names)
    between = [each.total - sum(each.milliseconds.values()) for each in found]
    table.add_row("between nodes", "", *(f"{time:.3f}" for time in between))
    table.add_row("measured without profiler", "", *(f"{statistics.median(rounds):.3f}" for rounds in measured))
    return table


def _sum(found: Sequence[Operators], operator: str) -> float:
    return sum(each.milliseconds[operator] for each in found)


def nodes_table(directory: Path, shape: Shape, operators: Operators, num_nodes: int) -> Table:
    table = Table(title=f"{directory}, {shape}: slowest nodes")
    table.add_column("node", overflow="fold")
    table.add_column("ms", justify="right")
    for name in sorted(operators.nodes, key=lambda name: -operators.nodes[name])[:num_nodes]:
        table.add_row(name, f"{operators.nodes[name]:.3f}")
    return table


def as_record(
    args: argparse.Namespace, shapes: Sequence[Shape], measured: list[list[list[float]]], found: list[list[Operators]]
) -> list[dict[str, Any]]:
    return [
        {
            "engine": str(directory),
            "role": args.role,
            **shape._asdict(),
            "milliseconds": measured[number][index],
            "profiled_milliseconds": found[number][index].total,
            "operators": dict(found[number][index].milliseconds),
            "num_nodes": dict(found[number][index].num_nodes),
            "nodes": dict(found[number][index].nodes),
        }
        for number, directory in enumerate(args.engine_dirs)
        for index, shape in enumerate(shapes)
    ]


def run(args: argparse.Namespace) -> None:
    shapes = [Shape(*shape, cached) for cached in args.cached for shape in args.shapes]
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(LoadedEngines(path, num_threads=args.threads))  # on one pool of threads
            for path in args.engine_dirs
        ]
        for loaded in engines:
            if (loaded.manifest.backend, loaded.backend.is_gpu) != ("onnxruntime", False):
                raise ConfigError(f"{loaded.directory}: built for {loaded.manifest.backend}: expected a CPU's engines")
            for shape in shapes:
                check(getattr(loaded, args.role), shape)
        measured = measure(engines, args.role, shapes, args.rounds)
    found = [profile(path, args.role, shapes, args.rounds, args.threads) for path in args.engine_dirs]
    if args.json:
        print(json.dumps(as_record(args, shapes, measured, found), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(steps_table(args, shapes, measured))
    for number, directory in enumerate(args.engine_dirs):
        console.print(operators_table(directory, shapes, found[number], measured[number]))
        for shape, operators in zip(shapes, found[number], strict=True):
            if args.nodes:
                console.print(nodes_table(directory, shape, operators, args.nodes))


def _shape(text: str) -> tuple[int, int]:
    rows, _, num_tokens = text.partition("x")
    if not (rows.isdecimal() and num_tokens.isdecimal() and int(rows) and int(num_tokens)):
        raise argparse.ArgumentTypeError(f"{text}: expected rows x tokens, such as 4x16")
    return int(rows), int(num_tokens)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number above 0")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dirs", type=Path, nargs="+", metavar="ENGINE_DIR")
    parser.add_argument("--role", choices=("target", "draft", "inner_draft"), default="target")
    shapes = [(1, 1), (1, 16), (1, 64), (4, 16)]
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="ROWSxTOKENS", default=shapes)
    parser.add_argument("--cached", type=_count, nargs="+", metavar="N", default=[128], help="tokens in each slot")
    parser.add_argument("--rounds", type=_count, default=10)
    parser.add_argument("--threads", type=_count)
    parser.add_argument("--nodes", type=_count, default=0, metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        run(args)
    except FlyError as error:
        print(f"step_profile: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
