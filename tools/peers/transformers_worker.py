"""The worker of Hugging Face transformers: greedy, assisted generation and prompt lookup with PyTorch.

SDPA attention and a dynamic cache, in inference mode. Assisted generation drafts a fixed number of tokens, without the
early stop at an unsure one; mode `speculative-default` leaves both as the library sets them.
"""

import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

from peers.protocol import Completion, Reading, Settings, serve

LOOKUP_TOKENS = 10  # the library's own example


class TransformersSession:
    libraries = ("transformers", "torch")

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        dtype = getattr(torch, settings.precision)
        self._tokenizer = AutoTokenizer.from_pretrained(settings.target)
        self._model = _load(settings.target, dtype)
        self._options = {}
        if settings.mode.startswith("speculative"):
            assistant = _load(settings.draft, dtype)
            if settings.mode == "speculative":
                assistant.generation_config.num_assistant_tokens = settings.num_assistant_tokens
                assistant.generation_config.num_assistant_tokens_schedule = "constant"
                assistant.generation_config.assistant_confidence_threshold = 0.0
            self._options["assistant_model"] = assistant
        elif settings.mode == "prompt-lookup":
            self._options["prompt_lookup_num_tokens"] = LOOKUP_TOKENS

    def generate(self, prompt: str, max_tokens: int) -> Completion:
        inputs = self._tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=max_tokens,
                **self._options,
            )
        sequence, prompt_length = output[0].tolist(), inputs["input_ids"].shape[1]
        text = self._tokenizer.decode(sequence[prompt_length:], skip_special_tokens=True)
        return Completion(text, sequence[:prompt_length], sequence[prompt_length:])

    def read(self, prompts: list[list[int]], num_tokens: int) -> Reading:
        """One batch, whose prompts are of one length."""
        input_ids, moments = torch.tensor(prompts), []

        def note(*args, **kwargs) -> torch.Tensor:
            moments.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool)

        started = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                stopping_criteria=StoppingCriteriaList([note]),
            )
        return Reading.of(started, moments)


def _load(checkpoint: str, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa").eval()


if __name__ == "__main__":
    serve(TransformersSession)
