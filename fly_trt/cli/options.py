"""Options that several commands have, and those that override an engine's SpeculativeConfig.

Where commands say a different thing of the same option, the words that differ are arguments.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from fly_trt.acceptance import acceptance_settings
from fly_trt.drafting import DRAFTERS
from fly_trt.params import SpeculativeConfig
from fly_trt.settings import Setting, settings_of

Option = Callable[[Callable[..., Any]], Callable[..., Any]]

ENGINE_DIR: Option = click.argument("engine_dir", type=click.Path(path_type=Path))
TEMPERATURE: Option = click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 decodes greedily."
)


def max_tokens(default: int, help: str) -> Option:
    return click.option("--max-tokens", type=int, default=default, show_default=True, help=help)


def ignore_eos(help: str) -> Option:
    return click.option("--ignore-eos", is_flag=True, help=help)


def chat(prompt: str) -> Option:
    return click.option("--chat", is_flag=True, help=f"{prompt} is a user's message: apply the model's chat template.")


def num_threads(help: str = "CPU threads. [the fast physical cores of a socket, within the quota]") -> Option:
    return click.option("--num-threads", type=int, metavar="N", help=help)


def devices() -> Option:
    text = "CUDA devices, one for each rank of the engine. [the first ones]"
    return click.option("--devices", type=ListOf(int), metavar="ID,ID", help=text)


def max_batch_size(default: str) -> Option:
    return click.option("--max-batch-size", type=int, metavar="N", help=f"Requests in flight. [{default}]")


def output(help: str, **settings: Any) -> Option:
    return click.option("-o", "--output", type=click.Path(path_type=Path), help=help, **settings)


def overwrite(what: str) -> Option:
    return click.option("--overwrite", is_flag=True, help=f"Replace {what}.")


def dry_run(help: str) -> Option:
    return click.option("--dry-run", is_flag=True, help=help)


def as_json(help: str) -> Option:
    return click.option("--json", "as_json", is_flag=True, help=help)


AUDITS = {
    "audit_fraction": click.option(
        "--audit-fraction", type=float, metavar="X", help="Of finished requests, those the target reads again. [0]"
    ),
    "audit_exact_fraction": click.option(
        "--audit-exact-fraction", type=float, metavar="X", help="Of these, those whose exact text is made too. [0.1]"
    ),
    "audit_share": click.option(
        "--audit-share", type=float, metavar="X", help="Of the engine's time while requests run, at most. [0.05]"
    ),
    "audit_log": click.option(
        "--audit-log", type=click.Path(dir_okay=False), help="A line of JSON for each audit goes to this file."
    ),
    "audit_log_max_bytes": click.option(
        "--audit-log-max-bytes", type=int, metavar="N", help="From which on a new file is begun. [10000000]"
    ),
    "audit_log_backups": click.option(
        "--audit-log-backups", type=int, metavar="N", help="Older files that are kept. [5]"
    ),
    "audit_log_text": click.option(
        "--audit-log-text", is_flag=True, default=None, help="Log prompts, answers and exact texts too."
    ),
    "min_quality": click.option(
        "--min-quality",
        type=float,
        metavar="X",
        help="A setting whose audits' mean quality is not above this is exact; 0 makes none so. [0.98]",
    ),
    "breaker_error_rate": click.option(
        "--breaker-error-rate", type=float, metavar="X", help="Chance of that for a good one, in 100,000 audits. [0.01]"
    ),
    "breaker_reset_seconds": click.option(
        "--breaker-reset-seconds", type=float, metavar="SECONDS", help="Try it again after this long. [never]"
    ),
}


def audit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags of audits and of the breaker to a command that serves."""
    for option in reversed(AUDITS.values()):
        command = option(command)
    return command


def audit_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What was given of them, as fields of ServiceConfig."""
    return {name: flags[name] for name in AUDITS if flags[name] is not None}


class ListOf(click.ParamType[Any]):
    """Items with commas between them; nothing at all is an empty list."""

    def __init__(self, kind: type) -> None:
        self.name = "list"
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return [self._kind(item) for item in value.split(",") if item]
        except ValueError:
            self.fail(f"{value!r}: expected whole numbers with commas between them", param, context)


def setting_option(name: str, declared: Setting) -> Option:
    """The flag of a setting that is declared in Python."""
    kind: Any = declared.kind if declared.choices is None else click.Choice(list(declared.choices))
    if declared.is_list:
        kind = ListOf(declared.kind)
    return click.option(f"--{name.replace('_', '-')}", type=kind, metavar=declared.metavar, help=declared.help)


SETTINGS = acceptance_settings() | settings_of(SpeculativeConfig)
SPECULATIVE = {
    "method": click.option("--method", type=click.Choice([*DRAFTERS, "none"]), help="How drafts are made. [as built]"),
    "num_speculative_tokens": click.option(
        "--num-speculative-tokens", type=int, metavar="K", help="Draft tokens per step, at most. [as built]"
    ),
} | {name: setting_option(name, declared) for name, declared in SETTINGS.items()}


# What is left to say where a command chooses method and acceptance itself.
TUNING = tuple(name for name in SPECULATIVE if name not in ("method", "acceptance"))


def speculative_options(command: Callable[..., Any], names: Iterable[str] = tuple(SPECULATIVE)) -> Callable[..., Any]:
    """Adds the flags to a command."""
    for name in reversed(tuple(names)):
        command = SPECULATIVE[name](command)
    return command


def tuning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds those of the flags that choose neither method nor acceptance."""
    return speculative_options(command, TUNING)


def speculative_overrides(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What was given of them, as LLM's speculative_config."""
    given = {name: flags[name] for name in SPECULATIVE if flags.get(name) is not None}
    return given | ({"method": None} if given.get("method") == "none" else {})
