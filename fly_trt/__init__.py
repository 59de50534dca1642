"""fly-trt: compiled training-free loose speculative decoding (FLy, arXiv 2511.22972)."""

from fly_trt.async_llm import AsyncLLM
from fly_trt.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    EngineError,
    FlyError,
    QueueFullError,
    RequestError,
)
from fly_trt.llm import LLM
from fly_trt.loaded import LoadedEngines
from fly_trt.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from fly_trt.params import AcceptanceParams, RequestOutputKind, SamplingParams, SpeculativeConfig

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
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SpeculativeConfig",
]
