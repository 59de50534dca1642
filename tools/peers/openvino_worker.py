"""The worker of OpenVINO GenAI: LLMPipeline on the CPU; plain, with a draft model, and with prompt lookup.

Weights are converted by optimum-intel beforehand; the precision of the arithmetic is asked for here. Everything else
is the library's own choice for latency, dynamic quantisation of the activations and the 8-bit cache included.
"""

from pathlib import Path

import openvino
import openvino_genai

from peers.protocol import Completion, Settings, UnavailableError, serve

# The library's own example: n-grams are right less often than a draft model, and more tokens made it slower.
LOOKUP_TOKENS, LOOKUP_NGRAM_SIZE = 5, 3
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


def _check_bfloat16() -> None:
    """Without the instructions the plugin would take the hint and compute in float32 all the same."""
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in capabilities:
        raise UnavailableError(f"this CPU has no bfloat16 arithmetic: OpenVINO offers {', '.join(capabilities)}")


if __name__ == "__main__":
    serve(OpenvinoSession)
