"""An engine without a model: its next token is a function of the tokens so far.

It keeps the tokens of each slot as a real engine keeps its cache, refuses a step that reads what was never written,
uses a shape's buffers again, and decides with the reference rule, so that loops and drafters can be tested on any
acceptance pattern. A position that is no number (its entropy is not, or its logits are not) spoils the whole row, and
every later step of the slot until it is written over or cleared. It gives no more than an engine promises: a step has
nothing of positions that were not asked for, what it says of its padding is not a number (no token has the id -1), nor
are the full entropies of a step in which no row uses them, nor the logits of an earlier step once others are asked for;
and what it says of a spoilt row looks right where it is no float.

What it was asked to do is recorded: `shapes` of the steps, `copies` and `swaps` of slots, `trims`, and the positions of
steps with logits and with the most probable tokens.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from fly_trt.engines.base import (
    POSITION_INPUTS,
    ROW_INPUTS,
    TOKEN_OUTPUTS,
    TOP_OUTPUTS,
    EngineInfo,
    Step,
    StepCache,
    StepShape,
)
from fly_trt.verification import FlyPolicy, accept

VOCAB_SIZE = 32
MAX_STEPS = 10_000
CERTAIN_LOGIT = 8.0  # of the table's token, where no logits are given; the others have 0
FULL_ENTROPY = 2.0  # how much larger the entropy of the whole vocabulary is than that of its most probable tokens
STOP_TOKEN = 1
NO_TOKEN = -1  # what an older engine says follows the last position of a row

NextToken = Callable[[tuple[int, ...]], int]
Entropy = Callable[[tuple[int, ...]], float]
Logits = Callable[[tuple[int, ...]], np.ndarray]


def hashed(vocab_size: int, salt: int, order: int = 2) -> NextToken:
    """A deterministic language of `order` tokens of memory that never emits tokens 0 and 1."""
    return lambda tokens: 2 + hash((salt, *tokens[-order:])) % (vocab_size - 2)


class TableEngine:
    def __init__(
        self,
        next_token: NextToken,
        *,
        entropy: Entropy = lambda tokens: 0.0,
        logits: Logits | None = None,
        vocab_size: int = VOCAB_SIZE,
        max_batch_size: int = 4,
        max_num_tokens: int = 16,
        max_seq_len: int = 256,
        trim_block: int | None = None,
        has_top_tokens: bool = True,
        has_positions: bool = True,
        has_windows: bool = False,
    ) -> None:
        """trim_block: trimming leaves whole blocks of so many tokens in each slot; None leaves everything. has_windows:
        what is no number spoils its own position alone, as where others do not see it."""
        self.info = EngineInfo(
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            max_draft_len=32,
            max_num_tokens=max_num_tokens,
            vocab_size=vocab_size,
            entropy_top_k=3,
            stop_token_ids=frozenset({STOP_TOKEN}),
            has_top_tokens=has_top_tokens,
            has_positions=has_positions,
        )
        self.num_preparations = 0
        self.closed = False
        self._trim_block = trim_block
        self._has_windows = has_windows
        self._next_token = next_token
        self._entropy = entropy
        self._logits = logits
        self.slots: list[list[int]] = [[] for _ in range(max_batch_size)]  # the tokens that each slot's cache holds
        self._spoilt: list[set[int]] = [set() for _ in range(max_batch_size)]  # where its memory holds no numbers
        self.shapes: list[tuple[int, int, int]] = []  # first slot, rows and tokens of every step
        self.copies: list[tuple[int, int, int]] = []  # source, target and tokens
        self.swaps: list[tuple[int, int, int]] = []  # two slots and tokens
        self.trims: list[int] = []  # tokens that were still needed
        self.num_positions: list[int] = []  # of a row of every step
        self.logits_shapes: list[tuple[int, int]] = []  # rows and positions of every step with logits
        self.top_shapes: list[tuple[int, int]] = []  # of every step with the most probable tokens
        self._steps = StepCache(self.info, max_batch_size, MAX_STEPS)
        self._last_logits = np.empty(0, np.float32)

    @property
    def num_runs(self) -> int:
        return len(self.shapes)

    def step(
        self,
        first_slot: int,
        batch_size: int,
        num_tokens: int,
        *,
        num_positions: int | None = None,
        with_logits: bool = False,
        with_top: bool = False,
    ) -> Step:
        assert 0 <= first_slot < first_slot + batch_size <= len(self.slots), "the slots exist"
        shape = StepShape.of(self.info, first_slot, batch_size, num_tokens, num_positions, with_logits, with_top)
        step = self._steps.get(shape, self._make_step)
        if step.logits is not None:
            self._last_logits[:] = np.nan  # one buffer for all: what it held is gone
            self._last_logits = step.logits.reshape(-1)
        return step

    def run(self, step: Step) -> None:
        shape = (step.first_slot, *step.input_ids.shape)
        self.num_preparations += shape not in self.shapes  # as engines bind a shape when they meet it
        self.shapes.append(shape)
        self.num_positions.append(step.num_positions)
        if step.logits is not None:
            self.logits_shapes.append(step.logits.shape[:2])
        if step.top_ids is not None:
            self.top_shapes.append(step.top_ids.shape[:2])
        for row, ids in enumerate(step.input_ids):
            self._run_row(step, row, ids.tolist())

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        assert num_tokens <= len(self.slots[source]), "what is copied was computed"
        self.copies.append((source, target, num_tokens))
        self.slots[target] = self.slots[source][:num_tokens]
        self._spoilt[target] = {at for at in self._spoilt[target] if at >= num_tokens} | {
            at for at in self._spoilt[source] if at < num_tokens
        }

    def swap_slots(self, first: int, second: int, num_tokens: int) -> None:
        self.swaps.append((first, second, num_tokens))
        a, b = self.slots[first][:num_tokens], self.slots[second][:num_tokens]
        self.slots[first], self.slots[second] = b, a
        a, b = self._spoilt[first], self._spoilt[second]
        for slot, own, others in ((first, a, b), (second, b, a)):
            self._spoilt[slot] = {at for at in own if at >= num_tokens} | {at for at in others if at < num_tokens}

    def clear_slot(self, slot: int, start: int) -> None:
        del self.slots[slot][start:]
        self._spoilt[slot] = {at for at in self._spoilt[slot] if at < start}

    def trim(self, num_tokens: int) -> int:
        self.trims.append(num_tokens)
        if self._trim_block is None:
            return self.info.max_seq_len
        held = -(-num_tokens // self._trim_block) * self._trim_block
        self.slots = [slot[:held] for slot in self.slots]
        return held

    def close(self) -> None:
        self.closed = True

    def _make_step(self, shape: StepShape) -> Step:
        sizes = batch_size, num_positions = shape.batch_size, shape.num_positions
        rows = {name: np.zeros(batch_size, dtype) for name, dtype in ROW_INPUTS.items()}
        of_positions = TOKEN_OUTPUTS | (POSITION_INPUTS if self.info.has_positions else {})
        positions = {name: np.zeros(sizes, dtype) for name, dtype in of_positions.items()}
        ranks = (batch_size, num_positions, self.info.entropy_top_k)
        top = {name: np.zeros(ranks, dtype) for name, dtype in TOP_OUTPUTS.items()} if shape.with_top else {}
        return Step(
            first_slot=shape.first_slot,
            input_ids=np.zeros((batch_size, shape.num_tokens), np.int64),
            num_accepted=np.zeros(batch_size, np.int64),
            next_token=np.zeros(batch_size, np.int64),
            logits=np.zeros((*sizes, self.info.vocab_size), np.float32) if shape.with_logits else None,
            **rows,
            **positions,
            **top,
        )

    def _logits_of(self, prefix: tuple[int, ...]) -> np.ndarray:
        logits = self._logits or one_hot_logits(self._next_token, self.info.vocab_size)
        return logits(prefix)

    def _logprobs(self, argmax: int, logits: np.ndarray | None, following: int | None) -> tuple[float, float]:
        """Log-probabilities of the largest and of the token that follows in the row, if there is one."""
        if logits is None:
            log_sum = np.log(np.exp(CERTAIN_LOGIT) + self.info.vocab_size - 1)
            largest, token = CERTAIN_LOGIT, CERTAIN_LOGIT if following == argmax else 0.0
        else:
            largest = logits.max()
            with np.errstate(invalid="ignore"):  # of logits that are no numbers
                log_sum = largest + np.log(np.exp(logits - largest).sum())
            token = np.nan if following is None else logits[following]
        return largest - log_sum, np.nan if following is None else token - log_sum

    def _top(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The most probable tokens, the lowest id first among equals, and their log-probabilities."""
        ids = np.argsort(-logits, kind="stable")[: self.info.entropy_top_k]
        with np.errstate(invalid="ignore"):  # of logits that are no numbers
            return ids, logits[ids] - (logits.max() + np.log(np.exp(logits - logits.max()).sum()))

    def _run_row(self, step: Step, row: int, ids: list[int]) -> None:
        slot = self.slots[step.first_slot + row]
        cached, context, drafts = (int(a[row]) for a in (step.write_indices, step.num_context, step.num_draft))
        positions, following = self._asked(step, row, ids)
        context += positions[0]
        assert context > positions[0], "a row has at least one context token, and speaks of the last one"
        assert context + drafts <= len(ids), "context and drafts fit the row"
        assert cached <= len(slot), "the cache holds every token before the write index"
        assert all(0 <= token < self.info.vocab_size for token in ids), "token ids are in the vocabulary"
        slot[cached:] = ids
        spoilt = self._spoilt[step.first_slot + row]
        spoilt.difference_update(range(cached, cached + len(ids)))
        for t in range(context + drafts):
            if self._is_no_number(tuple(slot[: cached + t + 1])):
                spoilt.add(cached + t)
        for at, (t, token) in enumerate(zip(positions, following, strict=True)):
            if t < context + drafts:
                self._say(step, row, at, tuple(slot[: cached + t + 1]), token if t + 1 < context + drafts else None)
            else:
                self._pad(step, row, at)
        if spoilt and not self._has_windows:
            for scores in (step.entropy_topk, step.argmax_logprob, step.token_logprob):
                scores[row] = np.nan
            for scores in (step.logits, step.top_logprobs):
                if scores is not None:
                    scores[row] = np.nan
        use_full_entropy = bool(step.use_full_entropy.any())
        step.entropy[row] = FULL_ENTROPY * step.entropy_topk[row] if use_full_entropy else np.nan
        self._decide(step, row, ids[context : context + drafts])
        del slot[cached + context + drafts :]

    def _asked(self, step: Step, row: int, ids: list[int]) -> tuple[list[int], list[int]]:
        """The positions that a row speaks of, and the tokens that it is told follow them."""
        if step.logits_positions is None or step.next_tokens is None:
            return list(range(len(ids))), [*ids[1:], NO_TOKEN]
        positions = (step.logits_positions[row] - row * len(ids)).tolist()
        first = positions[0]
        assert positions == [min(first + i, len(ids) - 1) for i in range(len(positions))], "in the row, one by one"
        return positions, step.next_tokens[row].tolist()

    def _is_no_number(self, prefix: tuple[int, ...]) -> bool:
        if np.isnan(self._entropy(prefix)):
            return True
        if self._logits is None:
            return False
        logits = self._logits(prefix)
        return bool(np.isnan(logits).any() or logits.max() == np.inf)

    def _pad(self, step: Step, row: int, at: int) -> None:
        step.argmax[row, at] = 0
        for scores in (step.entropy_topk, step.argmax_logprob, step.token_logprob, step.logits, step.top_logprobs):
            if scores is not None:
                scores[row, at] = np.nan
        if step.top_ids is not None:
            step.top_ids[row, at] = -1

    def _say(self, step: Step, row: int, at: int, prefix: tuple[int, ...], token: int | None) -> None:
        """Fills the outputs at one place, `token` being what follows there in the row, if anything."""
        logits = None if self._logits is None and step.logits is None else self._logits_of(prefix)
        step.argmax[row, at] = self._next_token(prefix)
        step.entropy_topk[row, at] = np.nan if self._is_no_number(prefix) else self._entropy(prefix)
        logprobs = self._logprobs(int(step.argmax[row, at]), logits, token)
        step.argmax_logprob[row, at], step.token_logprob[row, at] = logprobs
        if step.logits is not None:
            step.logits[row, at] = logits
        if step.top_ids is not None and step.top_logprobs is not None:
            step.top_ids[row, at], step.top_logprobs[row, at] = self._top(self._logits_of(prefix))

    def _decide(self, step: Step, row: int, draft: list[int]) -> None:
        policy = FlyPolicy(
            entropy_threshold=float(step.entropy_threshold[row]),
            use_full_entropy=bool(step.use_full_entropy[row]),
            window=int(step.window[row]),
            lookahead=int(step.lookahead[row]),
        )
        verified = slice(int(step.num_context[row]) - 1, int(step.num_context[row]) + len(draft))
        entropy = step.entropy if policy.use_full_entropy else step.entropy_topk
        verdict = accept(
            np.array(draft, np.int64),
            step.argmax[row, verified],
            entropy[row, verified],
            policy,
            self.info.stop_token_ids,
        )
        step.num_accepted[row], step.next_token[row] = verdict.num_accepted, verdict.next_token


