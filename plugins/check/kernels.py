"""Checks the plugins' kernels against NumPy and, on a GPU, measures how fast they read the logits.

usage: plugins/check/kernels.py [--cpu] [--cases 60] [--seed 0] [--json]

Without --cpu it builds the kernels with nvcc for this machine's GPU, needs torch, compares random rows with NumPy in
float64 and prints timings. With --cpu it compares only, on a build of the same sources by g++. Integers must be equal,
entropies and log probabilities within 1e-3 relative or 1e-5 absolute. The exit status is 1 after a mismatch.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernel_library import GATE_OUTPUTS, Array, Kernels, load_cpu_kernels, load_gpu_kernels
from logit_rows import ANY_TOKEN, encode, entropy_gate
from packed_rows import PackedCase

RELATIVE, ABSOLUTE = 1e-3, 1e-5
MAX_TOP_K = 8


def loose_window_accept(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What LooseWindowAccept has to find: build/fly_build/head.py's ONNX function in NumPy, indices kept in the row."""
    tokens, argmax = inputs["next_tokens"], inputs["argmax"]
    batch_size, length = argmax.shape
    column = {name: array[:, None] for name, array in inputs.items() if array.shape == (batch_size,)}
    position = np.arange(length)[None]
    begin = column["num_context"] - 1
    end = begin + column["num_draft"]
    is_draft = (position >= begin) & (position < end)
    mismatch = is_draft & (tokens != argmax)
    gate = np.where(column["use_full_entropy"], inputs["entropy"], inputs["entropy_topk"])
    uncertain = gate >= column["entropy_threshold"]
    num_mismatches = mismatch.cumsum(-1)
    last_ahead = _index(np.minimum(position + column["lookahead"], length - 1), length)
    agrees_ahead = np.take_along_axis(num_mismatches, last_ahead, -1) == num_mismatches
    has_room = position + np.maximum(column["window"], column["lookahead"]) < end
    is_stop = np.isin(tokens, inputs["stop_token_ids"]) | np.isin(argmax, inputs["stop_token_ids"])
    loosened = mismatch & uncertain & ~is_stop & agrees_ahead & has_room
    num_rejected = (mismatch & ~loosened).cumsum(-1)
    num_accepted = (is_draft & (num_rejected == 0)).sum(-1)
    following = _index(begin + num_accepted[:, None], length)
    return {"num_accepted": num_accepted, "next_token": np.take_along_axis(argmax, following, -1)[:, 0]}


def _index(index: Array, length: int) -> Array:
    return np.clip(np.where(index < 0, index + length, index), 0, length - 1)


@dataclass(frozen=True)
class GateCase:
    """Rows of logits, the tokens asked for, and by how many elements the rows begin after an aligned address."""

    name: str
    logits: Array
    next_tokens: Array
    top_k: int
    offset: int

    @classmethod
    def random(cls, rng: np.random.Generator, max_vocab_size: int = 140_000) -> "GateCase":
        dtype = str(rng.choice(["float32", "float16", "bfloat16"]))
        vocab_size = int(np.exp(rng.uniform(0, np.log(max_vocab_size)))) + int(rng.integers(0, 8))
        num_rows = int(rng.integers(1, 6))
        values = rng.normal(size=(num_rows, vocab_size)) * rng.choice([0.01, 1, 3, 12]) + rng.choice([0, 0, 20, -50])
        special = str(rng.choice(["none", "ties", "masked", "lowest", "bad", "equal", "confident", "huge"]))
        for row in values:
            _spoil(rng, row, special, np.finfo(np.float16 if dtype == "float16" else np.float32).min)
        tokens = rng.integers(0, vocab_size, num_rows)
        strange = rng.choice([-1, vocab_size, 2**62, -(2**63)], num_rows)
        tokens = np.where(rng.random(num_rows) < 0.1, strange, tokens)
        top_k = int(rng.integers(1, min(MAX_TOP_K, vocab_size) + 1))
        offset = int(rng.integers(0, 9)) if rng.random() < 0.5 else 0
        name = f"{dtype} {num_rows} x {vocab_size} {special} top {top_k} offset {offset}"
        return cls(name, encode(values, dtype), tokens, top_k, offset)

    def mismatches(self, kernels: Kernels) -> list[str]:
        found = kernels.entropy_gate(self.logits, self.next_tokens, self.top_k, self.offset)
        wanted = entropy_gate(self.logits, self.next_tokens, self.top_k)
        problems = []
        ids = found["top_ids"]
        wanted["top_ids"] = np.where((wanted["top_ids"] == ANY_TOKEN) & self._are_tokens(ids), ids, wanted["top_ids"])
        for name, want in wanted.items():
            exact = GATE_OUTPUTS[name] is np.int64
            tolerances = {"rtol": 0, "atol": 0} if exact else {"rtol": RELATIVE, "atol": ABSOLUTE}
            if not np.allclose(found[name], want, equal_nan=True, **tolerances):
                problems.append(f"EntropyGate, {self.name}: {name} is {found[name]}, expected {want}")
        return problems

    def _are_tokens(self, ids: Array) -> Array:
        return (ids >= 0) & (ids < self.logits.shape[1])


