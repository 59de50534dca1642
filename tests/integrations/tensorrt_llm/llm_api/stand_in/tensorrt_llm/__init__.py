"""Stands in for tensorrt_llm where only its LLM API is used: same names, same refusals, tokens from ONNX Runtime.

Written from the text of these files, of which nothing is copied:
  tensorrt_llm/llmapi/llm.py              1.2 line, about November 2025 (BaseLLM, RequestOutput)
  tensorrt_llm/executor/result.py         1.2 line (GenerationResult, CompletionOutput, cached_tokens)
  tensorrt_llm/executor/{executor,proxy}.py   how errors come, and how responses are told to the event loop
  tensorrt_llm/llmapi/utils.py            AsyncQueue: a response that comes while the loop does not run is never told
  tensorrt_llm/llmapi/llm_args.py         update_llm_args_with_extra_dict, of 1.2 and of main
  tensorrt_llm/sampling_params.py         fields and checks
STAND_IN_* variables choose what it is: version, engines to compute with, and whether an end token is emitted.
"""

import os

# What MPI has of the environment is what there was when it was initialised, which this import does.
MPI_ENVIRONMENT = dict(os.environ)

from .llmapi.llm import LLM, STARTED  # noqa: E402
from .sampling_params import SamplingParams  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = ["LLM", "STARTED", "SamplingParams", "__version__"]
