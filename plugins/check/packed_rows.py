"""What PackedLooseAccept has to give, in NumPy, and random steps of a TensorRT-LLM engine to compare it with.

A step is laid out as TensorRT-LLM 1.2 lays it out (cpp/tensorrt_llm/batch_manager/runtimeBuffers.cpp): context requests
first, each with a chunk of its prompt and, behind the last chunk, its draft tokens; then one token for each generation
request. What stands is decided by fly_trt's own rule, sequence by sequence.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))  # fly_trt, where it is not installed

from fly_trt.verification.fly import FlyPolicy, accept
from kernel_library import Array, Kernels, PackedPolicy, PackedStep
from logit_rows import decode, encode, entropy_gate

GATE_MARGIN = 1e-3  # thresholds of random steps stay this far from every entropy, beyond the kernels' tolerance
LEAST_RAISE, RELATIVE_RAISE = np.float32(1), np.float32(1 / 64)
NO_CHOICE = -(2**40)  # equal to no draft, whatever its 32 bits


@dataclass(frozen=True)
class PackedSequence:
    """Where one sequence of a step is: its rows [first_row, first_row + num_drafts + 1) and its draft tokens."""

    first_row: int
    drafts: Array

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + len(self.drafts) + 1)


@dataclass(frozen=True)
class Judged:
    """A sequence's choices, gates and what the rule accepts of its drafts."""

    sequence: PackedSequence
    choices: Array
    gate: Array
    num_accepted: int


def sequences_of(step: PackedStep, num_contexts: int) -> list[PackedSequence]:
    """The step's sequences, of which the first num_contexts are context requests, as their request types say."""
    found, begin, row = [], 0, 0
    for index, length in enumerate(step.context_lengths):
        end = begin + (int(length) if index < num_contexts else 1)
        first = row
        while step.last_token_ids[row] < end:
            row += 1
        row += 1
        found.append(PackedSequence(first, step.input_ids[step.last_token_ids[first : row - 1]]))
        begin = end
    return found


def judge(step: PackedStep, policy: PackedPolicy, num_contexts: int) -> list[Judged]:
    vocab_size = policy.vocab_size or step.logits.shape[1]
    tokens = np.ascontiguousarray(step.logits[:, :vocab_size])
    found = entropy_gate(tokens, np.zeros(len(tokens), np.int64), policy.entropy_top_k)
    has_nan = np.isnan(decode(tokens)).any(axis=1)
    choices = np.where(has_nan, NO_CHOICE, found["argmax"])
    gate = found["entropy" if policy.use_full_entropy else "entropy_topk"]
    gate = np.where(np.isfinite(decode(raised(tokens))), gate, np.nan)
    rule = FlyPolicy(policy.entropy_threshold, policy.use_full_entropy, policy.window, policy.lookahead)
    judged = []
    for sequence in sequences_of(step, num_contexts):
        n, drafts = len(sequence.drafts), sequence.drafts.astype(np.int64)
        is_token = (drafts >= 0) & (drafts < vocab_size)
        own = np.where(is_token, gate[sequence.rows][:n], np.nan)
        verdict = accept(drafts, choices[sequence.rows], own, rule, frozenset(policy.stop_token_ids))
        judged.append(Judged(sequence, choices[sequence.rows], own, verdict.num_accepted))
    return judged


def raised(tokens: Array) -> Array:
    """What a loosened draft token's logit becomes in each row [R], in the logits' own type; inf without room for it."""
    values = decode(tokens)
    maximum = np.where(np.isnan(values), -np.inf, values).max(axis=1).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return encode(maximum + np.maximum(LEAST_RAISE, np.abs(maximum) * RELATIVE_RAISE), _dtype_name(tokens))


