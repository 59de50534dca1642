"""Compares fly-trt with other programs that run a draft/target pair on a CPU, in one interleaved run.

usage: tools/bench_peers.py --target CKPT --draft CKPT --engine DIR [--peers ...] [--modes ...] [--precisions ...]
                            [--num-prompts 24] [--rounds 3] [--max-tokens 160] [--one-at-a-time] [--json]

The checkpoints are folders, and the engine is what fly-build made of them. The peers are Hugging Face transformers,
OpenVINO GenAI and ONNX Runtime GenAI. Each gets an environment of its own, and the checkpoints in its own format, made
the first time (some GB and some minutes). Every mode of a peer in every precision is a process that loads its models
once; the modes take turns prompt by prompt, so that a machine that slows down slows all of them. All decode greedily,
one prompt at a time, with the same threads, and are timed from the prompt's text to the answer's text. tokens/s are
new tokens by seconds over all prompts, medians (lowest to highest) over the rounds.

Modes: `plain` decodes token by token; `speculative` drafts with the draft model and changes nothing but the speed, for
fly-trt its exact speculation; `speculative-default` is that with transformers' own schedule of draft lengths;
`prompt-lookup` drafts by n-grams; `fly` is FLy.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from fly_trt import FlyError
from fly_trt.benchmark.workload import read_prompts
from fly_trt.manifest import read_manifest
from peers.catalogue import FLY, PEERS
from peers.contest import Conditions, Contestant, Run

ROOT = Path(__file__).resolve().parents[1]


def _contestants(args: argparse.Namespace) -> list[Contestant]:
    engine = read_manifest(args.engine).target
    fly_precision = engine.dtype if engine.quantization == "none" else engine.quantization
    contestants = []
    for name in args.peers:
        peer = PEERS[name]
        # The engine's precision is what it was built with, so no filter applies to it.
        precisions = [fly_precision] if name == FLY else [p for p in peer.forms if p in args.precisions]
        contestants += [Contestant(peer, m, p) for p in precisions for m in peer.modes if m in args.modes]
    return contestants


def _table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Table:
    title = f"{args.target.name}, {args.num_prompts} prompts, {args.threads} threads, median of {args.rounds} rounds"
    table = Table(title=title)
    for column in ("peer", "mode", "precision"):
        table.add_column(column)
    for column in ("tokens/s", "to FLy", "right answers", "new tokens", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["reason"] is None:
            low, high = row["tokens_per_second_range"]
            table.add_row(
                row["peer"],
                row["mode"],
                row["precision"],
                f"{row['tokens_per_second']:.1f} ({low:.1f} to {high:.1f})",
                f"{row['ratio_to_fly']:.2f}x" if "ratio_to_fly" in row else "-",
                f"{row['num_right']} of {row['num_checked']}" if row["num_checked"] else "-",
                str(row["num_output_tokens"]),
                str(row["peak_memory_mib"]),
            )
    return table


def _print(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(_table(args, rows))
    for row in rows:
        name = f"{row['peer']} {row['mode']} {row['precision']}"
        if row["reason"] is not None:
            console.print(f"did not run: {escape(name)}: {escape(row['reason'])}", soft_wrap=True)
        elif row.get("num_prompts_read_differently"):
            console.print(f"{name}: {row['num_prompts_read_differently']} prompts became other tokens than fly-trt's")
    versions = {row["peer"]: row["versions"] for row in rows if row.get("versions")}
    of_peers = (", ".join(f"{name} {version}" for name, version in used.items()) for used in versions.values())
    console.print("; ".join(of_peers), soft_wrap=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = list(dict.fromkeys(mode for peer in PEERS.values() for mode in peer.modes))
    precisions = list(dict.fromkeys(precision for peer in PEERS.values() for precision in peer.forms))
    for name in ("target", "draft"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="CKPT")
    parser.add_argument("--engine", type=Path, required=True, metavar="DIR")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=precisions, help="of the peers")
    prompts = ROOT / "tests" / "assets" / "pair" / "eval.jsonl"
    parser.add_argument("--prompts", type=Path, default=prompts, metavar="FILE.jsonl", help="`prompt`, maybe `check`")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--num-assistant-tokens", type=int, default=15, help="draft tokens per round, at most")
    parser.add_argument("--one-at-a-time", action="store_true", help="load each mode for its turn: little memory")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for loading, and for an answer")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers", metavar="DIR", help="made here and kept")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in ("num_prompts", "max_tokens", "rounds", "threads", "num_assistant_tokens", "timeout"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected more than 0")
    for path in (args.target, args.draft):
        if not (path / "config.json").is_file():
            parser.error(f"{path}: has no config.json: expected the folder of a checkpoint")
    args.target, args.draft = args.target.resolve(), args.draft.resolve()
    return args


def main() -> None:
    args = _parse()
    try:
        prompts = read_prompts(args.prompts)[: args.num_prompts]
        contestants = _contestants(args)
    except FlyError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        sys.exit(2)
    args.num_prompts = len(prompts)
    conditions = Conditions(**{each.name: getattr(args, each.name) for each in dataclasses.fields(Conditions)})
    texts = [str(prompt.prompt) for prompt in prompts]
    run = Run(conditions, texts, args.environments, lambda line: tqdm.write(line, file=sys.stderr))
    try:
        (run.one_at_a_time if args.one_at_a_time else run.side_by_side)(contestants)
    except KeyboardInterrupt:
        sys.exit(130)
    fly = next((c for c in contestants if c.mode == "fly" and c.reason is None), None)
    rows = [contestant.summary([prompt.check for prompt in prompts], fly) for contestant in contestants]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print(args, rows)


if __name__ == "__main__":
    main()
