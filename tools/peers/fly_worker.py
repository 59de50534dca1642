"""fly-trt's worker: plain decoding, exact speculation with the draft model and with n-grams, and FLy on one engine
directory."""

from fly_trt import LLM, SamplingParams
from fly_trt.benchmark.client import Client, Load
from peers.protocol import Completion, Reading, Settings, serve

MODES = {
    "plain": {"method": None},
    "speculative": {"acceptance": "exact"},
    "fly": {"acceptance": "fly"},
    "prompt-lookup": {"method": "ngram", "acceptance": "exact"},
}
WITH_DRAFT_MODEL = ("speculative", "fly")
# Requests whose prompts are read already decode while the others' are read, a token with each chunk: of this many
# tokens at least.
CHUNK_TOKENS = 256


class FlySession:
    libraries = ("fly-trt", "onnxruntime")

    def __init__(self, settings: Settings) -> None:
        speculation = dict(MODES[settings.mode])
        if settings.mode in WITH_DRAFT_MODEL:
            speculation["num_speculative_tokens"] = settings.num_assistant_tokens
        self._llm = LLM(
            settings.target,
            speculative_config=speculation,
            max_batch_size=settings.num_requests,
            # The rounds repeat the prompts, and no peer may remember one.
            enable_prefix_caching=False,
            num_threads=settings.threads,
        )

    def generate(self, prompt: str, max_tokens: int) -> Completion:
        output = self._llm.generate(prompt, SamplingParams(max_tokens=max_tokens))[0]
        answer = output.outputs[0]
        first_token_seconds = output.metrics.time_to_first_token
        return Completion(answer.text, list(output.prompt_token_ids), list(answer.token_ids), first_token_seconds)

    def read(self, prompts: list[list[int]], num_tokens: int) -> Reading:
        others = len(prompts) - 1
        meanwhile = others * -(-len(prompts[0]) // CHUNK_TOKENS)
        params = SamplingParams(max_tokens=num_tokens + meanwhile, ignore_eos=True)
        given = [{"prompt_token_ids": ids} for ids in prompts]
        exchanges, _ = Client(self._llm._service).complete(given, params, Load(concurrency=len(prompts)))
        last = max(exchanges, key=lambda exchange: exchange.chunk_times[0])
        return Reading.of(min(exchange.sent for exchange in exchanges), last.chunk_times[:num_tokens])


if __name__ == "__main__":
    serve(FlySession)
