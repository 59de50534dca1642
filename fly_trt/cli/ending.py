"""How every command line ends when it does not end well: with one line on stderr and an exit code, never a traceback.

2: something that the user can mend, the system's errors included. 130: Ctrl-C. 143: SIGTERM, which unwinds the stack as
Ctrl-C does, so that engines shut down and half-written directories go.
"""

import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from fly_trt.errors import FlyError, one_line

ADVICE = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.EFBIG: "raise the limit on file sizes, or write elsewhere",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM came; whatever ends at Ctrl-C ends."""


@contextlib.contextmanager
def ending_in_one_line(command: str, *, when_interrupted: str = "interrupted", streams: bool = False) -> Iterator[None]:
    """The body of a command. `streams`: a line may be unfinished when it is interrupted."""
    try:
        with _sigterm_unwinds():
            yield
    except FlyError as error:
        _end(f"{command}: {error}", 2)
    except BrokenPipeError:
        raise  # whoever reads the output has enough: click ends the process
    except OSError as error:
        _end(f"{command}: {_describe(error)}", 2)
    except KeyboardInterrupt as error:
        is_terminated = isinstance(error, Terminated)
        what = when_interrupted.replace("interrupted", "terminated") if is_terminated else when_interrupted
        _end(f"{chr(10) if streams else ''}{command}: {what}", 143 if is_terminated else 130)


def _end(message: str, exit_code: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(exit_code)


def _describe(error: OSError) -> str:
    """File, reason and advice, as far as the system says them."""
    parts = [error.filename, error.strerror or one_line(error)]
    return ": ".join(str(part) for part in (*parts, ADVICE.get(error.errno or 0)) if part)


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Only where SIGTERM would have ended the process at once."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def unwind(number: int, frame: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the cleaning up
        raise Terminated

    signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
