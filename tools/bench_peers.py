"""Compares fly-trt with other programs that run a draft/target pair on a CPU, in one interleaved run.

usage: tools/bench_peers.py --target CKPT --draft CKPT --engine DIR [--peers ...] [--modes ...] [--precisions ...]
                            [--prompts FILE.jsonl] [--chat] [--num-prompts 24] [--rounds 3] [--max-tokens 160]
                            [--one-at-a-time] [--json]
       tools/bench_peers.py ... --prompt-tokens 100,1000,3000,6000 [--in-flight 1,4] [--one-at-a-time]

The checkpoints are folders, and the engine is what fly-build made of them. The peers are Hugging Face transformers,
OpenVINO GenAI and ONNX Runtime GenAI. Each gets an environment of its own, and the checkpoints in its own format, made
the first time (some GB and some minutes). Every mode of a peer in every precision is a process that loads its models
once; the modes take turns prompt by prompt, so that a machine that slows down slows all of them. All decode greedily,
one prompt at a time, with the same threads, and are timed from the prompt's text to the answer's text. tokens/s are
new tokens by seconds over all prompts, medians (lowest to highest) over the rounds.

--one-at-a-time loads each mode for its turn of a whole round, where memory holds only one; the rounds of the modes then
take turns, and their prompts do not. --prompt-tokens compares how long prompts of so many tokens take to read, until
each of those in flight has its first token, and a token of each after it; all modes but `plain` are left out.
transformers and ONNX Runtime GenAI have several prompts as one batch of equal lengths, which is the best case for
them; fly-trt and OpenVINO GenAI batch in flight.

Modes: `plain` decodes token by token; `speculative` drafts with the draft model and changes nothing but the speed, for
fly-trt its exact speculation; `speculative-default` is that with transformers' own schedule of draft lengths;
`prompt-lookup` drafts by n-grams, with exact verification; `fly` is FLy.

    tools/bench_peers.py --target T --draft D --engine E --precisions float32 int8 int4 --num-prompts 12
    tools/bench_peers.py --target T --draft D --engine E --prompts chat.jsonl --chat --modes plain prompt-lookup
    tools/bench_peers.py --target T --draft D --engine E --prompt-tokens 100,1000,3000,6000 --one-at-a-time --rounds 2
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tokenizers import Tokenizer
from tqdm import tqdm

from fly_trt import FlyError
from fly_trt.benchmark.machine_limits import cpu_info, matrix_instructions
from fly_trt.benchmark.workload import BenchmarkPrompt, read_prompts
from fly_trt.engines.cores import available_cores
from fly_trt.manifest import read_manifest
from fly_trt.text.chat import ChatTemplate
from peers.catalogue import FLY, PEERS
from peers.contest import Conditions, Contestant, Question, Run

ROOT = Path(__file__).resolve().parents[1]
TOKENS_AFTER_PROMPT = 17  # the first one, and those whose times count
APART = 50  # tokens by which the texts of two prompts are moved


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


def _completions(args: argparse.Namespace, prompts: list[BenchmarkPrompt]) -> list[Question]:
    if not args.chat:
        return [str(prompt.prompt) for prompt in prompts]
    template = ChatTemplate(args.target)
    return [template.render(prompt.as_messages()) for prompt in prompts]


def _readings(args: argparse.Namespace) -> list[Question]:
    """Of every length one for each number in flight. No prompt begins as another one does."""
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    ids = tokenizer.encode("\n\n".join(topics.values()), add_special_tokens=False).ids
    needed = max(args.prompt_tokens) + APART * max(args.in_flight)
    ids = list(itertools.islice(itertools.cycle(ids), needed))
    return [
        [ids[APART * row : APART * row + length] for row in range(count)]
        for count in args.in_flight
        for length in args.prompt_tokens
    ]


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    name = cpu_info().get("model name", "unknown CPU")
    return {"cpu": name, "instructions": matrix_instructions(), "cores": os.cpu_count(), "threads": args.threads}


def _caption(args: argparse.Namespace) -> str:
    machine = _machine(args)
    text = (
        f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instructions']) or 'no matrix instructions'}"
    )
    turns = "one loaded at a time: whole rounds took turns, prompts did not" if args.one_at_a_time else "by turns"
    return f"{text}; {turns}"


def _reading_tables(args: argparse.Namespace, contestants: list[Contestant]) -> list[Table]:
    """One for each number in flight."""
    tables = []
    for count in args.in_flight:
        title = f"{args.target.name}: {count} prompt{'s' * (count > 1)} in flight, s until each has its first token"
        title += f" (tokens/s), ms of a token after it; {args.threads} threads, median of {args.rounds} rounds"
        table = Table(title=title, caption=_caption(args))
        for column in ("peer", "precision"):
            table.add_column(column)
        for length in args.prompt_tokens:
            table.add_column(f"{length:,} tokens", justify="right")
            table.add_column("ms", justify="right")
        for contestant in contestants:
            own = [each for each in contestant.readings() if each["num_requests"] == count]
            cells = []
            for each in own:
                cells += [
                    f"{each['seconds']:.2f} ({each['tokens_per_second']:.0f})",
                    f"{1e3 * each['token_seconds']:.1f}",
                ]
            if own:
                table.add_row(contestant.peer.name, contestant.precision, *cells)
        tables.append(table)
    return tables


def _table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Table:
    title = f"{args.target.name}, {args.num_prompts} prompts, {args.threads} threads, median of {args.rounds} rounds"
    table = Table(title=title, caption=_caption(args))
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


def _print(args: argparse.Namespace, tables: list[Table], rows: list[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(*tables, sep="\n")
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
    parser.add_argument("--chat", action="store_true", help="put the prompts into the target's chat template")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=_counts, metavar="N,N", help="read prompts of these lengths instead")
    parser.add_argument("--in-flight", type=_counts, metavar="N,N", default=[1, 4], help="with --prompt-tokens")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
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
    if args.prompt_tokens:
        args.modes, args.max_tokens, args.num_requests = ["plain"], TOKENS_AFTER_PROMPT, max(args.in_flight)
    else:
        args.num_requests = 1
    return args


def _counts(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers above 0 with commas, such as 100,1000")
    return [int(count) for count in counts]


def main() -> None:
    args = _parse()
    try:
        prompts = read_prompts(args.prompts)[: args.num_prompts]
        questions = _readings(args) if args.prompt_tokens else _completions(args, prompts)
        contestants = _contestants(args)
    except FlyError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        sys.exit(2)
    args.num_prompts = len(prompts)
    conditions = Conditions(**{each.name: getattr(args, each.name) for each in dataclasses.fields(Conditions)})
    run = Run(conditions, questions, args.environments, lambda line: tqdm.write(line, file=sys.stderr))
    try:
        (run.one_at_a_time if args.one_at_a_time else run.side_by_side)(contestants)
    except KeyboardInterrupt:
        sys.exit(130)
    if args.prompt_tokens:
        rows = [contestant.record() | {"readings": contestant.readings()} for contestant in contestants]
        tables = _reading_tables(args, contestants)
    else:
        fly = next((c for c in contestants if c.mode == "fly" and c.reason is None), None)
        rows = [contestant.summary([prompt.check for prompt in prompts], fly) for contestant in contestants]
        tables = [_table(args, rows)]
    if args.json:
        print(json.dumps({"machine": _machine(args), "one_at_a_time": args.one_at_a_time, "results": rows}, indent=2))
    else:
        _print(args, tables, rows)


if __name__ == "__main__":
    main()
