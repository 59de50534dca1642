"""An engine without a model: its next token is a function of the tokens so far.

It keeps the tokens of each slot as a real engine keeps its cache, refuses a step that reads what was never written, and
decides with the reference rule, so that loops and drafters can be tested on any acceptance pattern.
"""

from collections.abc import Callable

import numpy as np

from fly_trt.engines.base import AcceptancePolicy, EngineInfo, Step
from fly_trt.engines.onnxruntime import ROW_INPUTS, TOKEN_OUTPUTS
from fly_trt.verification import accept

VOCAB_SIZE = 32
STOP_TOKEN = 1

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
    ) -> None:
        self.info = EngineInfo(
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            max_draft_len=32,
            max_num_tokens=max_num_tokens,
            vocab_size=vocab_size,
            entropy_top_k=3,
            stop_token_ids=frozenset({STOP_TOKEN}),
        )
        self.num_runs = 0
        self.closed = False
        self._next_token = next_token
        self._entropy = entropy
        self._logits = logits
        self.slots: list[list[int]] = [[] for _ in range(max_batch_size)]  # the tokens that each slot's cache holds
        self.shapes: list[tuple[int, int, int]] = []  # first slot, rows and tokens of every step

    def step(self, first_slot: int, batch_size: int, num_tokens: int, *, with_logits: bool = False) -> Step:
        assert 0 <= first_slot < first_slot + batch_size <= len(self.slots), "the slots exist"
        rows = {name: np.zeros(batch_size, dtype) for name, dtype in ROW_INPUTS.items()}
        tokens = {name: np.zeros((batch_size, num_tokens), dtype) for name, dtype in TOKEN_OUTPUTS.items()}
        return Step(
            first_slot=first_slot,
            input_ids=np.zeros((batch_size, num_tokens), np.int64),
            num_accepted=np.zeros(batch_size, np.int64),
            next_token=np.zeros(batch_size, np.int64),
            logits=np.zeros((batch_size, num_tokens, self.info.vocab_size), np.float32) if with_logits else None,
            **rows,
            **tokens,
        )

    def run(self, step: Step) -> None:
        self.num_runs += 1
        self.shapes.append((step.first_slot, *step.input_ids.shape))
        for row, ids in enumerate(step.input_ids):
            self._run_row(step, row, ids.tolist())

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        assert num_tokens <= len(self.slots[source]), "what is copied was computed"
        self.slots[target] = self.slots[source][:num_tokens]

    def swap_slots(self, first: int, second: int, num_tokens: int) -> None:
        a, b = self.slots[first][:num_tokens], self.slots[second][:num_tokens]
        self.slots[first], self.slots[second] = b, a

    def trim(self, num_tokens: int) -> int:
        return self.info.max_seq_len

    def close(self) -> None:
        self.closed = True

    def _logits_of(self, prefix: tuple[int, ...]) -> np.ndarray:
        logits = self._logits or one_hot_logits(self._next_token, self.info.vocab_size)
        return logits(prefix)

    def _run_row(self, step: Step, row: int, ids: list[int]) -> None:
        slot = self.slots[step.first_slot + row]
        cached, context, drafts = (int(a[row]) for a in (step.write_indices, step.num_context, step.num_draft))
        assert context >= 1, "a row has at least one context token"
        assert context + drafts <= len(ids), "context and drafts fit the row"
        assert cached <= len(slot), "the cache holds every token before the write index"
        assert all(0 <= token < self.info.vocab_size for token in ids), "token ids are in the vocabulary"
        slot[cached:] = ids
        for t in range(len(ids)):
            prefix = tuple(slot[: cached + t + 1])
            step.argmax[row, t] = self._next_token(prefix)
            step.entropy_topk[row, t] = step.entropy[row, t] = self._entropy(prefix)
            if step.logits is not None:
                step.logits[row, t] = self._logits_of(prefix)
        policy = AcceptancePolicy(
            entropy_threshold=float(step.entropy_threshold[row]),
            use_full_entropy=bool(step.use_full_entropy[row]),
            window=int(step.window[row]),
            lookahead=int(step.lookahead[row]),
        )
        draft = step.input_ids[row, context : context + drafts]
        argmax = step.argmax[row, context - 1 : context + drafts]
        gate = step.entropy_topk[row, context - 1 : context + drafts]
        verdict = accept(draft, argmax, gate, policy, self.info.stop_token_ids)
        step.num_accepted[row], step.next_token[row] = verdict.num_accepted, verdict.next_token
        del slot[cached + context + drafts :]


def one_hot_logits(next_token: NextToken, vocab_size: int = VOCAB_SIZE) -> Logits:
    """Logits whose argmax is the table's token."""
    return lambda tokens: 8.0 * (np.arange(vocab_size) == next_token(tokens))


def greedy(next_token: NextToken, prompt: list[int], num_tokens: int) -> list[int]:
    """What plain decoding emits after `prompt`."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tuple(tokens)))
    return tokens[len(prompt) :]
