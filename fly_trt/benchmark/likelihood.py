"""How probable the target finds what a mode emitted: sums of log-probabilities, from steps that only read.

It knows the engine's steps and token ids; nothing of modes, rounds or time. The target's own distribution counts, as it
is before any temperature or truncation.
"""

from collections.abc import Sequence

import numpy as np

from fly_trt.drafting.base import common_prefix
from fly_trt.engines.directory import LoadedEngines
from fly_trt.tokens import NO_TOKENS, IntArray

CHUNK_TOKENS = 64


class Likelihood:
    """Reads sequences into the target's first slot, each continuation of a prompt once. It has the engines to itself
    for as long as it is used."""

    def __init__(self, engines: LoadedEngines) -> None:
        self._engines = engines
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        self._held: IntArray = NO_TOKENS  # what the slot holds
        self._logprobs: list[float] = []  # of held tokens 1, 2, ..., each given those before it

    def log_likelihood(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        """Sum over the output tokens of ln p(token | prompt and the tokens before it), in nats. An output is quickest
        to read after another one of the same prompt: what they have in common is in the slot already."""
        key = tuple(prompt_token_ids), tuple(token_ids)
        if key not in self._known:
            self._read(np.array([*prompt_token_ids, *token_ids], np.int64))
            self._known[key] = float(sum(self._logprobs[len(prompt_token_ids) - 1 :]))
        return self._known[key]

    def _read(self, tokens: IntArray) -> None:
        """A position predicts the token after it, so that the last one of a chunk is the first one of the next."""
        target = self._engines.target
        size = max(2, min(CHUNK_TOKENS, self._engines.manifest.limits.max_num_tokens))
        start = max(0, common_prefix(self._held, tokens) - 1)
        del self._logprobs[start:]
        while start < len(tokens) - 1:
            chunk = tokens[start : start + size]
            step = target.step(0, 1, len(chunk))
            step.set_row(0, start, chunk)
            target.run(step)
            self._logprobs += step.token_logprob[0, : len(chunk) - 1].tolist()
            start += len(chunk) - 1
        self._held = tokens
