"""Every error that a user can cause. The message is one line: what was got, what was expected, and the fix."""

from enum import Enum
from typing import ClassVar


class Fault(Enum):
    """Whose fault an error is, which decides what a front end answers with.

    CALLER: what was asked for; sent again, it fails again. LOAD: too much is asked for at once; the same may be served
    later. ENGINE: everything else, which no caller can mend.
    """

    CALLER = "caller"
    LOAD = "load"
    ENGINE = "engine"


class FlyError(Exception):
    """Base of all errors raised on purpose by fly-trt."""

    fault: ClassVar[Fault] = Fault.ENGINE


class ConfigError(FlyError):
    """A setting or a combination of settings that cannot work."""

    fault = Fault.CALLER


class CheckpointError(FlyError):
    """A Hugging Face checkpoint that is missing, broken or not supported."""


class EngineError(FlyError):
    """An engine directory that is missing, broken, of another version or built for something else."""


class EngineDeadError(EngineError):
    """The engine cannot run any more: all requests end with this, and no other one is taken."""


class RequestError(FlyError):
    """A request that cannot be served as asked; other requests are not affected."""

    fault = Fault.CALLER


class QueueFullError(RequestError):
    """Too many requests wait already; the same request may be accepted later."""

    fault = Fault.LOAD


class QueueTimeoutError(RequestError):
    """It had no slot within its queue_timeout; the same request may be served later."""

    fault = Fault.LOAD


def one_line(error: BaseException) -> str:
    """What an error says, whoever raised it, as one line that can be encoded; its type where it says nothing."""
    return " ".join(str(error).encode(errors="backslashreplace").decode().split()) or type(error).__name__
