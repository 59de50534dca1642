"""Checks FLy for TensorRT-LLM's one-model workers, torch operations, on a GPU: results, CUDA graphs, and time.

usage: plugins/check/torch_acceptance.py [--cpu] [--cases 200] [--seed 0] [--json]

Random batches are decided by `FlyAcceptance` on the device and by the rule for the host, from gates computed in
float64: launched one by one and, on a GPU, replayed from a CUDA graph whose inputs are overwritten, as a worker does.
Where an entropy is within 2e-5 nats of the threshold either answer counts. Then it times what the rule adds to a step,
with a worker's part, argmax and comparison, beside it. It needs torch and NumPy and nothing of TensorRT-LLM, whose
worker is stood for by the one method that matters; the exit status is 1 after a mismatch.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fly_trt.integrations.tensorrt_llm.acceptance import FlyAcceptance
from fly_trt.integrations.tensorrt_llm.environment import Acceptance
from fly_trt.verification.fly import PRESETS, FlyPolicy, accept
from fly_trt.verification.sampling import distribution, gate_entropy

TOLERANCE = 2e-5  # nats
TYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCAB_SIZES = (40, 1100, 32_000, 128_256)
TIMED = [(1, 15), (8, 15), (16, 15), (64, 15)]  # requests, and draft tokens of each
TIMED_VOCAB_SIZE = 128_256
REPLAYS = 21
CALLS = 20  # in a graph that is timed

Result = tuple[torch.Tensor, torch.Tensor]


class Worker:
    """What FlyAcceptance asks a worker for."""

    force_num_accepted_tokens = 0


class Metadata:
    """What it asks a step's metadata for: nothing that keeps it from deciding."""

    is_spec_dec_tree = False


def accept_exactly(
    worker: Worker, logits: torch.Tensor, draft: torch.Tensor, num_contexts: int, batch_size: int, metadata: Metadata
) -> Result:
    """A worker's own method: the target's tokens, and how many of the draft's are equal to them, and one more."""
    num_draft = draft.shape[1]
    choices = logits.argmax(-1).int()
    accepted = torch.zeros(batch_size, num_draft + 1, dtype=torch.int32, device=logits.device)
    accepted[:num_contexts, 0] = choices[:num_contexts]
    accepted[num_contexts:] = choices[num_contexts:].view(-1, num_draft + 1)
    num = torch.ones(batch_size, dtype=torch.int32, device=logits.device)
    num[num_contexts:] += (accepted[num_contexts:, :num_draft] == draft).int().cumprod(-1).sum(-1).int()
    return accepted, num


