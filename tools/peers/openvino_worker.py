"""The worker of OpenVINO GenAI: LLMPipeline on the CPU; plain, with a draft model, and with prompt lookup.

Weights are converted by optimum-intel beforehand; the precision of the arithmetic is asked for here. Everything else
is the library's own choice for latency, dynamic quantisation of the activations and the 8-bit cache included.
"""

import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from peers.protocol import Completion, Reading, Settings, UnavailableError, serve

# The library's own example: n-grams are right less often than a draft model, and more tokens made it slower.
LOOKUP_TOKENS, LOOKUP_NGRAM_SIZE = 5, 3
WITHOUT_END = 1 << 20
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
"""Of the arithmetic, beside integers where the weights are. Without a hint the library might choose a lower one."""


class OpenvinoSession:
    libraries = ("openvino-genai", "openvino")

    def __init__(self, settings: Settings) -> None:
        if settings.precision == "bfloat16":
            _check_bfloat16()
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": settings.threads,
            "INFERENCE_PRECISION_HINT": PRECISIONS[settings.precision],
        }
        options = {}
        if settings.reads:
            self._batching = _batching_pipeline(settings, properties)
            return
        if settings.mode == "speculative":
            options["draft_model"] = openvino_genai.draft_model(settings.draft, "CPU", **properties)
        elif settings.mode == "prompt-lookup":
            options["prompt_lookup"] = True
        self._pipeline = openvino_genai.LLMPipeline(Path(settings.target), "CPU", **properties, **options)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._config = self._pipeline.get_generation_config()
        self._config.do_sample = False
        if settings.mode == "speculative":
            self._config.num_assistant_tokens = settings.num_assistant_tokens
        elif settings.mode == "prompt-lookup":
            self._config.num_assistant_tokens = LOOKUP_TOKENS
            self._config.max_ngram_size = LOOKUP_NGRAM_SIZE

    def generate(self, prompt: str, max_tokens: int) -> Completion:
        self._config.max_new_tokens = max_tokens
        inputs = self._tokenizer.encode(prompt)
        result = self._pipeline.generate(inputs, self._config)
        token_ids = result.tokens[0]
        text = self._tokenizer.decode(token_ids)
        first_token_seconds = result.perf_metrics.get_ttft().mean / 1000
        return Completion(text, inputs.input_ids.data[0].tolist(), list(token_ids), first_token_seconds)

    def read(self, prompts: list[list[int]], num_tokens: int) -> Reading:
        config = openvino_genai.GenerationConfig(do_sample=False, ignore_eos=True, max_new_tokens=WITHOUT_END)
        started = time.perf_counter()
        requests = [
            self._batching.add_request(number, openvino.Tensor(np.array([ids], np.int64)), config)
            for number, ids in enumerate(prompts)
        ]
        moments: list[list[float]] = [[] for _ in requests]
        while min(map(len, moments)) < num_tokens:
            self._batching.step()
            now = time.perf_counter()
            for request, own in zip(requests, moments, strict=True):
                if request.can_read():
                    own.extend(now for _ in request.read())
        for request in requests:
            request.stop()
        while self._batching.has_non_finished_requests():
            self._batching.step()
        return Reading.of(started, max(moments, key=lambda own: own[0])[:num_tokens])


def _batching_pipeline(settings: Settings, properties: dict) -> openvino_genai.ContinuousBatchingPipeline:
    """As the library sets up a pipeline for latency, but for the reuse of what was read before: a prompt is read at
    once."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = WITHOUT_END
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = settings.num_requests
    return openvino_genai.ContinuousBatchingPipeline(Path(settings.target), scheduler, "CPU", properties)


def _check_bfloat16() -> None:
    """Without the instructions the plugin would take the hint and compute in float32 all the same."""
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in capabilities:
        raise UnavailableError(f"this CPU has no bfloat16 arithmetic: OpenVINO offers {', '.join(capabilities)}")


if __name__ == "__main__":
    serve(OpenvinoSession)
