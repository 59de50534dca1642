"""fly-trt: compiled training-free loose speculative decoding (FLy, arXiv 2511.22972)."""

from fly_trt.errors import CheckpointError, ConfigError, EngineError, FlyError, RequestError
from fly_trt.llm import LLM
from fly_trt.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fly_trt.params import AcceptanceParams, SamplingParams, SpeculativeConfig

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AcceptanceParams",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineError",
    "FlyError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SpeculativeConfig",
]