def rewritten(step: PackedStep, policy: PackedPolicy, judged: list[Judged]) -> Array:
    """The logits with the accepted draft tokens that are not the target's choice raised."""
    result = step.logits.copy()
    highest = raised(step.logits[:, : policy.vocab_size or None])
    for item in judged:
        for j, token in enumerate(item.sequence.drafts[: item.num_accepted]):
            if token != item.choices[j]:
                row = item.sequence.first_row + j
                result[row, token] = highest[row]
    return result


def stock_accepted(logits: Array, vocab_size: int, sequence: PackedSequence) -> int:
    """How many drafts a runtime takes that compares each with the largest logit of its row; none with a NaN in it."""
    for j, token in enumerate(sequence.drafts):
        values = decode(logits[sequence.first_row + j, :vocab_size])
        if np.isnan(values).any() or values.argmax() != token:
            return j
    return len(sequence.drafts)


def _dtype_name(logits: Array) -> str:
    return "bfloat16" if logits.dtype == np.uint16 else logits.dtype.name


def random_step(
    rng: np.random.Generator, vocab_size: int, row_size: int, dtype: str, max_contexts: int = 5, max_drafts: int = 70
) -> tuple[PackedStep, int]:
    """A mixed batch with drafts that mostly agree, in rows of any uncertainty, and the number of its context requests.

    Some rows have a NaN, an infinity or maxima that leave no room above them; some drafts are no tokens.
    """
    num_contexts, num_generations = int(rng.integers(0, max_contexts + 1)), int(rng.integers(0, 5))
    num_contexts += num_contexts + num_generations == 0
    chunks = rng.choice([1, 1, 2, 7, 40], num_contexts)
    counts = rng.choice([0, 1, 3, 8, 16, 33, 70], num_contexts, p=[0.2, 0.1, 0.15, 0.25, 0.2, 0.06, 0.04])
    counts = np.minimum(counts, max_drafts)
    num_rows = int(counts.sum()) + num_contexts + num_generations
    scale = rng.choice([0.05, 1, 3, 8], (num_rows, 1))
    values = rng.normal(size=(num_rows, row_size)) * scale + rng.choice([0, 0, 30, -40])
    _spoil_rows(rng, values, vocab_size)
    logits = encode(values, dtype)
    known = decode(logits[:, :vocab_size])
    best = np.where(np.isnan(known).any(axis=1), 0, np.nan_to_num(known, nan=-np.inf).argmax(axis=1))
    pieces, last_token_ids, row, length = [], [], 0, 0
    for chunk, count in zip(chunks, counts, strict=True):
        changed = rng.random(count) < rng.choice([0, 0.05, 0.15, 0.4])
        drafts = np.where(changed, rng.integers(0, vocab_size, count), best[row : row + count])
        drafts = np.where(rng.random(count) < 0.01, rng.choice([-1, vocab_size, row_size, 2**31 - 1]), drafts)
        pieces += [rng.integers(0, vocab_size, chunk), drafts]
        last_token_ids += [*range(length + int(chunk), length + int(chunk + count) + 1)]
        row, length = row + int(count) + 1, length + int(chunk + count)
    pieces.append(rng.integers(0, vocab_size, num_generations))
    last_token_ids += range(length + 1, length + num_generations + 1)
    prompts = rng.integers(1, 500, num_generations)  # of a generation request it is the length of its prompt
    step = PackedStep(
        logits,
        np.array(last_token_ids, np.int32),
        np.concatenate(pieces).astype(np.int32),
        np.concatenate([chunks + counts, prompts]).astype(np.int32),
    )
    return step, num_contexts


def _spoil_rows(rng: np.random.Generator, values: Array, vocab_size: int) -> None:
    values[:, vocab_size:] = rng.choice([0, 100, np.nan, np.inf])  # what stands in padding never counts
    for row in np.flatnonzero(rng.random(len(values)) < 0.04):
        kind = rng.choice(["nan", "inf", "masked", "ties", "high"])
        if kind == "nan":
            values[row, rng.integers(vocab_size)] = np.nan
        elif kind == "inf":
            values[row, rng.integers(vocab_size)] = np.inf
        elif kind == "masked":
            values[row, rng.random(values.shape[1]) < 0.9] = -np.inf
        elif kind == "ties":
            values[row] = np.round(values[row])
        else:
            values[row] += 65_000


