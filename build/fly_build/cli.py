"""`fly-build`: parses flags, shows progress, prints the summary; recipe.py and pipeline.py do the rest."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fly_build.backends import BACKENDS, backend_names
from fly_build.schema import SpeculativeMode, TensorRTLlmRelease
from fly_trt.cli import options
from fly_trt.cli.command import command
from fly_trt.errors import FlyError
from fly_trt.manifest import Device, Dtype, Manifest, ModelEngine, Quantization, TensorRTLibrary

DEFAULT_DTYPES = ", ".join(f"{name} on {device}: {b.default_dtype}" for (name, device), b in BACKENDS.items())
EXAMPLES = """
\b
Examples:
  fly-build --target org/target --draft org/draft -o engines/pair
  fly-build llama-3.1-70b --dry-run                        # on four GPUs
  fly-build demo --quantization int8 -o engines/pair-int8
  fly-build demo --device cuda --quantization int4 -o engines/demo-cuda
  fly-build demo --backend tensorrt --dtype float16 -o engines/demo-gpu
  fly-build --target ./checkpoint -o engines/single        # n-gram or plain decoding
  fly-build --target org/target --draft org/draft --inner-draft org/small -o engines/chain
  fly-build --target ./checkpoint --self-draft --contexts 512,4096 -o engines/self
  fly-build --target org/target --draft org/draft --backend tensorrt-llm --tp-size 8
  fly-build --target org/target --draft org/draft --backend tensorrt-llm --engine --plugin-library libfly_plugins.so
  fly-build demo --dry-run
"""


def _numbers(context: click.Context, option: click.Parameter, value: str | None) -> list[int] | None:
    try:
        return None if value is None else [int(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected numbers of tokens such as 512,4096") from None


@command("fly-build", epilog=EXAMPLES, when_interrupted="interrupted, nothing was written")
@click.argument("recipe", required=False)
@click.option("--target", metavar="CKPT", help="Target checkpoint: a folder or a hub id.")
@click.option("--target-revision", metavar="REV", help="Hub revision of the target.")
@click.option("--draft", metavar="CKPT", help="Draft checkpoint. Without one: n-gram or plain decoding.")
@click.option("--draft-revision", metavar="REV", help="Hub revision of the draft.")
@click.option("--inner-draft", metavar="CKPT", help="A smaller draft, which guesses for the draft.")
@click.option("--inner-draft-revision", metavar="REV", help="Hub revision of the inner draft.")
@click.option("--self-draft", is_flag=True, help="A draft of some of the target's own layers, with its weights.")
@click.option(
    "--calibrate", metavar="FILE", help="Of a self-draft or a chain: text, or JSON Lines of prompts. [built in]"
)
@click.option("--contexts", metavar="N,N", callback=_numbers, help="Of a self-draft: tokens to choose one for. [512]")
@click.option("--backend", type=click.Choice(backend_names()), help="[onnxruntime]")
@click.option("--device", type=click.Choice(get_args(Device)), help="What the engines run on. [cpu; cuda for tensorrt]")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), help=f"Type of the weights. [{DEFAULT_DTYPES}]")
@click.option("--quantization", type=click.Choice(get_args(Quantization)), help="Of linear layers. [the checkpoint's]")
@options.max_batch_size("8")
@click.option(
    "--max-seq-len", type=int, metavar="N", help="Prompt and output tokens. [what both support, at most 8192]"
)
@click.option("--max-draft-len", type=int, metavar="N", help="Draft tokens per step. [32]")
@click.option("--max-num-tokens", type=int, metavar="N", help="Tokens per step, so the prefill chunk. [512]")
@click.option("--entropy-top-k", type=int, metavar="K", help="Probabilities that the entropy gate looks at. [3]")
@click.option(
    "--tensorrt-library",
    type=click.Choice(get_args(TensorRTLibrary)),
    help="tensorrt for H100 and its kind, tensorrt_rtx for RTX cards. [what is installed]",
)
@click.option("--engine", is_flag=True, help="Of tensorrt-llm: engines of its releases 1.2.x. [its PyTorch backend]")
@click.option(
    "--tensorrt-llm-release",
    type=click.Choice(get_args(TensorRTLlmRelease)),
    help="Of tensorrt-llm: the release that serves. [the installed one, or the newest]",
)
@click.option(
    "--speculative-mode", type=click.Choice(get_args(SpeculativeMode)), help="Of tensorrt-llm. [draft_target]"
)
@click.option("--plugin-library", metavar="FILE", help="libfly_plugins.so for the head. [the graph's own functions]")
@click.option(
    "--cpu-kernels",
    metavar="auto|off|FILE",
    help="Of onnxruntime: own kernels, compiled here where a C++ compiler is found. [auto]",
)
@click.option(
    "--timing-cache", metavar="FILE", help="Of tensorrt: kernel timings kept between builds. [in ~/.cache/fly-trt]"
)
@options.output("Engine directory. [engines/NAME]")
@options.overwrite("an engine directory that exists")
@click.option("--tp-size", type=int, metavar="N", help="Of tensorrt: GPUs that the target is spread over. [1]")
@click.option("--draft-tp-size", type=int, metavar="N", help="GPUs of the draft: 1, or all of the target's. [1]")
@options.dry_run("Print the plan with sizes and build nothing.")
@options.as_json("Print the manifest (or plan) as JSON on stdout.")
def main(recipe: str | None, output: Path | None, overwrite: bool, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Compiles a target and a draft checkpoint into an engine directory.

    RECIPE is a YAML file or the name of one in engines/recipes; flags override its fields.
    """
    with _collected_messages() as messages:
        _run(recipe, output, overwrite, dry_run, as_json, flags)
        for message in messages:
            click.echo(message, err=True)