def _spoil(rng: np.random.Generator, row: Array, special: str, lowest: float) -> None:
    """Makes a random row one of the cases that are easily got wrong."""
    some = rng.random(len(row))
    if special == "ties":
        row[:] = np.round(row)
        row[some < 3 / len(row)] = row.max()
    elif special == "masked":
        row[some < rng.choice([0.1, 0.999])] = -np.inf
    elif special == "lowest":
        row[: rng.integers(len(row) + 1)] = lowest
    elif special == "bad":
        kind = rng.choice([np.nan, np.inf, -np.inf])
        row[some < (1 if kind < 0 else rng.choice([0.5, 1 / len(row)]))] = kind
        row[some > 1 - 1 / len(row)] = rng.choice([np.nan, 0.0])
    elif special == "equal":
        row[:] = row[0]
    elif special == "confident":
        row[rng.integers(len(row))] += 40
    elif special == "huge":
        row[:] = np.round(row + rng.choice([-20, 0, 20])) * 10 ** rng.uniform(3, rng.choice([9, 38]))


def random_accept_inputs(rng: np.random.Generator, strange: bool) -> dict[str, Array]:
    """A batch of rows with mostly agreeing drafts; with `strange`, parameters that no scheduler would give."""
    batch_size, length = int(rng.integers(1, 9)), int(rng.choice([1, 2, 7, 26, 33, 64, 97, 300]))
    argmax = rng.integers(0, 50, (batch_size, length))
    changed = rng.random(argmax.shape) < rng.choice([0, 0.02, 0.1, 0.3])
    tokens = np.where(changed, rng.integers(0, 50, argmax.shape), argmax)
    entropies = rng.choice([0, 0.3, 0.5, 2.0, np.nan], (2, batch_size, length), p=[0.1, 0.2, 0.35, 0.3, 0.05])
    num_context = rng.integers(1, length + 1, batch_size)
    num_draft = (rng.random(batch_size) * (length - num_context + 1)).astype(np.int64)
    window, lookahead = rng.integers(0, 9, batch_size), rng.integers(0, 9, batch_size)
    if strange:
        num_context = rng.integers(-2, length + 4, batch_size)
        num_draft = rng.integers(-2, 2 * length + 2, batch_size)
        window, lookahead = rng.integers(-3, length + 5, batch_size), rng.integers(-3, length + 5, batch_size)
    return {
        "next_tokens": tokens,
        "argmax": argmax,
        "entropy": entropies[0].astype(np.float32),
        "entropy_topk": entropies[1].astype(np.float32),
        "num_context": num_context,
        "num_draft": num_draft,
        "entropy_threshold": rng.choice([0, 0.3, 1, np.inf, np.nan], batch_size).astype(np.float32),
        "use_full_entropy": rng.integers(0, 2, batch_size).astype(np.int32),
        "window": window,
        "lookahead": lookahead,
        "stop_token_ids": np.array([[-1], [7], [3, 7, 11], []][rng.integers(4)], np.int64),
    }


def accept_mismatches(kernels: Kernels, inputs: Mapping[str, Array]) -> list[str]:
    found, wanted = kernels.loose_window_accept(inputs), loose_window_accept(inputs)
    return [
        f"LooseWindowAccept, {inputs['argmax'].shape}: {name} is {found[name]}, expected {want}"
        for name, want in wanted.items()
        if not np.array_equal(found[name], want)
    ]


def compare(kernels: Kernels, num_cases: int, seed: int) -> Iterator[list[str]]:
    """For each case what is wrong with the kernels' results, if anything."""
    rng = np.random.default_rng(seed)
    for case in range(num_cases):
        yield GateCase.random(rng).mismatches(kernels)
        yield accept_mismatches(kernels, random_accept_inputs(rng, strange=case % 2 == 1))
        yield PackedCase.random(rng).mismatches(kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="compare on a CPU, without CUDA")
    parser.add_argument("--cases", type=int, default=60, help="random cases for each kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kernels = (load_cpu_kernels if args.cpu else load_gpu_kernels)(Path(folder))
        results = list(compare(kernels, args.cases, args.seed))
        problems = [problem for result in results for problem in result]
        report: dict[str, Any] = {"cases": len(results), "mismatches": problems}
        if not args.cpu:
            from kernel_timing import measure

            report |= measure(kernels)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print(*problems, sep="\n", end="\n" if problems else "")
        print(f"{len(results)} cases, {sum(map(bool, results))} with mismatches")
        if not args.cpu:
            from kernel_timing import show

            show(report)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
