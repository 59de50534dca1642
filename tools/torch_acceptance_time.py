"""What FLy costs beside the argmax of the same rows, as the torch operations that TensorRT-LLM's processes run.

usage: tools/torch_acceptance_time.py [--vocab-size 128256] [--requests 8] [--draft-len 15] [--rounds 9] [--no-compile]
                                      [--device cpu]

Each request has draft-len + 1 rows. argmax reads all of them; FLy reads those where there is room for a window, and is
timed with its verdict, as written ("eager", which is what runs there) and compiled by torch. Figures are medians over
rounds in which all take turns. The process keeps the memory that it frees, as torch does on a GPU: to have it from the
system anew would take longer than the operations.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from fly_trt.integrations.tensorrt_llm.acceptance import decide, is_uncertain
from fly_trt.verification.fly import FlyPolicy, fly_policy

PRESETS = ("reference", "paper")  # the two gates: the three most probable tokens, and the whole vocabulary
STOP_TOKENS = (0, 1)


def keep_memory() -> None:
    """glibc: nothing below 32 MB is mapped on its own, and nothing is given back."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def seconds(run: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def loosen(logits: torch.Tensor, draft: torch.Tensor, choices: torch.Tensor, policy: FlyPolicy) -> torch.Tensor:
    """How many draft tokens stand; the logits [requests, draft + 1, vocabulary] of generation requests alone."""
    num_loose = draft.shape[1] - max(policy.window, policy.lookahead)
    may_loosen = is_uncertain(logits[:, :num_loose], draft[:, :num_loose], policy)
    return decide(draft, choices, may_loosen, policy, STOP_TOKENS)[1]


def measure(
    dtype: torch.dtype, *, vocab_size: int, requests: int, draft_len: int, rounds: int, compiles: bool, device: str
) -> dict[str, list[float]]:
    """Seconds of each round, by what was run."""
    logits = (3 * torch.randn(requests, draft_len + 1, vocab_size)).to(device, dtype)
    choices = logits.argmax(-1).int()
    draft = torch.where(torch.rand(requests, draft_len, device=device) < 0.9, choices[:, :draft_len], 7)
    runs: dict[str, Callable[[], object]] = {"argmax": lambda: logits.argmax(-1)}
    forms = {"eager": loosen} | ({"compiled": torch.compile(loosen, fullgraph=True)} if compiles else {})
    for preset in PRESETS:
        policy = fly_policy(preset, vocab_size)
        for form, function in forms.items():
            runs[f"{preset}, {form}"] = lambda f=function, p=policy: f(logits, draft, choices, p)
    for run in runs.values():
        run()
    times = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(rounds)]
    return {name: [of_round[name] for of_round in times] for name in runs}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--draft-len", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(arguments)
    print(f"{'':24} {'ms':>8} {'of argmax':>10}")
    for dtype in (torch.float32, torch.bfloat16):
        times = measure(
            dtype,
            vocab_size=args.vocab_size,
            requests=args.requests,
            draft_len=args.draft_len,
            rounds=args.rounds,
            compiles=not args.no_compile,
            device=args.device,
        )
        print(str(dtype).removeprefix("torch."))
        for name, spent in times.items():
            share = statistics.median(own / argmax for own, argmax in zip(spent, times["argmax"], strict=True))
            print(f"  {name:22} {1e3 * statistics.median(spent):8.2f} {share:10.0%}")


if __name__ == "__main__":
    keep_memory()
    main()
