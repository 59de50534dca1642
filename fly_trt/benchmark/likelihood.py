"""How probable the target finds what a mode emitted, and what it would have chosen there, from steps that only read.

It knows the engine's steps and token ids; nothing of modes, rounds or time. The target's own distribution counts, as it
is before any temperature or truncation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fly_trt.drafting.base import common_prefix
from fly_trt.engines.directory import LoadedEngines
from fly_trt.tokens import NO_TOKENS, IntArray

CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Reading:
    """An output of `num_tokens` as the target reads it. Sums over its tokens, in nats: log_likelihood, of ln p(token);
    best_log_likelihood, of ln p(most probable token) in their places. Each is given what comes before it."""

    num_tokens: int
    log_likelihood: float
    best_log_likelihood: float

    @property
    def quality(self) -> float:
        """From 0 to 1: the geometric mean over the tokens of p(token) / p(most probable token)."""
        return min(1.0, math.exp((self.log_likelihood - self.best_log_likelihood) / max(1, self.num_tokens)))


class Likelihood:
    """Reads sequences into the target's first slot, each continuation of a prompt once. It has the engines to itself
    for as long as it is used."""

    def __init__(self, engines: LoadedEngines) -> None:
        self._engines = engines
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], Reading] = {}
        self._held: IntArray = NO_TOKENS  # what the slot holds
        self._logprobs: list[float] = []  # of held tokens 1, 2, ..., each given those before it
        self._best_logprobs: list[float] = []  # of the most probable tokens in their places

    def log_likelihood(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        """Sum over the output tokens of ln p(token | prompt and the tokens before it), in nats. An output is quickest
        to read after another one of the same prompt: what they have in common is in the slot already."""
        return self.read(prompt_token_ids, token_ids).log_likelihood

    def read(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> Reading:
        """The same, with what the target would have chosen."""
        key = tuple(prompt_token_ids), tuple(token_ids)
        if key not in self._known:
            self._read(np.array([*prompt_token_ids, *token_ids], np.int64))
            start = len(prompt_token_ids) - 1
            sums = (float(sum(logprobs[start:])) for logprobs in (self._logprobs, self._best_logprobs))
            self._known[key] = Reading(len(token_ids), *sums)
        return self._known[key]

    def forget(self) -> None:
        """What the slot holds, since somebody else has written there. What was read is known all the same."""
        self._held = NO_TOKENS
        self._logprobs.clear()
        self._best_logprobs.clear()

    def _read(self, tokens: IntArray) -> None:
        """A position predicts the token after it, so that the last one of a chunk is the first one of the next."""
        target = self._engines.target
        size = max(2, min(CHUNK_TOKENS, self._engines.manifest.limits.max_num_tokens))
        start = max(0, common_prefix(self._held, tokens) - 1)
        del self._logprobs[start:], self._best_logprobs[start:]
        while start < len(tokens) - 1:
            chunk = tokens[start : start + size]
            step = target.step(0, 1, len(chunk))
            step.set_row(0, start, chunk)
            target.run(step)
            positions = step.at(0, 0, len(chunk) - 1)
            self._logprobs += step.token_logprob[0, positions].tolist()
            self._best_logprobs += step.argmax_logprob[0, positions].tolist()
            start += len(chunk) - 1
        self._held = tokens
