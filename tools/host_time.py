"""How much time goes by outside the engines: scheduling, drafting logic, verdicts, detokenizing, handing outputs over.

usage: tools/host_time.py ENGINE_DIR [--prompts 24] [--rounds 3] [--max-tokens 160] [--method multi_level] [--profile]

Requests run one at a time. Host time is the wall time of generate() minus the time inside ONNX Runtime's run calls of
target and draft; figures are medians over the rounds. --profile prints where it goes, function by function (which slows
it down).
"""

import argparse
import cProfile
import pstats
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import onnxruntime as ort

from fly_trt import LLM, SamplingParams
from fly_trt.benchmark.workload import read_prompts
from fly_trt.text.prompts import Prompt

EVAL_PROMPTS = Path(__file__).parents[1] / "tests" / "assets" / "pair" / "eval.jsonl"
WARMUP_PROMPTS = 2


class RunTimer:
    """Counts ONNX Runtime's run calls and the seconds in them."""

    def __init__(self) -> None:
        self.calls = 0
        self.seconds = 0.0
        run = ort.InferenceSession.run_with_iobinding

        def timed(session: ort.InferenceSession, *args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            run(session, *args, **kwargs)
            self.seconds += time.perf_counter() - started
            self.calls += 1

        ort.InferenceSession.run_with_iobinding = timed


def measure(llm: LLM, prompts: list[Prompt], params: SamplingParams, timer: RunTimer) -> dict[str, float]:
    calls, seconds = timer.calls, timer.seconds
    started = time.perf_counter()
    outputs = [llm.generate(prompt, params)[0] for prompt in prompts]
    wall = time.perf_counter() - started
    calls, seconds = timer.calls - calls, timer.seconds - seconds
    steps = sum(output.metrics.num_spec_steps or output.metrics.num_output_tokens for output in outputs)
    host = wall - seconds
    return {
        "tokens/s": sum(output.metrics.num_output_tokens for output in outputs) / wall,
        "wall, s": wall,
        "engine calls": calls,
        "rounds": steps,
        "host time, % of wall": 100 * host / wall,
        "host time, us per engine call": 1e6 * host / calls,
        "host time, us per round": 1e6 * host / steps,
        "allowed, us per round (50 us per engine call + 300 us)": 50 * calls / steps + 300,
    }


def profile_engine_thread(llm: LLM, prompts: list[Prompt], params: SamplingParams) -> None:
    """Profiles the engine thread only: a profiler sees one thread, so it is set while that thread runs its loop."""
    profiler = cProfile.Profile()
    step = type(llm._service._thread._executor).step

    def profiled(loop: Any) -> Any:
        assert threading.current_thread().name == "fly-trt engine"
        profiler.enable()
        try:
            return step(loop)
        finally:
            profiler.disable()

    type(llm._service._thread._executor).step = profiled
    for prompt in prompts:
        llm.generate(prompt, params)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--method", default="multi_level", choices=["multi_level", "draft_model", "ngram", "none"])
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    prompts = [record.prompt for record in read_prompts(EVAL_PROMPTS)[: args.prompts]]
    params = SamplingParams(max_tokens=args.max_tokens)
    method = None if args.method == "none" else args.method
    timer = RunTimer()
    with LLM(args.engine_dir, speculative_config={"method": method}) as llm:
        llm.generate(prompts[:WARMUP_PROMPTS], params)
        if args.profile:
            profile_engine_thread(llm, prompts, params)
            return
        rounds = [measure(llm, prompts, params, timer) for _ in range(args.rounds)]
    for name in rounds[0]:
        print(f"{name:58} {statistics.median(result[name] for result in rounds):10.1f}")


if __name__ == "__main__":
    main()