@dataclass
class Batch:
    """Logits and drafts of a step, contexts first, on the host."""

    logits: torch.Tensor
    draft: torch.Tensor
    num_contexts: int

    @property
    def num_gens(self) -> int:
        return len(self.draft)

    @classmethod
    def random(cls, rng: np.random.Generator, shape: tuple[int, int, int, int] | None = None) -> "Batch":
        """shape: contexts, requests, draft tokens, vocabulary."""
        num_contexts, num_gens, num_draft, vocab_size = shape or (
            int(rng.integers(0, 3)),
            int(rng.integers(1, 9)),
            int(rng.integers(4, 33)),
            int(rng.choice(VOCAB_SIZES)),
        )
        num_rows = num_contexts + num_gens * (num_draft + 1)
        scores = rng.standard_normal((num_rows, vocab_size), np.float32) * rng.choice([1, 4], (num_rows, 1))
        scores[np.arange(num_rows), rng.integers(0, vocab_size, num_rows)] += 30  # the target is certain, or torn
        torn = rng.random(num_rows) < 0.6
        scores[torn, rng.integers(0, vocab_size, torn.sum())] += 30
        if rng.random() < 0.2:
            scores[rng.random(scores.shape) < 0.4] = -math.inf
            scores[:, 0] = 0
        if rng.random() < 0.2:
            scores[rng.random(num_rows) < 0.1, rng.integers(vocab_size)] = rng.choice([math.nan, math.inf])
        logits = torch.from_numpy(scores.astype(np.float32)).to(TYPES[rng.integers(len(TYPES))])
        choices = logits.argmax(-1)[num_contexts:].reshape(num_gens, num_draft + 1).numpy()
        differs = rng.random((num_gens, num_draft)) < rng.choice([0.03, 0.06, 0.12])
        draft = np.where(differs, rng.integers(0, vocab_size, differs.shape), choices[:, :-1])
        return cls(logits, torch.from_numpy(draft.astype(np.int32)), num_contexts)

    def inputs(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logits.to(device), self.draft.to(device)


def random_rule(rng: np.random.Generator, vocab_size: int) -> Acceptance:
    preset = str(rng.choice(list(PRESETS)))
    own = rng.random() < 0.6
    most = 1.0 if preset == "paper" else 1.5
    threshold = float(rng.choice([0.0, rng.uniform(0, most)], p=[0.1, 0.9])) if own else None
    stops = rng.choice(min(vocab_size, 1000), int(rng.integers(0, 4)), replace=False).tolist()
    return Acceptance(preset, threshold, int(rng.integers(0, 9)) if own else None, tuple(stops))


def run(fly: FlyAcceptance, inputs: tuple[torch.Tensor, torch.Tensor], num_contexts: int) -> Result:
    logits, draft = inputs
    return fly(accept_exactly, Worker(), logits, draft, num_contexts, num_contexts + len(draft), Metadata())


def answers(batch: Batch, choices: np.ndarray, rule: Acceptance) -> list[set[tuple[int, ...]]]:
    """By request, the tokens that the host's rule emits given the device's choices: several where float32 does not tell
    entropy and threshold apart."""
    num_gens, num_draft = batch.draft.shape
    scores = batch.logits[batch.num_contexts :].float().numpy()
    policy = rule.policy(scores.shape[1])
    gates = gates_of(scores, policy).reshape(num_gens, num_draft + 1)
    drafts = batch.draft.numpy().astype(np.int64)
    scores = scores.reshape(num_gens, num_draft + 1, -1)
    found = []
    for draft, chosen, gate, rows in zip(drafts, choices.astype(np.int64), gates, scores, strict=True):
        gate[:-1][np.isneginf(rows[np.arange(num_draft), draft])] = np.nan
        emitted = set()
        for shift in (0.0, TOLERANCE, -TOLERANCE):
            shifted = replace(policy, entropy_threshold=policy.entropy_threshold + shift)
            verdict = accept(draft, chosen, gate, shifted, frozenset(rule.stop_token_ids))
            emitted.add((*draft[: verdict.num_accepted].tolist(), int(verdict.next_token or 0)))
        found.append(emitted)
    return found


def gates_of(scores: np.ndarray, policy: FlyPolicy) -> np.ndarray:
    gates = np.full(len(scores), np.nan)
    sound = ~np.isnan(scores).any(1) & np.isfinite(scores.max(1))
    for row in np.flatnonzero(sound):
        full, top = gate_entropy(distribution(scores[row : row + 1].astype(np.float64)), 3)
        gates[row] = full[0] if policy.use_full_entropy else top[0]
    return gates


def mismatches(batch: Batch, rule: Acceptance, result: Result, exact: Result) -> int:
    """Requests that got tokens which the rule on the host does not emit."""
    accepted, num = (part.cpu().numpy() for part in result)
    first = batch.num_contexts
    choices = exact[0][first:].cpu().numpy()
    wanted = answers(batch, choices, rule)
    wrong = int((accepted[:first, 0] != exact[0][:first, 0].cpu().numpy()).sum() + (num[:first] != 1).sum())
    for row, emitted in enumerate(wanted):
        wrong += tuple(accepted[first + row, : num[first + row]].tolist()) not in emitted
    return wrong


class Graph:
    """One rule at one shape in a CUDA graph; `run` overwrites what it reads and replays it."""

    def __init__(self, rule: Acceptance, batch: Batch) -> None:
        self._fly = FlyAcceptance(rule, lambda text: None)
        self._inputs = batch.inputs("cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(2):
                run(self._fly, self._inputs, batch.num_contexts)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.inference_mode():
            self._result = run(self._fly, self._inputs, batch.num_contexts)

    def run(self, batch: Batch) -> Result:
        for held, new in zip(self._inputs, batch.inputs("cuda"), strict=True):
            held.copy_(new)
        self._graph.replay()
        torch.cuda.synchronize()
        return self._result


def compare(device: str, num_cases: int, seed: int) -> dict[str, int]:
    """Requests decided, wrong ones, and loosened tokens, launched and replayed."""
    rng = np.random.default_rng(seed)
    seen = dict.fromkeys(("requests", "wrong", "loosened", "replayed", "wrong replayed"), 0)
    for case in range(num_cases):
        batch = Batch.random(rng)
        rule = random_rule(rng, batch.logits.shape[1])
        fly = FlyAcceptance(rule, lambda text: None)
        exact = run_exactly(batch, device)
        seen["requests"] += batch.num_gens
        seen["wrong"] += mismatches(batch, rule, run(fly, batch.inputs(device), batch.num_contexts), exact)
        seen["loosened"] += fly.counts()[1]
        if device == "cuda" and case % 4 == 0:
            shape = batch.num_contexts, *batch.draft.shape, batch.logits.shape[1]
            graph = Graph(rule, batch)
            for _ in range(3):
                other = Batch.random(rng, shape)
                other.logits = other.logits.to(batch.logits.dtype)
                seen["replayed"] += other.num_gens
                seen["wrong replayed"] += mismatches(other, rule, graph.run(other), run_exactly(other, device))
    return seen


def run_exactly(batch: Batch, device: str) -> Result:
    logits, draft = batch.inputs(device)
    return accept_exactly(Worker(), logits, draft, batch.num_contexts, batch.num_contexts + batch.num_gens, Metadata())


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call on the device, out of a CUDA graph of many."""
    with torch.inference_mode():
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def measure(seed: int) -> list[dict[str, Any]]:
    """Times in microseconds by shape and preset: the worker's own part, and with FLy around it; bfloat16 logits."""
    rng = np.random.default_rng(seed)
    rows = []
    for num_gens, num_draft in TIMED:
        batch = Batch.random(rng, (0, num_gens, num_draft, TIMED_VOCAB_SIZE))
        batch.logits = batch.logits.bfloat16()
        inputs = batch.inputs("cuda")
        arguments = Worker(), *inputs, 0, num_gens, Metadata()
        row: dict[str, Any] = {"requests": num_gens, "draft_tokens": num_draft}
        row["exact_us"] = microseconds(partial(accept_exactly, *arguments))
        for preset in PRESETS:
            fly = FlyAcceptance(Acceptance(preset), lambda text: None)
            row[f"{preset}_us"] = microseconds(partial(run, fly, inputs, 0))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="compare on a CPU, without graphs and times")
    parser.add_argument("--cases", type=int, default=200, help="random batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    report: dict[str, Any] = {"torch": torch.__version__}
    report |= compare("cpu" if args.cpu else "cuda", args.cases, args.seed)
    if not args.cpu:
        report |= {"device": torch.cuda.get_device_name(), "times": measure(args.seed)}
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        for name, value in report.items():
            print(f"{name}: {value}" if name != "times" else "\n".join(map(str, value)))
    sys.exit(1 if report["wrong"] + report["wrong replayed"] else 0)


if __name__ == "__main__":
    main()
