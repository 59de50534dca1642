"""What audits cost: engine time of one, throughput of a server that is never idle, and what a request waits.

usage: tools/audit_cost.py ENGINE_DIR [--prompts 16] [--rounds 3] [--max-tokens 64] [--slots 4] [--share 0.05]
       [--requests 40]

Three parts, on engines that are loaded once; whatever is compared takes turns, so that a noisy machine slows all of it.

1. One request at a time, each followed by its audit: engine time of the audit as a share of the request's own time,
   where the prompt is copied from the request's cache, where it is read again, and where the exact text is made too.
2. As many requests at once as --requests says: tokens/s with parts of them audited, at --share.
3. A request for one token that comes while nothing runs, with an audit under way and without: time to its token, and
   the longest step of an audit, which is the most that it can wait.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from fly_trt import LLM, SamplingParams
from fly_trt.benchmark.workload import read_prompts
from fly_trt.runtime import slots
from fly_trt.runtime.audit import AuditConfig, AuditResult
from fly_trt.runtime.auditor import Auditor
from fly_trt.text.prompts import Prompt

EVAL_PROMPTS = Path(__file__).parents[1] / "tests" / "assets" / "pair" / "eval.jsonl"
FRACTIONS = (0.0, 0.01, 0.1, 1.0)
NEVER = 1 << 30  # tokens that no prompt has


class Audited:
    """An LLM with audits whose settings may change between two requests, and what they come to."""

    def __init__(self, engine_dir: str, num_slots: int) -> None:
        self.results: SimpleQueue[AuditResult] = SimpleQueue()
        self.llm = LLM(engine_dir, max_batch_size=num_slots, audit_fraction=1.0, on_audit=self.results.put)
        auditor = self.llm._service.auditor
        assert auditor is not None
        self.auditor: Auditor = auditor
        self.step_seconds: list[float] = []
        self._step = auditor.step
        auditor.step = self._timed_step  # type: ignore[method-assign]

    def _timed_step(self, *, is_beside: bool = False) -> None:
        started = time.perf_counter()
        self._step(is_beside=is_beside)
        self.step_seconds.append(time.perf_counter() - started)

    @contextmanager
    def set_to(self, **settings: float) -> Iterator[None]:
        """Settings of the audits; what waits for one at the end is waited for."""
        self.auditor.config = AuditConfig(**settings)  # type: ignore[arg-type]
        yield
        while self.auditor.has_work:
            time.sleep(0.01)


def cost_of_one(audited: Audited, prompts: list[Prompt], params: SamplingParams) -> None:
    def copied() -> None:
        slots.MIN_PREFIX_TOKENS = least

    def read() -> None:
        slots.MIN_PREFIX_TOKENS = NEVER

    least = slots.MIN_PREFIX_TOKENS
    ways: dict[str, tuple[Callable[[], None], float]] = {
        "read again, the prompt copied": (copied, 0.0),
        "read again, the prompt too": (read, 0.0),
        "exact text too": (copied, 1.0),
    }
    shares: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for prompt in prompts:
        for name, (prepare, exact) in ways.items():
            prepare()
            with audited.set_to(fraction=1.0, exact_fraction=exact):
                (output,) = audited.llm.generate(prompt, params)
                result = audited.results.get()
            assert output.metrics.latency is not None
            shares[name].append(result.seconds / output.metrics.latency)
            seconds[name].append(result.seconds)
    copied()
    print("an audit of one request                    ms   % of its request (median, mean)")
    for name in ways:
        milliseconds, share = 1e3 * statistics.median(seconds[name]), 100 * statistics.median(shares[name])
        print(f"  {name:34} {milliseconds:8.1f} {share:8.1f} {100 * statistics.mean(shares[name]):8.1f}")


def throughput(audited: Audited, prompts: list[Prompt], params: SamplingParams, rounds: int, share: float) -> None:
    rates: dict[float, list[float]] = {fraction: [] for fraction in FRACTIONS}
    spent: dict[float, list[float]] = {fraction: [] for fraction in FRACTIONS}
    for number in range(rounds):
        order = list(FRACTIONS)
        random.Random(number).shuffle(order)
        for fraction in order:
            with audited.set_to(fraction=fraction, exact_fraction=0.1, share=share, max_queue_size=8):
                before, started = audited.auditor.counts.seconds_beside, time.perf_counter()
                outputs = audited.llm.generate(prompts, params)
                wall = time.perf_counter() - started
                beside = audited.auditor.counts.seconds_beside - before
            rates[fraction].append(sum(output.metrics.num_output_tokens for output in outputs) / wall)
            spent[fraction].append(beside / wall)
    print(f"all slots busy, audit_share {share:g}   tokens/s   of no audits (median, range)   % of the time in audits")
    for fraction in FRACTIONS:
        ratios = [rate / plain for rate, plain in zip(rates[fraction], rates[0.0], strict=True)]
        print(
            f"  audit_fraction {fraction:<18g} {statistics.median(rates[fraction]):8.1f} "
            f"{statistics.median(ratios):8.3f} {min(ratios):8.3f} to {max(ratios):.3f} "
            f"{100 * statistics.median(spent[fraction]):8.2f}"
        )


def waiting(audited: Audited, prompts: list[Prompt], params: SamplingParams, count: int) -> None:
    one = SamplingParams(max_tokens=1)
    times: dict[float, list[float]] = {0.0: [], 1.0: []}
    audited.step_seconds.clear()
    for number in range(count):
        for fraction in times:
            with audited.set_to(fraction=fraction, exact_fraction=1.0):
                audited.llm.generate(prompts[number % len(prompts)], params)
                time.sleep(random.Random(number).random() * 0.005)
                (output,) = audited.llm.generate(prompts[(number + 1) % len(prompts)], one)
            assert output.metrics.time_to_first_token is not None
            times[fraction].append(output.metrics.time_to_first_token)
    print("a request that comes while nothing runs        median ms   largest ms of its first token")
    for fraction, name in ((0.0, "without audits"), (1.0, "while one is under way")):
        found = times[fraction]
        print(f"  {name:38} {1e3 * statistics.median(found):13.1f} {1e3 * max(found):12.1f}")
    steps = [1e3 * seconds for seconds in audited.step_seconds]
    print(f"steps of audits: {len(steps)}, median {statistics.median(steps):.1f} ms, longest {max(steps):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--requests", type=int, default=40)
    args = parser.parse_args()
    records = read_prompts(EVAL_PROMPTS)
    prompts = [record.prompt for record in records[: args.prompts]]
    params = SamplingParams(max_tokens=args.max_tokens)
    audited = Audited(args.engine_dir, args.slots)
    with audited.llm:
        with audited.set_to(fraction=1.0, exact_fraction=1.0):
            audited.llm.generate(prompts[:2], params)
        for _ in range(2):
            audited.results.get()
        cost_of_one(audited, prompts, params)
        many = [record.prompt for record in (records * 9)[: args.requests]]
        throughput(audited, many, params, args.rounds, args.share)
        waiting(audited, prompts, params, args.prompts)


if __name__ == "__main__":
    main()