def one_hot_logits(next_token: NextToken, vocab_size: int = VOCAB_SIZE) -> Logits:
    """Logits whose argmax is the table's token."""
    return lambda tokens: CERTAIN_LOGIT * (np.arange(vocab_size) == next_token(tokens))


def sometimes_differs(target: NextToken, salt: int, out_of: int = 5) -> NextToken:
    """A draft model that agrees with the target but at one prefix in `out_of`."""

    def draft(tokens: tuple[int, ...]) -> int:
        token = target(tokens)
        return token if hash((salt, tokens)) % out_of else 2 + (token - 1) % (VOCAB_SIZE - 2)

    return draft


def sometimes_uncertain(salt: int) -> Entropy:
    """Entropies below and above every preset's gate, by prefix."""
    return lambda tokens: 1.0 if hash((salt, tokens)) % 3 else 0.1


def spread_logits(salt: int, num_likely: int = 8) -> Logits:
    """Logits by the last two tokens that leave a few tokens a chance, sometimes the STOP_TOKEN."""

    @cache
    def after(last: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([salt, *last])
        logits = np.full(VOCAB_SIZE, -20, np.float32)
        logits[2 : 2 + num_likely] = 2 * rng.normal(size=num_likely)
        logits[STOP_TOKEN] = 5 * rng.random() ** 8
        return logits

    return lambda tokens: after(tokens[-2:])


def most_probable(logits: Logits) -> NextToken:
    """The table whose token is the logits' argmax."""
    return lambda tokens: int(logits(tokens).argmax())


def greedy(next_token: NextToken, prompt: list[int], num_tokens: int) -> list[int]:
    """What plain decoding emits after `prompt`."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tuple(tokens)))
    return tokens[len(prompt) :]
