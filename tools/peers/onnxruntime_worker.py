"""The worker of ONNX Runtime GenAI on the CPU: plain, with a draft model, and with n-gram drafts.

The library takes a draft model from the target's configuration, next to its own decoder, and at most 16 draft tokens.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai
from tokenizers import Tokenizer

from peers.protocol import Completion, Reading, Settings, serve

MAX_DRAFT_TOKENS = 16
# N-grams are right less often than a draft model: with few tokens the lookup was faster, here and with OpenVINO.
LOOKUP = {"max_draft_tokens": 4, "ngram_size": 4, "ngram_chained_lookup": True}


class OnnxruntimeSession:
    libraries = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, settings: Settings) -> None:
        target = Path(settings.target)
        options = {"intra_op_num_threads": settings.threads}
        decoders = {"decoder": {"session_options": options}}
        if settings.mode == "speculative":
            # Each session has threads of its own: those of the one would spin on the cores that the other one needs.
            options["session.intra_op.allow_spinning"] = "0"
            decoders["draft"] = _draft_decoder(Path(settings.draft), target, options)
        config = onnxruntime_genai.Config(str(target))
        config.overlay(json.dumps({"model": decoders}))
        self._model = onnxruntime_genai.Model(config)
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)
        # Its tokenizer leaves out what the checkpoint's adds to every prompt, such as a beginning-of-sequence token.
        self._prefix = Tokenizer.from_file(str(target / "tokenizer.json")).encode("").ids
        self._eos = int(next(iter(self._tokenizer.eos_token_ids)))
        self._speculation = {
            "plain": {},
            "speculative": {"max_draft_tokens": min(settings.num_assistant_tokens, MAX_DRAFT_TOKENS)},
            "prompt-lookup": LOOKUP,
        }[settings.mode]

    def generate(self, prompt: str, max_tokens: int) -> Completion:
        prompt_token_ids = [*self._prefix, *map(int, self._tokenizer.encode(prompt))]
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        # The cache is allocated for max_length, so it is no longer than it must be.
        parameters.set_search_options(do_sample=False, max_length=len(prompt_token_ids) + max_tokens)
        if self._speculation:
            parameters.set_speculative_options(**self._speculation)
        generator = onnxruntime_genai.Generator(self._model, parameters)
        generator.append_tokens(prompt_token_ids)
        while not generator.is_done():
            generator.generate_next_token()
        token_ids = generator.get_sequence(0)[len(prompt_token_ids) :].tolist()
        text = self._tokenizer.decode(token_ids)
        if len(token_ids) < max_tokens:
            token_ids.append(self._eos)  # generated, but not kept by the library
        return Completion(text, prompt_token_ids, token_ids)

    def read(self, prompts: list[list[int]], num_tokens: int) -> Reading:
        """One batch, whose prompts are of one length."""
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        length = len(prompts[0]) + num_tokens
        parameters.set_search_options(do_sample=False, batch_size=len(prompts), max_length=length, min_length=length)
        generator = onnxruntime_genai.Generator(self._model, parameters)
        started, moments = time.perf_counter(), []
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(num_tokens):
            generator.generate_next_token()
            moments.append(time.perf_counter())
        return Reading.of(started, moments)


def _draft_decoder(draft: Path, target: Path, session_options: dict) -> dict:
    decoder = json.loads((draft / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    decoder["filename"] = os.path.relpath(draft / decoder["filename"], target)
    decoder["session_options"] |= session_options
    return decoder


if __name__ == "__main__":
    serve(OnnxruntimeSession)
