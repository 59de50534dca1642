"""`fly-triton`: writes a Triton model repository for an engine directory."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from fly_trt.cli import options
from fly_trt.cli.command import command
from fly_trt.errors import ConfigError
from fly_trt.service.config import DEFAULT_MAX_QUEUE_SIZE

SETTING_FLAGS = ("max_batch_size", "max_seq_len", "num_threads")
EXAMPLES = """
\b
Examples:
  fly-triton engines/demo -o model_repository
  fly-triton engines/qwen3-8b -o model_repository --gpus 0,1,2,3      # an instance on each
  fly-triton engines/demo -o model_repository --copy-engines          # to take it to another machine
  fly-triton engines/demo -o model_repository --name exact --acceptance exact
  fly-triton engines/demo -o model_repository --audit-fraction 0.05 --breaker-reset-seconds 3600
  tritonserver --model-repository model_repository
"""


@command("fly-triton", epilog=EXAMPLES, when_interrupted="interrupted, nothing was written")
@options.ENGINE_DIR
@options.output("Model repository to write to.", required=True)
@click.option("--name", default="fly", show_default=True, help="The model's name for clients.")
@click.option("--instances", type=int, default=1, show_default=True, help="Processes, each with its own engines.")
@click.option("--gpus", metavar="ID,ID", help="For engines of a GPU: instances on each of these, or over them. [all]")
@click.option("--copy-engines", is_flag=True, help="Copy the engines into the repository, so that it can be moved.")
@options.overwrite("a model of that name")
@click.option(
    "--max-queue-size", type=int, default=DEFAULT_MAX_QUEUE_SIZE, show_default=True, help="Requests that may wait."
)
@click.option("--queue-timeout", type=float, metavar="SECONDS", help="Wait for a slot at most; 0 is forever. [60]")
@click.option(
    "--exclude-input-in-output/--include-input-in-output",
    default=True,
    help="Whether text_output is without the prompt, for requests that do not say. [without]",
)
@options.max_batch_size("as built")
@click.option("--max-seq-len", type=int, metavar="N", help="Tokens of prompt and output. [as built]")
@options.num_threads("CPU threads of an instance. [its share of the physical cores]")
@options.speculative_options
@options.audit_options
@options.dry_run("Print config.pbtxt and write nothing.")
@options.as_json("Print one JSON object instead of the summary.")
def main(engine_dir: Path, output: Path, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Writes a Triton model repository that serves the engines in ENGINE_DIR."""
    _run(engine_dir, output, dry_run, as_json, flags)


def _run(engine_dir: Path, repository: Path, dry_run: bool, as_json: bool, flags: dict[str, Any]) -> None:
    from fly_trt.serving.triton.repository import RepositoryPlan, make_plan, write_model

    timeout = {} if flags["queue_timeout"] is None else {"queue_timeout": flags["queue_timeout"]}
    plan: RepositoryPlan = make_plan(
        engine_dir,
        repository,
        name=flags["name"],
        instances=flags["instances"],
        gpus=_gpus(flags["gpus"]),
        copy_engines=flags["copy_engines"],
        overwrite=flags["overwrite"] or dry_run,
        exclude_input_in_output=flags["exclude_input_in_output"],
        max_queue_size=flags["max_queue_size"],
        speculative=options.speculative_overrides(flags),
        settings={name: flags[name] for name in SETTING_FLAGS if flags[name] is not None}
        | options.audit_settings(flags),
        **timeout,
    )
    if dry_run:
        click.echo(json.dumps({**plan.facts, "config": plan.config}) + "\n" if as_json else plan.config, nl=False)
        return
    console = Console(stderr=True)
    columns = (TextColumn("copying engines"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not (plan.copies_engines and console.is_terminal)) as progress:
        task = progress.add_task("")
        write_model(plan, lambda done, total: progress.update(task, completed=done, total=total))
    if as_json:
        click.echo(json.dumps({"model": plan.model_dir.name, "model_dir": str(plan.model_dir), **plan.facts}))
        return
    table = Table(title=str(plan.model_dir), show_header=False)
    for key, value in plan.facts.items():
        table.add_row(key, str(value))
    Console().print(table)
    click.echo(f"tritonserver --model-repository {plan.model_dir.parent}")


def _gpus(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"gpus {text!r}: expected ids with commas, such as 0,1") from None


if __name__ == "__main__":
    main()
