"""Every error that a user can cause. The message is one line: what was got, what was expected, and the fix."""


class FlyError(Exception):
    """Base of all errors raised on purpose by fly-trt."""


class ConfigError(FlyError):
    """A setting or a combination of settings that cannot work."""


class CheckpointError(FlyError):
    """A Hugging Face checkpoint that is missing, broken or not supported."""


class EngineError(FlyError):
    """An engine directory that is missing, broken, of another version or built for something else."""


class EngineDeadError(EngineError):
    """The engine cannot run any more: all requests end with this, and no other one is taken."""


class RequestError(FlyError):
    """A request that cannot be served as asked; other requests are not affected."""


class QueueFullError(RequestError):
    """Too many requests wait already; the same request may be accepted later."""
