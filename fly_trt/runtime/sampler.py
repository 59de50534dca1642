"""The target's choices for a request that samples or changes scores: from logits to tokens and gate entropies."""

import secrets
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from fly_trt.grammar import GrammarMatcher
from fly_trt.outputs import Logprob, TokenLogprobs
from fly_trt.params import SamplingParams
from fly_trt.runtime.rounds import NO_CHOICE
from fly_trt.tokens import FloatArray, IntArray
from fly_trt.verification import AcceptancePolicy, Positions, sampling


@dataclass(slots=True, eq=False)
class Sampler:
    """One sequence's way from logits to choices, and to what its `policy` reads of the processed distribution: nothing
    where it is exact (but entropies and top tokens for a trace), the log-probabilities only where the host decides.
    `entropy_top_k` is the engine's."""

    params: SamplingParams
    processor: sampling.LogitsProcessor
    uniforms: sampling.UniformStream
    policy: AcceptancePolicy
    entropy_top_k: int
    grammar: GrammarMatcher | None = None

    def choose(self, logits: FloatArray, output: IntArray, undecided: IntArray, draft: IntArray) -> Positions:
        """What the target says of m positions, or of those before the first one that no token is left for or whose
        logits are not numbers: it may lie behind a rejected draft token, where nobody asks. Where the first position is
        such a one, its choice is NO_CHOICE while the window before it is undecided, and so closes it. Raises
        RequestError where it is the next that would be emitted.

        logits float32 [m, V]; output int64 [k], the committed output tokens; undecided int64 [u], draft tokens after
        them that were verified in an earlier step, so that the first position is k + u; draft int64 [m - 1 or more],
        the draft tokens at the positions.
        """
        ahead = np.concatenate([undecided, draft])[: len(undecided) + len(logits) - 1]
        scores = self._process(logits, output, ahead, len(undecided)) if self.processor.changes_scores else logits
        masks = None if self.grammar is None else self.grammar.masks(output, ahead, len(undecided))
        is_sampled = self.params.temperature >= sampling.MIN_TEMPERATURE
        if not is_sampled and not self._needs_entropy:
            choices, best = _argmax(scores) if masks is None else masks.argmax(scores)
            num = self._num_alive(best, undecided)
            return self._unsaid(choices[:num] if num else np.array([NO_CHOICE]))
        scores = scores if masks is None else masks.apply(scores)
        num = self._num_alive(scores.max(axis=1), undecided)
        if not num:
            return self._unsaid(np.array([NO_CHOICE]))
        scores = scores[:num]
        return self._sampled(scores, output, undecided, draft) if is_sampled else self._likeliest(scores, draft)

    @property
    def _needs_entropy(self) -> bool:
        return self.policy.is_loose or self.params.speculation_trace

    @property
    def _needs_top(self) -> bool:
        return self.policy.needs_top or self.params.speculation_trace

    def _process(self, logits: FloatArray, output: IntArray, ahead: IntArray, num_undecided: int) -> FloatArray:
        if num_undecided:
            logits = np.concatenate([np.zeros((num_undecided, logits.shape[1]), np.float32), logits])
        return self.processor.process(logits, output, ahead)[num_undecided:]

    @staticmethod
    def _num_alive(best: FloatArray, undecided: IntArray) -> int:
        """How many positions there are before the first one without a choice, by their largest scores; raises
        RequestError where it is the first and the next that would be emitted."""
        dead = np.flatnonzero(~np.isfinite(best))
        if len(dead) and dead[0] == 0 and not len(undecided):
            sampling.check_largest(float(best[0]))
        return int(dead[0]) if len(dead) else len(best)

    def _likeliest(self, scores: FloatArray, draft: IntArray) -> Positions:
        return self._positions(sampling.greedy(scores), sampling.distribution(scores), draft)

    def _sampled(self, scores: FloatArray, output: IntArray, undecided: IntArray, draft: IntArray) -> Positions:
        params = self.params
        probabilities = sampling.distribution(
            scores, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
        )
        at = len(output) + len(undecided), len(scores)
        choices = sampling.sample(probabilities, self.uniforms.at(*at))
        said = self._positions(choices, probabilities, draft)
        return said._replace(uniforms=self.uniforms.others().at(*at)) if self.policy.needs_uniforms else said

    def _unsaid(self, choices: IntArray) -> Positions:
        """Choices alone: the rest is not a number, or no token."""
        said, num = Positions(choices, *np.full((4, len(choices)), np.nan, np.float32)), len(choices)
        if self._needs_top:
            shape = num, self.entropy_top_k
            said = said._replace(top_ids=np.full(shape, NO_CHOICE), top_logprobs=np.full(shape, np.nan, np.float32))
        return said._replace(uniforms=np.full(num, np.nan)) if self.policy.needs_uniforms else said

    def _positions(self, choices: IntArray, probabilities: FloatArray, draft: IntArray) -> Positions:
        """Entropies and a log-probability of -inf, and so below whatever threshold, where the draft token is one that
        must not come: a bad word, or what a grammar forbids."""
        said = self._unsaid(choices)
        if not self._needs_entropy:
            return said
        entropy, entropy_topk = sampling.gate_entropy(probabilities, self.entropy_top_k)
        said = said._replace(entropy=entropy, entropy_topk=entropy_topk)
        if self._needs_top:
            top_ids, top_logprobs = sampling.top_tokens(probabilities, self.entropy_top_k)
            said = said._replace(top_ids=top_ids, top_logprobs=top_logprobs)
        if not self.policy.is_loose:
            return said
        num_drafts = min(len(draft), len(choices))
        at = np.arange(num_drafts), draft[:num_drafts]
        is_banned = probabilities[at] == 0  # masked, or left out by truncation
        if not self.policy.is_decided_by_head:
            with np.errstate(divide="ignore"):  # a token that is left out has the log-probability -inf
                said.argmax_logprob[:] = np.log(probabilities.max(axis=1))
                said.draft_logprob[:num_drafts] = np.log(probabilities[at])
        for numbers in (entropy, entropy_topk, said.draft_logprob):
            numbers[:num_drafts][is_banned] = -np.inf
        return said


def _argmax(scores: FloatArray) -> tuple[IntArray, FloatArray]:
    """The choices int64 [m] and their scores float32 [m]."""
    choices = np.asarray(scores.argmax(axis=1), np.int64)
    return choices, scores[np.arange(len(scores)), choices]


def draw_seed() -> int:
    return secrets.randbits(63)


def token_logprobs(logits: FloatArray, num: int, token_ids: IntArray, tokenizer: Tokenizer) -> list[TokenLogprobs]:
    """For each of m positions the chosen token and the `num` most probable ones, from raw logits float32 [m, V]."""
    top = sampling.top_logprobs(logits, num, token_ids)
    result = []
    for row, token in enumerate(token_ids.tolist()):
        ranked = zip(top.token_ids[row].tolist(), top.logprobs[row].tolist(), strict=True)
        entries = {token: (float(top.chosen_logprob[row]), int(top.chosen_rank[row]))}
        entries |= {other: (logprob, rank) for rank, (other, logprob) in enumerate(ranked, start=1)}
        result.append(
            {
                other: Logprob(logprob, rank, tokenizer.decode([other], skip_special_tokens=False))
                for other, (logprob, rank) in entries.items()
            }
        )
    return result
