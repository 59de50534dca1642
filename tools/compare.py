"""Compares FLy with exact speculation and with autoregressive decoding of the same engine, in one interleaved run.

usage: tools/compare.py ENGINE_DIR [--prompts 24] [--rounds 3] [--max-tokens 160] [--modes ar exact fly]
                        [--in-flight 1 4 8 16] [--ignore-eos] [--json]

Every round runs every prompt in every mode, one mode right after the other, so that a machine that slows down slows
all modes; tokens/s are medians over the rounds. With N in flight, N requests are kept running until the prompts are
done. Prompts are the demo pair's evaluation prompts, which carry checks.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from eval_checks import is_right, load_eval_prompts
from fly_trt import LLM, FlyError, RequestOutput, SamplingParams

MODES = {
    "ar": ("autoregressive", {"method": None}),
    "exact": ("exact", {"acceptance": "exact"}),
    "exact-draft": ("exact, draft model", {"method": "draft_model", "acceptance": "exact"}),
    "exact-ngram": ("exact, n-gram drafts", {"method": "ngram", "acceptance": "exact"}),
    "fly": ("FLy", {"acceptance": "fly"}),
    "fly-draft": ("FLy, draft model", {"method": "draft_model", "acceptance": "fly"}),
    "fly-ngram": ("FLy, n-gram drafts", {"method": "ngram", "acceptance": "fly"}),
    "paper": ("FLy preset paper", {"acceptance": "fly", "preset": "paper"}),
    "vllm": ("FLy preset vllm", {"acceptance": "fly", "preset": "vllm"}),
}
WARMUP_PROMPTS = 2


@dataclass
class Result:
    """`rates` are tokens/s per round; `outputs` those of the last round."""

    mode: str
    in_flight: int
    rates: list[float] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)

    def summary(self, checks: list[dict], baseline: "Result") -> dict:
        metrics = [output.metrics for output in self.outputs]
        steps = sum(m.num_spec_steps for m in metrics)
        accepted = sum(m.num_accepted_tokens for m in metrics)
        pairs = zip(self.outputs, baseline.outputs, strict=True)
        rate = statistics.median(self.rates)
        return {
            "mode": self.mode,
            "in_flight": self.in_flight,
            "tokens_per_second": rate,
            "tokens_per_second_range": [min(self.rates), max(self.rates)],
            "speed_up": rate / statistics.median(baseline.rates),
            "mean_acceptance_length": 1 + accepted / steps if steps else 1.0,
            "num_loosened_tokens": sum(m.num_loosened_tokens for m in metrics),
            "num_output_tokens": sum(m.num_output_tokens for m in metrics),
            "num_right": sum(is_right(c, o.outputs[0].text) for c, o in zip(checks, self.outputs, strict=True)),
            "num_prompts": len(checks),
            "num_same_as_first_mode": sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in pairs),
        }


def compare(
    engine_dir: str, modes: list[str], num_prompts: int, rounds: int, params: SamplingParams, in_flight: int
) -> list[dict]:
    records = load_eval_prompts()[:num_prompts]
    prompts = [record["prompt"] for record in records]
    # One at a time, the modes take turns prompt by prompt; in flight, they take turns with all prompts.
    shares = [[prompt] for prompt in prompts] if in_flight == 1 else [prompts]
    llms = {
        mode: LLM(engine_dir, speculative_config=MODES[mode][1], max_batch_size=in_flight, enable_prefix_caching=False)
        for mode in modes
    }
    results = {mode: Result(mode, in_flight) for mode in modes}
    for llm in llms.values():
        llm.generate(prompts[: WARMUP_PROMPTS * in_flight], params)
    progress = tqdm(total=rounds * len(prompts) * len(modes), unit="completion", disable=None, leave=False)
    for _ in range(rounds):
        seconds = dict.fromkeys(modes, 0.0)
        for result in results.values():
            result.outputs = []
        for share in shares:
            for mode, llm in llms.items():
                started = time.perf_counter()
                results[mode].outputs += llm.generate(share, params)
                seconds[mode] += time.perf_counter() - started
                progress.update(len(share))
        for mode, result in results.items():
            num_tokens = sum(output.metrics.num_output_tokens for output in result.outputs)
            result.rates.append(num_tokens / seconds[mode])
    progress.close()
    for llm in llms.values():
        llm.shutdown()
    checks = [record["check"] for record in records]
    return [result.summary(checks, results[modes[0]]) for result in results.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["ar", "exact", "fly"])
    parser.add_argument("--ignore-eos", action="store_true", help="always max-tokens: decoding outweighs prefill")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    params = SamplingParams(max_tokens=args.max_tokens, ignore_eos=args.ignore_eos)
    rows = []
    try:
        for in_flight in args.in_flight:
            rows += compare(args.engine_dir, args.modes, args.prompts, args.rounds, params, in_flight)
    except FlyError as error:
        parser.exit(2, f"compare: {error}\n")
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=f"{args.engine_dir}: {args.prompts} prompts, median of {args.rounds} rounds")
    for column in ("mode", "in flight", "tokens/s", "speed-up", "acceptance length", "loosened", "right answers"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        table.add_row(
            MODES[row["mode"]][0],
            str(row["in_flight"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['speed_up']:.2f}x",
            f"{row['mean_acceptance_length']:.2f}",
            str(row["num_loosened_tokens"]),
            f"{row['num_right']} of {row['num_prompts']}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
