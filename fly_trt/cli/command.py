"""What makes a function a command: its help and how it ends. The same for every command line, fly-build's too."""

import functools
from collections.abc import Callable
from typing import Any

import click

from fly_trt.cli.ending import ending_in_one_line


def command(
    name: str, *, epilog: str, when_interrupted: str = "interrupted", streams: bool = False
) -> Callable[[Callable[..., None]], click.Command]:
    """A decorator, above those of the command's options. The function's docstring is its help, and `epilog` follows the
    options; when_interrupted and streams are as ending_in_one_line has them."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            with ending_in_one_line(name, when_interrupted=when_interrupted, streams=streams):
                function(**given)

        return click.command(name, epilog=epilog, context_settings={"help_option_names": ["-h", "--help"]})(run)

    return decorate
