"""Where the command lines start. Ctrl-C while their libraries load, which may take seconds, is one line as later.

So nothing but the standard library is imported before that is settled.
"""

import os
import signal
from importlib import import_module
from typing import Any


def bench() -> None:
    start("fly-bench", "fly_trt.cli.bench")


def generate() -> None:
    start("fly-generate", "fly_trt.cli.generate")


def inspect() -> None:
    start("fly-inspect", "fly_trt.cli.inspect")


def serve() -> None:
    start("fly-serve", "fly_trt.cli.serve")


def triton() -> None:
    start("fly-triton", "fly_trt.cli.triton")


def tune() -> None:
    start("fly-tune", "fly_trt.cli.tune")


def start(command: str, module: str) -> None:
    """Runs `main` of the module that `command` is."""

    def leave(*_: Any) -> None:  # an exception in the middle of an import may be swallowed, or become another one
        os.write(2, f"{command}: interrupted\n".encode())
        os._exit(130)

    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # not where interrupts are ignored, as nohup wants it
        signal.signal(signal.SIGINT, leave)
    main = import_module(module).main
    signal.signal(signal.SIGINT, usual)
    main()