def _run(
    recipe_name: str | None, output: Path | None, overwrite: bool, dry_run: bool, as_json: bool, flags: dict[str, Any]
) -> None:
    from fly_build.recipe import load_recipe

    recipe = load_recipe(recipe_name, flags)
    name = recipe.name or Path(recipe.target.checkpoint).name
    try:
        from fly_build import pipeline
    except ImportError as error:
        raise FlyError(f"{error.name or error} is not installed: pip install 'fly-trt[build]'") from None

    console = Console(stderr=True)
    started = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def report(step: str, fraction: float) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=1.0)
            progress.update(tasks[step], completed=fraction)

        report("configurations", 0.0)
        plan = pipeline.make_plan(
            recipe,
            output or Path("engines") / name,
            overwrite=overwrite or dry_run,
            to_build=not dry_run,
            report=report,
        )
        report("configurations", 1.0)
        manifest = None if dry_run else pipeline.build(plan, report)
    if manifest is None:
        _print_plan(plan, as_json)
        return
    if as_json:
        click.echo(manifest.model_dump_json(indent=2))
        return
    Console().print(_summary(manifest))
    for draft in manifest.self_drafts:
        click.echo(
            f"self-draft from {draft.min_tokens} tokens: {len(draft.kept_attentions)} attentions and "
            f"{len(draft.kept_mlps)} MLPs of {manifest.target.num_layers} layers, agrees in {draft.agreement:.1%} of "
            f"tokens, expected {draft.tokens_per_step_time:.2f} of plain decoding's speed"
        )
    if (chain := manifest.chain) is not None:
        click.echo(
            f"inner draft: the draft agrees with the target in {chain.draft_acceptance:.1%} of tokens, the inner draft "
            f"with the draft in {chain.inner_draft_acceptance:.1%}; expected {chain.tokens_per_step_time:.2f} of plain "
            f"decoding's speed with {chain.num_tokens} tokens a guess, and {chain.tokens_per_step_time_without:.2f} "
            f"without: method {manifest.speculative['method']}"
        )
    click.echo(f"{plan.output} is ready after {time.perf_counter() - started:.1f} s")


