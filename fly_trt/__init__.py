"""fly-trt: compiled training-free loose speculative decoding (FLy, arXiv 2511.22972)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fly_trt.acceptance import AcceptanceParams
    from fly_trt.async_llm import AsyncLLM
    from fly_trt.engines.directory import LoadedEngines
    from fly_trt.errors import (
        CheckpointError,
        ConfigError,
        EngineDeadError,
        EngineError,
        FlyError,
        QueueFullError,
        QueueTimeoutError,
        RequestError,
    )
    from fly_trt.grammar import StructuredOutputs
    from fly_trt.llm import LLM
    from fly_trt.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from fly_trt.params import RequestOutputKind, SamplingParams, SpeculativeConfig

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AcceptanceParams",
    "AsyncLLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineDeadError",
    "EngineError",
    "FlyError",
    "LoadedEngines",
    "Logprob",
    "QueueFullError",
    "QueueTimeoutError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SpeculativeConfig",
    "StructuredOutputs",
]

_HOMES = ("errors", "outputs", "acceptance", "params", "engines.directory", "llm", "async_llm")


def __getattr__(name: str) -> Any:
    """Loads what is asked for: a command line that uses none of it starts at once and can be interrupted."""
    if name in __all__:
        for home in _HOMES:
            if hasattr(module := import_module(f"fly_trt.{home}"), name):
                return getattr(module, name)
    raise AttributeError(f"module 'fly_trt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
