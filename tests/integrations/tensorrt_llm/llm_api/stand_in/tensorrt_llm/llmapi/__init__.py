from ..executor.utils import RequestError
from ..sampling_params import SamplingParams
from .llm import LLM, RequestOutput

__all__ = ["LLM", "RequestError", "RequestOutput", "SamplingParams"]
