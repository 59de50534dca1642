"""The flags that override an engine's SpeculativeConfig, the same for every command."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from fly_trt.drafting import DRAFTERS
from fly_trt.verification import POLICIES, PRESETS

OPTIONS = {
    "method": click.option("--method", type=click.Choice([*DRAFTERS, "none"]), help="How drafts are made. [as built]"),
    "num_speculative_tokens": click.option(
        "--num-speculative-tokens", type=int, metavar="K", help="Draft tokens per step, at most. [as built]"
    ),
    "acceptance": click.option(
        "--acceptance", type=click.Choice(list(POLICIES)), help="Loose, or exact (lossless). [as built]"
    ),
    "preset": click.option("--preset", type=click.Choice(list(PRESETS)), help="Which FLy. [as built]"),
    "fly_entropy_threshold": click.option(
        "--fly-entropy-threshold",
        type=float,
        metavar="X",
        help="Gate, in nats; under preset paper a fraction of ln V. [the preset's]",
    ),
    "fly_window_size": click.option(
        "--fly-window-size", type=int, metavar="W", help="Deferred window, in tokens. [the preset's]"
    ),
}


# What is left to say where a command chooses method and acceptance itself.
TUNING = tuple(name for name in OPTIONS if name not in ("method", "acceptance"))


def speculative_options(command: Callable[..., Any], names: Iterable[str] = tuple(OPTIONS)) -> Callable[..., Any]:
    """Adds the flags to a command."""
    for name in reversed(tuple(names)):
        command = OPTIONS[name](command)
    return command


def tuning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds those of the flags that choose neither method nor acceptance."""
    return speculative_options(command, TUNING)


def speculative_overrides(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What was given of them, as LLM's speculative_config."""
    given = {name: flags[name] for name in OPTIONS if flags.get(name) is not None}
    return given | ({"method": None} if given.get("method") == "none" else {})
