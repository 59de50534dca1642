"""`fly-tune`: finds the fastest setting of an engine directory that keeps the target's quality on a user's prompts."""

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fly_trt.cli import options
from fly_trt.cli.command import command
from fly_trt.drafting import DRAFTERS
from fly_trt.files import new_file
from fly_trt.params import DEFAULT_MAX_TOKENS
from fly_trt.verification import POLICIES

FILE = click.Path(path_type=Path, dir_okay=False)
CONFIG_FLAGS = (
    *("prompts", "chat", "max_tokens", "concurrency", "min_retention", "confidence", "judge"),
    *("score_command", "score_timeout", "methods", "acceptances", "num_candidates", "num_finalists", "budget", "seed"),
    *("num_threads", "devices"),
)
FILE_WIDTH = 132  # columns where there is no terminal that has its own
EXAMPLES = """
\b
Examples:
  fly-tune engines/demo --prompts tests/assets/pair/eval.jsonl
  fly-tune engines/demo --prompts prompts.jsonl --budget 120 --html report.html
  fly-tune engines/llama-70b --prompts chats.jsonl --chat --concurrency 8 --write
  fly-tune engines/demo --prompts prompts.jsonl --acceptance exact            # lossless settings alone
  fly-tune engines/demo --prompts prompts.jsonl --score-command 'python score.py' --min-retention 0.95

\b
A line of the prompts file: {"prompt": "The capital of France?", "check": {"kind": "contains", "value": "Paris"}}
Without checks {"prompt": ..., "reference": "Paris"}; without both, answers are compared with the target's own.

\b
A quarter of the prompts chooses, the others judge. A loose setting is only claimed to keep 99 % where about 300 prompts
judge; with fewer the fastest lossless setting is found, and said how many prompts would do.
Everything that is measured goes into a file (--state): a run that was stopped goes on with the same command.
"""


@command(
    "fly-tune",
    epilog=EXAMPLES,
    when_interrupted="interrupted, what was measured is kept: the same command goes on",
    streams=True,
)
@options.ENGINE_DIR
@click.option("--prompts", type=FILE, required=True, metavar="FILE", help="JSON Lines, a prompt on each.")
@options.chat("A prompt")
@options.max_tokens(DEFAULT_MAX_TOKENS, "Tokens of an answer at most.")
@click.option("--concurrency", type=int, default=1, show_default=True, help="Requests in flight.")
@click.option(
    "--min-retention", type=float, default=0.99, show_default=True, help="Share of the target's quality to keep."
)
@click.option("--confidence", type=float, default=0.95, show_default=True, help="With which that is claimed.")
@click.option("--judge", metavar="KIND", help="checks, references or agreement. [the first that the file is fit for]")
@click.option("--score-command", metavar="COMMAND", help="Scores answers from 0 to 1, see the README.")
@click.option(
    "--score-timeout",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Of it, for a batch.",
)
@click.option(
    "--method",
    "methods",
    type=options.ListOf(str),
    default=[],
    metavar="NAME,NAME",
    help=f"Drafters to try: {', '.join(DRAFTERS)}. [all]",
)
@click.option(
    "--acceptance",
    "acceptances",
    type=options.ListOf(str),
    default=[],
    metavar="NAME,NAME",
    help=f"Policies to try: {', '.join(POLICIES)}. [all]",
)
@click.option("--candidates", "num_candidates", type=int, default=40, show_default=True, help="Settings to try.")
@click.option(
    "--finalists",
    "num_finalists",
    type=int,
    default=3,
    show_default=True,
    help="Of them to judge; each loose one more costs confidence.",
)
@click.option("--budget", type=float, default=30.0, show_default=True, metavar="MINUTES", help="Time for all of it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of prompts and of what is tried.")
@click.option("--state", type=FILE, metavar="FILE", help="What was measured. [fly-tune-ENGINE.jsonl]")
@options.num_threads()
@options.devices()
@click.option("--write", is_flag=True, help="Make the setting that is found the engine's default, with the evidence.")
@click.option("--html", type=FILE, metavar="FILE", help="Write a report as a page.")
@options.output("Write the JSON to a file too.", metavar="FILE")
@options.as_json("Print one JSON object instead of the table.")
def main(engine_dir: Path, **flags: Any) -> None:
    """Finds the fastest setting of the engines in ENGINE_DIR that keeps the target's quality on the prompts of a file,
    and says what is claimed of it."""
    _run(engine_dir, flags)


def _run(engine_dir: Path, flags: dict[str, Any]) -> None:
    from fly_trt.tuning.page import write_page
    from fly_trt.tuning.tune import TuningConfig, run_tuning

    state = flags["state"] or Path(f"fly-tune-{engine_dir.resolve().name}.jsonl")
    config = TuningConfig(state=state, **{name: flags[name] for name in CONFIG_FLAGS})
    if state.exists():
        what = "goes on with what was measured, or shows a finished run"
        click.echo(f"{state}: {what}; with another --state all is measured anew", err=True)
    result = _with_progress(lambda report: run_tuning(engine_dir, config, report))
    _show(result, flags["as_json"])  # at once: a file that cannot be written must not cost the result
    if flags["output"] is not None:
        with new_file(flags["output"]) as file:
            file.write_text(result.to_json(), encoding="utf-8")
    if flags["html"] is not None:
        write_page(result, flags["html"])
    if flags["write"]:
        _write_setting(engine_dir, result)


def _with_progress(run: Any) -> Any:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("loading engines", total=None, left="")

        def report(told: Any) -> None:
            left = "" if told.seconds_left is None else f"{max(0, told.seconds_left) / 60:.1f} min left"
            what = f"{told.what}, {told.num_candidates} candidates"
            progress.update(task, description=what, completed=told.done, total=told.total, left=left)

        return run(report)


def _show(result: Any, as_json: bool) -> None:
    from fly_trt.tuning.report import as_table

    if as_json:
        click.echo(result.to_json(), nl=False)
        return
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(as_table(result))
    for sentence in ("", *result.verdict.sentences):
        console.print(sentence, markup=False, highlight=False)


def _write_setting(engine_dir: Path, result: Any) -> None:
    from fly_trt.tuning.written import write_setting

    if not write_setting(engine_dir, result):
        click.echo("nothing was written: no setting qualified that is faster than plain decoding", err=True)
        raise SystemExit(1)
    if result.verdict.kind == "default_stays":
        click.echo(f"{engine_dir}: the default stays, with this evidence for it", err=True)
    else:
        click.echo(f"{engine_dir}: {result.chosen.candidate.name} is the default now", err=True)


if __name__ == "__main__":
    main()