@contextlib.contextmanager
def _collected_messages() -> Iterator[list[str]]:
    """What the build warns of and notes while the block runs, to be printed after the summary, where it is seen."""
    messages: list[str] = []
    handler = logging.Handler(logging.INFO)

    def emit(record: logging.LogRecord) -> None:
        kind = "note" if record.levelno < logging.WARNING else "warning"
        if (message := f"{kind}: {record.getMessage()}") not in messages:  # target and draft may both cause it
            messages.append(message)

    handler.emit = emit  # type: ignore[method-assign]
    logger = logging.getLogger("fly_build")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _print_plan(plan: Any, as_json: bool) -> None:
    if as_json:
        models = [
            {
                **model.engine.model_dump(),
                "weight_bytes": model.weight_bytes(),
                "kv_bytes_per_slot": model.engine.kv_bytes_per_token() * plan.cache_tokens,
            }
            for model in plan.models
        ]
        gpus = [{**dataclasses.asdict(gpu.memory), **gpu.summary()} for gpu in plan.gpus]
        record = {"output": str(plan.output), **plan.limits.model_dump(), "models": models, "gpus": gpus}
        record["commands"] = plan.commands
        click.echo(json.dumps(record, indent=2))
        return
    limits = plan.limits
    is_sharded = any(model.sharding is not None for model in plan.models)
    each = ", weights and KV of each GPU" if is_sharded else ""
    table = Table(title=f"{plan.output}: plan (nothing is built){each}")
    for column in ("", "checkpoint", "params", "weights", "KV/token", "KV/slot", "KV total"):
        table.add_column(column, justify="left" if column in ("", "checkpoint") else "right")
    for model in plan.models:
        per_token = model.engine.kv_bytes_per_token()
        table.add_row(
            model.folder,
            Path(model.checkpoint.name).name,
            _count(model.engine.source.num_parameters),
            _bytes(model.weight_bytes()),
            _bytes(per_token),
            _bytes(per_token * plan.cache_tokens),
            _bytes(per_token * plan.cache_tokens * limits.max_batch_size),
        )
    Console().print(table)
    if plan.gpus:
        _print_gpus(plan)
    click.echo(
        f"backend {plan.recipe.backend} on {plan.recipe.device}, {plan.backend.dtype}, "
        f"quantization {_of_models(plan, lambda engine: engine.quantization)}, "
        f"KV cache {_of_models(plan, _cache_type)}, max_batch_size {limits.max_batch_size} (slots), "
        f"max_seq_len {limits.max_seq_len}, max_draft_len {limits.max_draft_len}, "
        f"stop tokens {plan.head.stop_token_ids}"
    )
    for command_line in plan.commands:
        click.echo(f"  {command_line}")
    if (settings := plan.recipe.self_draft) is not None:
        from fly_build.self_draft import contexts_of

        contexts = ", ".join(map(str, contexts_of(settings, limits)))
        click.echo(
            f"self-draft at contexts of {contexts} tokens, calibrated on {settings.calibrate or 'the built-in text'}: "
            "blocks of the target, without weights of their own; KV cache at most the target's"
        )


def _cache_type(engine: ModelEngine) -> str:
    return engine.kv_cache_dtype if engine.kv_cache_quantization == "none" else engine.kv_cache_quantization


def _of_models(plan: Any, what: Callable[[ModelEngine], str]) -> str:
    """That of all models, or of each: a checkpoint that is quantised already keeps its quantization."""
    found = {model.folder: what(model.engine) for model in plan.models}
    first, *others = set(found.values())
    return ", ".join(f"{folder} {name}" for folder, name in found.items()) if others else str(first)


def _print_gpus(plan: Any) -> None:
    table = Table(title="memory of each GPU, of an 80 GB card")
    for column in ("GPU", "weights", "KV", "logits", "scratch, about", "all", "fits", "slots at most"):
        table.add_column(column, justify="right")
    for gpu in plan.gpus:
        memory = gpu.memory
        parts = (memory.weights, memory.cache, memory.logits, memory.scratch, memory.total)
        sizes = (f"{size / 1e9:.2f} GB" for size in parts)
        table.add_row(str(memory.rank), *sizes, "yes" if memory.fits else "no", str(gpu.most_slots))
    Console().print(table)


def _summary(manifest: Manifest) -> Table:
    table = Table(title=f"{manifest.name} ({manifest.backend} on {manifest.device})")
    for column in ("", "architecture", "parameters", "dtype", "quantization", "on disk"):
        table.add_column(column, justify="right" if column in ("parameters", "on disk") else "left")
    for role, engine in _models(manifest):
        if engine is not None:
            size = sum(file.size for name, file in manifest.files.items() if name.startswith(f"{role}/"))
            source = engine.source
            table.add_row(
                role,
                source.architecture,
                _count(source.num_parameters),
                engine.dtype,
                engine.quantization,
                _bytes(size),
            )
    return table


def _models(manifest: Manifest) -> list[tuple[str, ModelEngine | None]]:
    return [("target", manifest.target), ("draft", manifest.draft), ("inner_draft", manifest.inner_draft)]


def _count(number: int) -> str:
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number} B"


if __name__ == "__main__":
    main()
