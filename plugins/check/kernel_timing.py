"""How fast the kernels run on this machine's GPU, next to a device copy and to PyTorch operations of the same results.

Each figure is the median over replays of a CUDA graph of many launches, divided by their number. The launches of a
graph read different buffers in turn, many times what the L2 cache holds, so that they read DRAM. The kernel's GB/s
count the bytes of the logits, once; the copy's count what it reads and what it writes. Launches in a graph follow each
other closely: what a lone launch costs on the host is not in these figures.
"""

import ctypes
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kernel_library import ACCEPT_INPUTS, ACCEPT_OUTPUTS, GATE_OUTPUTS, AcceptArgs, GateArgs, Kernels

REPLAYS = 21
LAUNCHES_PER_GRAPH = 16
CACHES_READ = 16  # how often the buffers of a graph fill the L2 cache, which may keep the oldest of streamed data


@dataclass(frozen=True)
class Shape:
    rows: int
    vocab_size: int
    dtype: str = "bfloat16"
    top_k: int = 3


SHAPES = [
    *(Shape(rows, 128_256) for rows in (16, 64, 256, 400)),
    *(Shape(rows, vocab_size) for vocab_size in (32_000, 151_936, 256_000) for rows in (16, 256)),
    Shape(256, 128_257),  # rows that do not start on 16 bytes
    Shape(256, 128_256, top_k=8),
    Shape(256, 128_256, "float16"),
    Shape(256, 128_256, "float32"),
]
ACCEPT_SHAPES = [(16, 26), (256, 26), (16, 400)]


def measure(kernels: Kernels) -> dict[str, Any]:
    torch = kernels.memory.torch  # type: ignore[attr-defined]
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "entropy_gate": [_time_shape(kernels, torch, shape) for shape in SHAPES],
        "loose_window_accept": [_time_accept(kernels, torch, *shape) for shape in ACCEPT_SHAPES],
    }


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['device']}, torch {report['torch']}; medians of {REPLAYS} graph replays")
    print("EntropyGate: GB/s of the kernel are bytes of logits / time, of the copy bytes read and written / time")
    print(f"{'logits':>26} top kernel us   GB/s  copy us   GB/s  share  torch us")
    for row in report["entropy_gate"]:
        name = f"{row['rows']} x {row['vocab_size']} {row['dtype']}"
        print(
            f"{name:>26} {row['top_k']:>3} {row['kernel_us']:9.1f} {row['kernel_gb_s']:6.0f} {row['copy_us']:8.1f} "
            f"{row['copy_gb_s']:6.0f} {row['share_of_copy']:6.0%} {row['torch_us']:9.1f}"
        )
    for row in report["loose_window_accept"]:
        print(f"LooseWindowAccept {row['rows']} x {row['tokens']}: {row['kernel_us']:.1f} us")


def _time_shape(kernels: Kernels, torch: Any, shape: Shape) -> dict[str, Any]:
    dtype = getattr(torch, shape.dtype)
    num_bytes = shape.rows * shape.vocab_size * dtype.itemsize
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    num_buffers = max(2, math.ceil(CACHES_READ * cache / num_bytes))
    logits = torch.empty(num_buffers, shape.rows, shape.vocab_size, dtype=dtype, device="cuda")
    for buffer in logits:
        buffer.copy_(torch.randn(shape.rows, shape.vocab_size, device="cuda") * 3)
    tokens = torch.randint(shape.vocab_size, (shape.rows,), device="cuda")
    copies = torch.empty_like(logits)
    kernel = _kernel_call(kernels, torch, shape, logits, tokens)
    times = {
        "kernel_us": _microseconds(torch, kernel, num_buffers),
        "copy_us": _microseconds(torch, lambda i: copies[i].copy_(logits[i]), num_buffers),
        "torch_us": _microseconds(torch, lambda i: _torch_results(torch, logits[i], tokens, shape.top_k), num_buffers),
    }
    kernel_rate = num_bytes / times["kernel_us"] / 1e3
    copy_rate = 2 * num_bytes / times["copy_us"] / 1e3
    rates = {"kernel_gb_s": kernel_rate, "copy_gb_s": copy_rate, "share_of_copy": kernel_rate / copy_rate}
    return {**vars(shape), **times, **rates}


def _kernel_call(kernels: Kernels, torch: Any, shape: Shape, logits: Any, tokens: Any) -> Callable[[int], None]:
    num_bytes = kernels.workspace_bytes(shape.rows, shape.vocab_size, shape.top_k)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    outputs = [
        torch.empty(shape.rows, dtype=torch.int64 if name == "argmax" else torch.float32, device="cuda")
        for name in GATE_OUTPUTS
    ]
    logits_type = ["float32", "float16", "bfloat16"].index(shape.dtype)

    def call(i: int) -> None:
        pointers = [tokens.data_ptr(), *(output.data_ptr() for output in outputs)]
        args = GateArgs(logits[i].data_ptr(), logits_type, shape.rows, shape.vocab_size, shape.top_k, *pointers)
        error = kernels.launch_entropy_gate(args, workspace.data_ptr(), num_bytes)
        if error != 0:
            raise RuntimeError(f"the launch of EntropyGate returned CUDA error {error}")

    return call


def _torch_results(torch: Any, logits: Any, tokens: Any, top_k: int) -> tuple[Any, ...]:
    log_probs = torch.log_softmax(logits.float(), -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    top, places = log_probs.topk(top_k)
    entropy_topk = -(top.exp() * top).sum(-1)
    return places[:, 0], entropy, entropy_topk, top[:, 0], log_probs.gather(-1, tokens[:, None])[:, 0]


def _time_accept(kernels: Kernels, torch: Any, rows: int, tokens: int) -> dict[str, Any]:
    def filled(name: str) -> Any:
        if name in ("next_tokens", "argmax"):
            return torch.randint(2, (rows, tokens), device="cuda")
        if name in ("entropy", "entropy_topk"):
            return torch.rand(rows, tokens, device="cuda")
        if name == "entropy_threshold":
            return torch.full((rows,), 0.3, device="cuda")
        if name == "use_full_entropy":
            return torch.zeros(rows, dtype=torch.int32, device="cuda")
        value = {"num_context": 1, "num_draft": tokens - 1, "stop_token_ids": -1}.get(name, 5)
        return torch.full((rows,), value, dtype=torch.int64, device="cuda")

    buffers = [filled(name) for name in ACCEPT_INPUTS]
    buffers += [torch.empty(rows, dtype=torch.int64, device="cuda") for _ in ACCEPT_OUTPUTS]
    args = AcceptArgs(rows, tokens, 1, *(ctypes.c_void_p(buffer.data_ptr()) for buffer in buffers))
    microseconds = _microseconds(torch, lambda i: kernels.launch_loose_window_accept(args), 1)
    return {"rows": rows, "tokens": tokens, "kernel_us": microseconds}


def _microseconds(torch: Any, call: Callable[[int], Any], num_buffers: int) -> float:
    """The median time of a call, over graphs that call it for each buffer in turn."""
    num_calls = num_buffers * math.ceil(LAUNCHES_PER_GRAPH / num_buffers)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # modules are loaded before the capture
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            call(i % num_buffers)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / num_calls)
    return statistics.median(times)