def random_policy(rng: np.random.Generator, step: PackedStep, vocab_size: int) -> PackedPolicy:
    """A policy whose threshold no entropy of the step comes near."""
    use_full_entropy, top_k = bool(rng.integers(2)), int(rng.integers(1, min(8, vocab_size) + 1))
    tokens = np.ascontiguousarray(step.logits[:, :vocab_size])
    found = entropy_gate(tokens, np.zeros(len(tokens), np.int64), top_k)[
        "entropy" if use_full_entropy else "entropy_topk"
    ]
    threshold = float(rng.choice([0, 0.1, 0.3, 1.0, np.inf]))
    while (
        np.isfinite(threshold) and (np.abs(found - threshold) < GATE_MARGIN * max(1, threshold)).any() and threshold > 0
    ):
        threshold += 0.0137
    return PackedPolicy(
        threshold,
        use_full_entropy,
        top_k,
        window=int(rng.choice([0, 1, 3, 6])),
        lookahead=int(rng.choice([0, 1, 2, 5])),
        vocab_size=vocab_size if vocab_size != step.logits.shape[1] or rng.random() < 0.5 else 0,
        stop_token_ids=[(), (-1,), tuple(rng.integers(0, vocab_size, 3).tolist())][rng.integers(3)],
    )


@dataclass(frozen=True)
class PackedCase:
    """A step, its policy, and by how many elements the logits begin after an aligned address."""

    name: str
    step: PackedStep
    num_contexts: int
    policy: PackedPolicy
    offset: int
    in_place: bool

    @classmethod
    def random(cls, rng: np.random.Generator) -> "PackedCase":
        """Mostly of small vocabularies; a few have several chunks of one and fewer rows."""
        if rng.random() < 0.03:
            return cls.of_vocabulary(rng, int(rng.integers(4000, 20_000)), max_contexts=2, max_drafts=8)
        return cls.of_vocabulary(rng, int(rng.integers(2, 300)))

    @classmethod
    def of_vocabulary(cls, rng: np.random.Generator, vocab_size: int, **limits: int) -> "PackedCase":
        dtype = str(rng.choice(["float32", "float16", "bfloat16"]))
        row_size = vocab_size + int(rng.choice([0, 0, 1, 5, 64]))
        step, num_contexts = random_step(rng, vocab_size, row_size, dtype, **limits)
        policy = random_policy(rng, step, vocab_size)
        offset = int(rng.integers(0, 9)) if rng.random() < 0.5 else 0
        name = f"{dtype} {step.logits.shape}, {num_contexts} of {len(step.context_lengths)} contexts, {policy}"
        return cls(name, step, num_contexts, policy, offset, bool(rng.integers(2)))

    @property
    def vocab_size(self) -> int:
        return self.policy.vocab_size or self.step.logits.shape[1]

    def judged(self) -> list[Judged]:
        return judge(self.step, self.policy, self.num_contexts)

    def mismatches(self, kernels: Kernels) -> list[str]:
        judged = self.judged()
        found = kernels.packed_loose_accept(self.step, self.policy, self.offset, in_place=self.in_place)
        problems = []
        if found.tobytes() != rewritten(self.step, self.policy, judged).tobytes():
            problems.append(f"PackedLooseAccept, {self.name}: other logits than expected")
        for index, item in enumerate(judged):
            accepted = stock_accepted(found, self.vocab_size, item.sequence)
            if accepted != item.num_accepted:
                problems.append(
                    f"PackedLooseAccept, {self.name}: of sequence {index} {accepted} drafts are accepted, expected "
                    f"{item.num_accepted}"
                )
        return problems
