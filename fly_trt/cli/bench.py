"""`fly-bench`: measures what speculation does for an engine directory, and shows it."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fly_trt.benchmark.modes import modes
from fly_trt.cli import options
from fly_trt.cli.command import command
from fly_trt.drafting import DRAFTERS
from fly_trt.errors import ConfigError
from fly_trt.verification import POLICIES

CONFIG_FLAGS = (
    *("rounds", "prompts", "random_tokens", "num_prompts", "chat"),
    *("max_tokens", "ignore_eos", "temperature", "perplexity"),
)
NOT_WITH_ROOFLINE = ("request_rate", "perplexity", "plot", "traces", "devices")
Measured = tuple[dict[str, Any], Any, list[Any], Iterable[str]]  # the record, the tables, rows, lines of traces
FILE_WIDTH = 132  # columns where there is no terminal that has its own
EXAMPLES = (
    f"""
\b
A mode: [NAME=]DRAFTER[+POLICY][,SETTING=VALUE...], or a drafter or a policy alone. Several are separated by commas.
Drafters: {", ".join(DRAFTERS)}.
Policies: {", ".join(POLICIES)}.
Settings: fields of SpeculativeConfig; values as in JSON, or plain words.
"""
    + """
\b
Examples:
  fly-bench engines/demo                                            # the usual modes, one request at a time
  fly-bench engines/demo --prompts tests/assets/pair/eval.jsonl     # a prompt a line, with checks of the answers
  fly-bench engines/demo --modes autoregressive,fly --concurrency 1,4,8 --plot bench.png
  fly-bench engines/demo --mode exact --mode ngram+fly --mode w0=multi_level+fly,fly_window_size=0
  fly-bench engines/demo --modes exact,fly --traces traces.jsonl && fly-inspect traces.jsonl
  fly-bench engines/demo --request-rate 2,inf --json -o bench.json
  fly-bench engines/demo --roofline --rounds 10                     # how far it is from this machine's limits
  fly-bench engines/demo --roofline --cached-tokens 100,1000,3000 --num-prompts 0    # steps alone
  fly-bench engines/llama-70b --random-tokens 1024 --max-tokens 256 --ignore-eos
  fly-bench engines/llama-70b --chat --preset paper --num-speculative-tokens 25

\b
A line of a prompts file: {"prompt": "What is the capital of France?", "check": {"kind": "contains", "value": "Paris"}}
Kinds of checks: contains, regex (value: a text, a regular expression), number, json, words, code.

