"""fly-trt's worker: plain decoding, exact speculation and FLy on one engine directory."""

from fly_trt import LLM, SamplingParams
from peers.protocol import Completion, Settings, serve

MODES = {"plain": {"method": None}, "speculative": {"acceptance": "exact"}, "fly": {"acceptance": "fly"}}


class FlySession:
    libraries = ("fly-trt", "onnxruntime")

    def __init__(self, settings: Settings) -> None:
        speculation = dict(MODES[settings.mode])
        if settings.mode != "plain":
            speculation["num_speculative_tokens"] = settings.num_assistant_tokens
        self._llm = LLM(
            settings.target,
            speculative_config=speculation,
            max_batch_size=1,
            # The rounds repeat the prompts, and no peer may remember one.
            enable_prefix_caching=False,
            num_threads=settings.threads,
        )

    def generate(self, prompt: str, max_tokens: int) -> Completion:
        output = self._llm.generate(prompt, SamplingParams(max_tokens=max_tokens))[0]
        answer = output.outputs[0]
        first_token_seconds = output.metrics.time_to_first_token
        return Completion(answer.text, list(output.prompt_token_ids), list(answer.token_ids), first_token_seconds)


if __name__ == "__main__":
    serve(FlySession)
