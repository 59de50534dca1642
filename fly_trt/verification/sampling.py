"""What the target chooses at each position of a row when a request samples or changes scores, in NumPy.

A draft is one fixed token per position. Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192) then accepts it
with probability p(draft) and otherwise draws from p without it, which has the law of: draw a token from p, accept the
draft token iff it is that token, else emit the drawn one. So every position gets a choice, drawn with a uniform that
belongs to the output position, and `rule.accept` compares drafts with choices as it does with argmaxes. The tokens are
the same with and without speculation, however the draft is cut and whatever else is in the batch.

This module knows arrays and one request's settings as plain values; it knows nothing of requests, text or engines.
A row's result is, to the last bit, what it would be alone; where NumPy's sums depend on the shape, rows go one by one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field, replace

import numpy as np
import numpy.typing as npt

from fly_trt.errors import RequestError
from fly_trt.tokens import FloatArray, IntArray

# Below it a request is decoded greedily, as in vLLM.
MIN_TEMPERATURE = 1e-5
# The most probable tokens that usually hold top_p of the mass; sorting the whole vocabulary costs ten times as much.
_USUAL_NUCLEUS = 4096
_SUM_BLOCK = 512


@dataclass(slots=True, eq=False)
class LogitsProcessor:
    """One request's settings that change scores before temperature, in the order of vLLM V1: bad_words, min_tokens,
    logit_bias, then repetition, frequency and presence penalty.

    bad_words: sequences of token ids that the output must not contain. end_token_ids: tokens that are masked until
    min_tokens output tokens exist. The repetition penalty looks at prompt and output, everything else at the output.
    Raises RequestError for a bad word without tokens, and for bad words and biases outside the vocabulary."""

    vocab_size: int
    prompt_token_ids: InitVar[Sequence[int] | IntArray]
    _: KW_ONLY
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[Sequence[int]] = ()
    min_tokens: int = 0
    end_token_ids: Iterable[int] = ()
    _end_ids: IntArray = field(init=False)
    _bias_ids: IntArray = field(init=False)
    _bias: FloatArray = field(init=False)
    _in_prompt: npt.NDArray[np.bool_] = field(init=False)  # [V]
    _counts: IntArray = field(init=False)  # [V], of the first _num_counted output tokens
    _seen: IntArray = field(init=False)  # the tokens that the penalties touch, ascending
    _num_counted: int = field(init=False, default=0)

    def __post_init__(self, prompt_token_ids: Sequence[int] | IntArray) -> None:
        words = [("bad_words", list(word)) for word in self.bad_words]
        for name, ids in [*words, *(("logit_bias", [token]) for token in self.logit_bias)]:
            if not ids or not all(0 <= token < self.vocab_size for token in ids):
                raise RequestError(f"{name} {ids}: expected one or more token ids from 0 to {self.vocab_size - 1}")
        # Some checkpoints list end tokens that their head cannot produce; those need no mask.
        self._end_ids = np.array([t for t in self.end_token_ids if 0 <= t < self.vocab_size], np.int64)
        self._bias_ids = np.array(list(self.logit_bias), np.int64)
        self._bias = np.array(list(self.logit_bias.values()), np.float32)
        self._seen = np.unique(np.asarray(prompt_token_ids if self.repetition_penalty != 1 else (), np.int64))
        self._in_prompt = np.zeros(self.vocab_size, np.bool_)
        self._in_prompt[self._seen] = True
        self._counts = np.zeros(self.vocab_size, np.int64)

    @property
    def changes_scores(self) -> bool:
        """False when `process` would only copy."""
        masks = bool(self.bad_words) or (self.min_tokens > 0 and len(self._end_ids) > 0)
        return masks or len(self._bias_ids) > 0 or self._has_penalties

    @property
    def _has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    def process(self, logits: FloatArray, output: IntArray, draft: IntArray) -> FloatArray:
        """The scores of m consecutive output positions, float32 [m, V]; `logits` [m, V] stays as it is.

        output int64 [k]: the committed output tokens. It only grows from call to call: what was counted stays counted.
        draft int64 [m - 1 or more]: the tokens that follow. Row i is for output position k + i, given
        output + draft[:i], and equals what a call with those tokens committed returns."""
        scores = np.array(logits, np.float32)
        ahead = draft[: len(scores) - 1]
        if self.bad_words:
            self._mask_bad_words(scores, output, ahead)
        num_short = max(0, self.min_tokens - len(output))
        scores[:num_short, self._end_ids] = -np.inf
        scores[:, self._bias_ids] += self._bias
        if self._has_penalties:
            self._penalise(scores, output, ahead)
        return scores

    def _mask_bad_words(self, scores: FloatArray, output: IntArray, ahead: IntArray) -> None:
        reach = max(map(len, self.bad_words)) - 1
        past = np.concatenate([np.full(reach, -1), output, ahead])
        recent = np.lib.stride_tricks.sliding_window_view(past, reach)[-len(scores) :]  # [m, reach]: before each row
        for *beginning, last in self.bad_words:
            completes = (recent[:, reach - len(beginning) :] == np.array(beginning, np.int64)).all(axis=1)
            scores[completes, last] = -np.inf

    def _penalise(self, scores: FloatArray, output: IntArray, ahead: IntArray) -> None:
        # Only the tokens that occur are touched: thousands in a prompt, a hundred thousand and more in a vocabulary.
        new = output[self._num_counted :]
        np.add.at(self._counts, new, 1)
        self._seen = np.union1d(self._seen, new)
        self._num_counted = len(output)
        ids = np.union1d(self._seen, ahead)
        counts = np.zeros((len(scores), len(ids)), np.float32)
        np.cumsum(ahead[:, None] == ids, axis=0, out=counts[1:])
        counts += self._counts[ids]
        occurs = counts > 0
        values = scores[:, ids]
        weakened = np.where(values > 0, values / self.repetition_penalty, values * self.repetition_penalty)
        values = np.where(occurs | self._in_prompt[ids], weakened, values)
        values -= self.frequency_penalty * counts
        values -= self.presence_penalty * occurs.astype(np.float32)
        scores[:, ids] = values


def greedy(scores: FloatArray) -> IntArray:
    """The choice at temperature 0, int64 [m]: the most probable token of each row [m, V], the lowest id among equals.
    Raises RequestError when a row has no finite largest score."""
    for row in scores:
        _largest_score(row)
    return np.asarray(scores.argmax(axis=1), np.int64)


def distribution(
    scores: FloatArray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> FloatArray:
    """The probabilities that a request samples from, float32 [m, V], for processed scores float32 [m, V].

    In vLLM's order: temperature, min_p (relative to the most probable token), top_k (<= 0: all), top_p (the fewest
    most probable of the remaining tokens whose share reaches it), renormalised. Among equal scores the lower token id
    counts as the more probable one; one token at least remains. The defaults are the plain softmax, which is what the
    gate of a greedy request looks at. Raises ValueError for a temperature below MIN_TEMPERATURE (see `greedy`), and
    RequestError when a row has no finite largest score.
    """
    if not temperature >= MIN_TEMPERATURE:
        raise ValueError(f"temperature {temperature}: expected at least {MIN_TEMPERATURE}: use greedy() below it")
    probabilities = np.zeros(scores.shape, np.float32)
    for row, out in zip(scores, probabilities, strict=True):
        largest = _largest_score(row)
        kept = _most_probable(row, top_k) if 0 < top_k < len(row) else None
        if min_p > 0:
            likely = np.flatnonzero(row >= largest + temperature * math.log(min_p))
            kept = likely if kept is None or len(likely) < len(kept) else kept
        values = row if kept is None else row[kept]
        weights = _softmax_weights(values, largest, temperature)
        if top_p < 1:
            nucleus = _nucleus(values, weights, top_p)
            kept = nucleus if kept is None else kept[nucleus]
            weights = weights[nucleus]
        out[... if kept is None else kept] = weights / _sum(weights)
    return probabilities


def sample(probabilities: FloatArray, uniforms: npt.NDArray[np.float64]) -> IntArray:
    """One token per row of [m, V] by inverse CDF in vocabulary order, with uniforms float64 [m] in [0, 1); int64 [m].
    A token of probability 0 is never drawn. Raises ValueError for a row without mass."""
    ends = _block_ends(probabilities)
    if not (ends[:, -1] > 0).all():
        raise ValueError(f"probabilities that sum to {ends[:, -1].min()}: expected a distribution")
    return _crossing(probabilities, ends, uniforms * ends[:, -1])


@dataclass(frozen=True, slots=True)
class UniformStream:
    """The uniforms of one sample of one request: a function of (seed, sample_index, output position) only.

    Philox is counter-based (Salmon et al. 2011), so that any position is reached at once, in any order, and NumPy keeps
    its raw stream the same across versions. `seed` is taken modulo 2**64; sample_index counts from 0."""

    seed: int
    sample_index: int
    purpose: int = 0

    def others(self) -> "UniformStream":
        """Other numbers of the same sample, for what is decided beside its tokens."""
        return replace(self, purpose=self.purpose + 1)

    def at(self, first_position: int, count: int) -> npt.NDArray[np.float64]:
        """float64 [count] in [0, 1), for output positions first_position onwards."""
        block, skipped = divmod(first_position, 4)  # one step of the counter gives four numbers
        key = np.array([self.seed % 2**64, self.sample_index + (self.purpose << 32)], np.uint64)
        raw = np.random.Philox(counter=block, key=key).random_raw(skipped + count)
        return np.ldexp((raw[skipped:] >> np.uint64(11)).astype(np.float64), -53)


def gate_entropy(probabilities: FloatArray, top_k: int) -> tuple[FloatArray, FloatArray]:
    """Entropies of each row of [m, V] in nats, two float32 [m]: of the whole vocabulary, and of the top_k largest
    probabilities, not renormalised. On a plain softmax they are what the engines' EntropyGate computes."""
    entropy, entropy_topk = np.empty((2, len(probabilities)), np.float32)
    for i, row in enumerate(probabilities):
        positive = row[row > 0]
        largest = np.partition(positive, len(positive) - top_k)[-top_k:] if top_k < len(positive) else positive
        entropy[i] = -(positive * np.log(positive)).sum()
        entropy_topk[i] = -(largest * np.log(largest)).sum()
    return entropy, entropy_topk