\b
TTFT is the time from sending a request to its first output. ITL is the gap between two consecutive outputs of a
request, of one token or several; TPOT the time from the first output to the last by token after the first.
Perplexity (ppl) is the target's, of what a mode emitted; its ratio is to autoregressive's, per token.
"""
)


@command("fly-bench", epilog=EXAMPLES, streams=True)
@options.ENGINE_DIR
@click.option(
    "--modes",
    "--mode",
    multiple=True,
    metavar="MODE,MODE",
    help=f"{', '.join(modes())}, or as below. [these, where the engines can]",
)
@click.option("--prompts", type=click.Path(path_type=Path), metavar="FILE", help="JSON Lines. [built-in prompts]")
@click.option("--random-tokens", type=int, metavar="LENGTH", help="Random prompts of so many tokens instead.")
@click.option("--num-prompts", type=int, default=16, show_default=True, help="More than there are repeat them.")
@options.chat("A prompt")
@options.max_tokens(128, "Output tokens of a request at most.")
@options.ignore_eos("Always --max-tokens: go on after the end-of-sequence token.")
@options.TEMPERATURE
@click.option("--seed", type=int, default=0, show_default=True, help="Of samples, random prompts and arrivals.")
@click.option("--concurrency", multiple=True, metavar="N,N", help="Requests in flight, a load for each value. [1]")
@click.option(
    "--request-rate", multiple=True, metavar="R,R", help="Requests per second, arriving at random; inf is all at once."
)
@click.option("--rounds", type=int, default=3, show_default=True, help="Repetitions; figures are medians over them.")
@click.option(
    "--perplexity/--no-perplexity",
    default=True,
    show_default=True,
    help="Read what was emitted once more, untimed, for its perplexity.",
)
@click.option(
    "--roofline",
    is_flag=True,
    help="Steps of the engines, and the modes, beside what memory bandwidth and arithmetic allow (extra bench). "
    "--num-prompts 0: no modes.",
)
@click.option("--cached-tokens", multiple=True, metavar="N,N", help="With --roofline: before each step. [128]")
@options.tuning_options
@options.num_threads()
@options.devices()
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw a .png or .svg (extra bench).")
@click.option(
    "--traces",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Complete each prompt once more by each mode, untimed, and write how each token came to be, for fly-inspect.",
)
@options.output("Write the JSON to a file too.", metavar="FILE")
@options.as_json("Print one JSON object instead of the table.")
def main(engine_dir: Path, plot: Path | None, output: Path | None, as_json: bool, **flags: Any) -> None:
    """Compares plain decoding, exact speculation, FLy and n-gram lookup with the engines in ENGINE_DIR, by turns in one
    run, on engines that are loaded once."""
    _run(engine_dir, plot, output, as_json, flags)


def _run(engine_dir: Path, plot: Path | None, output: Path | None, as_json: bool, flags: dict[str, Any]) -> None:
    from fly_trt.benchmark.plot import check_plot, write_plot
    from fly_trt.files import new_file

    _check_roofline_flags(click.get_current_context(), is_roofline=flags["roofline"])
    if plot is not None:
        check_plot(plot)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("reading prompts", total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        measure = _measure_roofline if flags["roofline"] else _measure_modes
        record, table, rows, lines = measure(engine_dir, flags, report)
    if flags["traces"] is not None:
        with new_file(flags["traces"]) as file:
            file.write_text("".join(lines), encoding="ascii")
    text = json.dumps(record, indent=2)
    if output is not None:
        with new_file(output) as file:
            file.write_text(text + "\n", encoding="utf-8")
    if as_json:
        click.echo(text)
    else:
        is_terminal = sys.stdout.isatty()
        Console(width=None if is_terminal else FILE_WIDTH).print(table)
    if plot is not None:
        write_plot(rows, str(engine_dir), plot)


def _check_roofline_flags(context: click.Context, *, is_roofline: bool) -> None:
    for name in NOT_WITH_ROOFLINE if is_roofline else ("cached_tokens",):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            effect = "has no effect with --roofline" if is_roofline else "has no effect without --roofline"
            raise ConfigError(f"{name}: {effect}: leave one of them out")


def _config(flags: dict[str, Any]) -> Any:
    from fly_trt.benchmark.measure import BenchmarkConfig

    return BenchmarkConfig(
        modes=flags["modes"],
        loads=_loads(flags),
        seed=flags["seed"],
        speculative=options.speculative_overrides(flags),
        num_threads=flags["num_threads"],
        devices=flags["devices"],
        traces=flags["traces"] is not None,
        **{name: flags[name] for name in CONFIG_FLAGS},
    )


def _measure_modes(engine_dir: Path, flags: dict[str, Any], report: Any) -> Measured:
    from fly_trt.benchmark.measure import run_benchmark
    from fly_trt.benchmark.report import as_record, as_table
    from fly_trt.benchmark.traces import trace_lines

    benchmark = run_benchmark(engine_dir, _config(flags), report)
    return as_record(benchmark), as_table(benchmark), benchmark.rows, trace_lines(benchmark)


def _measure_roofline(engine_dir: Path, flags: dict[str, Any], report: Any) -> Measured:
    from fly_trt.benchmark.roofline import run_roofline
    from fly_trt.benchmark.roofline_report import roofline_record, roofline_tables

    if flags["rounds"] < 1:
        raise ConfigError(f"rounds {flags['rounds']}: expected at least 1")
    config = _config(flags | {"perplexity": False}) if flags["num_prompts"] else None
    cached = [_number("cached_tokens", item, int) for item in _items(flags["cached_tokens"])]
    roofline = run_roofline(engine_dir, flags["rounds"], flags["num_threads"], report, cached=cached, config=config)
    return roofline_record(roofline), roofline_tables(roofline), [], ()


def _loads(flags: dict[str, Any]) -> list[Any]:
    from fly_trt.benchmark.client import Load

    in_flight = [Load(concurrency=_number("concurrency", item, int)) for item in _items(flags["concurrency"])]
    arriving = [Load(request_rate=_number("request_rate", item, float)) for item in _items(flags["request_rate"])]
    return in_flight + arriving or [Load(concurrency=1)]


def _items(values: Sequence[str]) -> list[str]:
    return [item.strip() for value in values for item in value.split(",")]


def _number(name: str, text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{name} {text!r}: expected numbers with commas, such as 1,4") from None


if __name__ == "__main__":
    main()
