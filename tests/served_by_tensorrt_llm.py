"""What the tests of tensorrt_llm.LLM have in common."""

import time
from collections.abc import Callable
from typing import Any

from eval_prompts import load_eval_prompts
from fly_trt import SamplingParams
from fly_trt.outputs import CompletionOutput

NUM_DRAFT_TOKENS = 10
RULE = {
    "method": "draft_model",
    "num_speculative_tokens": NUM_DRAFT_TOKENS,
    "adaptive_draft_length": False,
    "adaptive_acceptance": False,
    "acceptance": "fly",
}
"""What fly-build says of such a directory, and what fly-trt's own loop has to be told to do the same."""
SPECULATIVE_CONFIG = {
    "decoding_type": "Eagle3",
    "max_draft_len": NUM_DRAFT_TOKENS,
    "speculative_model_dir": "org/draft",
}
PROMPTS = [record["prompt"] for record in load_eval_prompts()[:12]]
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
ERROR, TIMEOUT, DEATH, LAST_WORDS = ({"prompt_token_ids": [1, 1, last]} for last in (1, 2, 3, 4))
"""What the stand-in's worker fails at, as its text says."""


def told(completion: CompletionOutput) -> tuple[Any, ...]:
    return completion.text, completion.token_ids, completion.finish_reason, completion.stop_reason


def wait_until(is_true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "still not true"
        time.sleep(0.005)