def top_tokens(probabilities: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """The k most probable tokens of each row of [m, V], k <= V, and their log-probabilities in nats: int64 [m, k] and
    float32 [m, k], most probable first and the lowest id first among equals. A token of probability 0 has -inf. On a
    plain softmax they are what an engine's step says in `top_ids` and `top_logprobs`."""
    ids = np.empty((len(probabilities), k), np.int64)
    logprobs = np.empty(ids.shape, np.float32)
    for i, row in enumerate(probabilities):
        ids[i] = _by_rank(row, k)
        with np.errstate(divide="ignore"):
            logprobs[i] = np.log(row[ids[i]])
    return ids, logprobs


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The most probable tokens of m positions and the chosen one's place among all.

    token_ids int64 [m, num] and logprobs float32 [m, num], most probable first, so that column j has rank j + 1;
    chosen_logprob float32 [m]; chosen_rank int64 [m], 1 for the most probable token."""

    token_ids: IntArray
    logprobs: FloatArray
    chosen_logprob: FloatArray
    chosen_rank: IntArray


def top_logprobs(logits: FloatArray, num: int, token_ids: IntArray) -> TopLogprobs:
    """Natural log-probabilities of the raw logits [m, V], before processing and temperature, as vLLM reports them.

    num: tokens per position, at most V; token_ids int64 [m]: the chosen tokens. Among equal logits the lower token id
    has the smaller rank. Raises RequestError when a row has no finite largest logit."""
    m, num = len(logits), min(num, logits.shape[1])
    ids, ranks = np.empty((m, num), np.int64), np.empty(m, np.int64)
    logprobs, chosen = np.empty((m, num), np.float32), np.empty(m, np.float32)
    for i, (row, token) in enumerate(zip(logits, token_ids, strict=True)):
        largest = _largest_score(row)
        log_sum = largest + math.log(_sum(_softmax_weights(row, largest, 1.0)))
        ids[i] = _by_rank(row, num)
        logprobs[i] = row[ids[i]] - log_sum
        chosen[i] = row[token] - log_sum
        ranks[i] = 1 + np.count_nonzero(row > row[token]) + np.count_nonzero(row[:token] == row[token])
    return TopLogprobs(ids, logprobs, chosen, ranks)


def check_largest(score: float) -> None:
    """Raises RequestError where the largest score of a position is none to choose by."""
    if not math.isfinite(score):
        raise RequestError(
            f"the largest score of a position is {score}: expected a finite one: logit_bias, bad_words, min_tokens and "
            "structured_outputs leave no token, or the engine's logits are not finite"
        )


def _largest_score(row: FloatArray) -> float:
    largest = float(row.max())
    check_largest(largest)
    return largest


def _softmax_weights(values: FloatArray, largest: float, temperature: float) -> FloatArray:
    """exp((values - largest) / temperature): probabilities but for the normalisation."""
    with np.errstate(over="ignore"):  # to -inf, of which exp is the 0 that is meant
        weights: FloatArray = np.exp((values - largest) / temperature)
    return weights


def _sum(weights: FloatArray) -> float:
    return float(weights.sum(dtype=np.float64))


def _nucleus(values: FloatArray, weights: FloatArray, top_p: float) -> IntArray:
    """Indices, ascending, of the fewest largest of [n] whose weights reach the share top_p of all weights."""
    wanted = math.nextafter(top_p * _sum(weights), 0.0)  # to exceed this is to reach the share
    candidates = _most_probable(values, _USUAL_NUCLEUS)
    if _sum(weights[candidates]) < wanted:
        candidates = np.arange(len(values))
    descending = np.sort(weights[candidates])[None, ::-1]
    (last,) = _crossing(descending, _block_ends(descending), np.array([wanted]))
    return candidates[_most_probable(values[candidates], last + 1)]


def _by_rank(values: FloatArray, count: int) -> IntArray:
    """Indices of the `count` largest of [n], largest first; among equals the lower index first."""
    chosen = _most_probable(values, count)
    return chosen[np.argsort(-values[chosen], kind="stable")]


def _most_probable(values: FloatArray, count: int) -> IntArray:
    """Indices, ascending, of the `count` largest of [n]; among equals the lower indices."""
    n = len(values)
    if count >= n:
        return np.arange(n)
    if count == 0:
        return np.empty(0, np.int64)
    smallest = np.partition(values, n - count)[n - count]
    chosen = values > smallest
    chosen[np.flatnonzero(values == smallest)[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def _block_ends(weights: FloatArray) -> npt.NDArray[np.float64]:
    """Running sums of [m, n] at the ends of blocks; at every token they would cost several times the softmax."""
    blocks = np.add.reduceat(weights, np.arange(0, weights.shape[1], _SUM_BLOCK), axis=1)
    return np.cumsum(blocks, axis=1, dtype=np.float64)


def _crossing(weights: FloatArray, ends: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> IntArray:
    """Per row of [m, n] the first index where the running sum exceeds the target; if rounding leaves none, the last
    that adds to the sum."""
    m, n = weights.shape
    block = _first_above(ends, targets)
    before = np.where(block > 0, ends[np.arange(m), block - 1], 0)
    indices = block[:, None] * _SUM_BLOCK + np.arange(min(_SUM_BLOCK, n))
    inside = np.take_along_axis(weights, np.minimum(indices, n - 1), axis=1) * (indices < n)
    return block * _SUM_BLOCK + _first_above(np.cumsum(inside, axis=1, dtype=np.float64), targets - before)


def _first_above(running_sums: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> IntArray:
    above = np.count_nonzero(running_sums <= targets[:, None], axis=1)
    first: IntArray = np.minimum(above, np.count_nonzero(running_sums < running_sums[:, -1:], axis=1))
    return first
