"""How fast the kernels run on this machine's GPU, next to device copies and to PyTorch operations of the same results.

Each figure is the median over replays of a CUDA graph of many launches, divided by their number. The launches of a
graph read different buffers in turn, many times what the L2 cache holds, so that they read DRAM. The kernel's GB/s
count the bytes of the logits, once; a copy's count what it reads and what it writes. A copy of the size of the logits
pays the same start and end as the kernel, which are most of a short launch; a copy of 1 GiB shows what DRAM gives. Of
each the faster of two counts, by the driver's memory copy and by a kernel. Launches in a graph follow each other
closely: what a lone launch costs on the host is not in these figures.
"""

import ctypes
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernel_library import (
    ACCEPT_INPUTS,
    ACCEPT_OUTPUTS,
    GATE_OUTPUTS,
    TOP_OUTPUTS,
    AcceptArgs,
    GateArgs,
    Kernels,
    PackedPolicy,
    PackedStep,
    packed_args,
)

REPLAYS = 21
PROBE_LAUNCHES = 16  # of the graph that finds out how many launches last GRAPH_MS
GRAPH_MS = 6.0
WARM_UP_S = 0.2  # an idle GPU clocks low
CACHES_READ = 16  # how often the buffers of a graph fill the L2 cache, which may keep the oldest of streamed data
FLUSH_BYTES = 2**30
FLUSHES = 4  # together longer than the CPU takes to launch a graph
LARGE_COPY_BYTES = 2**30


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
PACKED_VOCAB_SIZE = 128_256
PACKED_SHAPES = [(1, 16), (8, 16), (32, 16), (16, 0)]  # requests, and draft tokens of each
PACKED_CHUNK = 32  # tokens of context that each computes again


def measure(kernels: Kernels) -> dict[str, Any]:
    torch = kernels.memory.torch  # type: ignore[attr-defined]
    stopwatch = Stopwatch(torch)
    clock_before = stopwatch.sm_clock_mhz()
    large_copy_rate = _large_copy_rate(stopwatch)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "large_copy_gb_s": large_copy_rate,
        "entropy_gate": [_time_shape(kernels, stopwatch, shape, large_copy_rate) for shape in SHAPES],
        "loose_window_accept": [_time_accept(kernels, stopwatch, *shape) for shape in ACCEPT_SHAPES],
        "packed_loose_accept": [_time_packed(kernels, stopwatch, *shape) for shape in PACKED_SHAPES],
        "sm_clock_mhz": [clock_before, stopwatch.sm_clock_mhz()],
    }


def show(report: dict[str, Any]) -> None:
    before, after = (f"{clock} MHz" if clock else "unknown" for clock in report["sm_clock_mhz"])
    print(f"\n{report['device']}, torch {report['torch']}; medians of {REPLAYS} graph replays")
    print(f"SM clock under load: {before} before, {after} after; copy of 1 GiB: {report['large_copy_gb_s']:.0f} GB/s")
    print("EntropyGate: GB/s of the kernel are bytes of logits / time, of a copy bytes read and written / time;")
    print("the kernel's GB/s as a share of those of a copy of the same size and of the copy of 1 GiB")
    print(f"{'logits':>26} top kernel us   GB/s  copy us   GB/s  same 1 GiB  torch us")
    for row in report["entropy_gate"]:
        name = f"{row['rows']} x {row['vocab_size']} {row['dtype']}"
        print(
            f"{name:>26} {row['top_k']:>3} {row['kernel_us']:9.1f} {row['kernel_gb_s']:6.0f} {row['copy_us']:8.1f} "
            f"{row['copy_gb_s']:6.0f} {row['share_of_copy']:5.0%} {row['share_of_large_copy']:5.0%} "
            f"{row['torch_us']:9.1f}"
        )
    for row in report["loose_window_accept"]:
        print(f"LooseWindowAccept {row['rows']} x {row['tokens']}: {row['kernel_us']:.1f} us")
    for row in report["packed_loose_accept"]:
        print(
            f"PackedLooseAccept {row['requests']} requests with {row['drafts']} drafts, float32: "
            f"{row['kernel_us']:.1f} us, of which a copy of the logits takes {row['copy_us']:.1f} us"
        )


class Stopwatch:
    """Times calls on a warm GPU whose L2 cache holds nothing of theirs."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def microseconds(self, call: Callable[[int], Any], num_buffers: int = 1) -> float:
        """The median time of a call, over graphs that call it for each buffer in turn."""
        with self.torch.cuda.stream(self.torch.cuda.Stream()):  # modules are loaded before the capture
            call(0)
        self.torch.cuda.synchronize()
        num_calls = num_buffers * math.ceil(PROBE_LAUNCHES / num_buffers)
        probe = self._capture(call, num_buffers, num_calls)
        call_ms = min(self._replay_ms(probe) for _ in range(3)) / num_calls
        num_calls = num_buffers * math.ceil(GRAPH_MS / call_ms / num_buffers)
        graph = self._capture(call, num_buffers, num_calls)
        return 1e3 * statistics.median(self._replay_ms(graph) for _ in range(REPLAYS)) / num_calls

    def sm_clock_mhz(self) -> int | None:
        """The clock while the GPU is busy, if torch or nvidia-smi knows it."""
        for _ in range(1000):  # a quarter of a second or more, still under way when the clock is read
            self._flushed.zero_()
        try:
            return int(self.torch.cuda.clock_rate())
        except Exception:  # without pynvml; what torch raises then differs between its versions
            return self._sm_clock_of_nvidia_smi()
        finally:
            self.torch.cuda.synchronize()

    def _sm_clock_of_nvidia_smi(self) -> int | None:
        uuid = getattr(self.torch.cuda.get_device_properties(0), "uuid", None)  # tells which of several GPUs
        device = [] if uuid is None else [f"--id=GPU-{uuid}"]
        command = ["nvidia-smi", *device, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        try:
            return int(subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).splitlines()[0])
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
            return None

    def _capture(self, call: Callable[[int], Any], num_buffers: int, num_calls: int) -> Any:
        """A graph of the calls, after WARM_UP_S of replays."""
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            for i in range(num_calls):
                call(i % num_buffers)
        end = time.monotonic() + WARM_UP_S
        while time.monotonic() < end:
            graph.replay()
            self.torch.cuda.synchronize()
        return graph

    def _replay_ms(self, graph: Any) -> float:
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):  # the GPU is still busy when the graph is launched, or the launch would be timed too
            self._flushed.zero_()
        start.record()
        graph.replay()
        end.record()
        self.torch.cuda.synchronize()
        return float(start.elapsed_time(end))


def _copy_microseconds(stopwatch: Stopwatch, sources: Any, copies: Any) -> float:
    """Of copying one buffer: the faster of a memory copy, which a graph may run in a way of its own, and a kernel."""
    by_driver = stopwatch.microseconds(lambda i: copies[i].copy_(sources[i]), len(sources))
    by_kernel = stopwatch.microseconds(lambda i: stopwatch.torch.mul(sources[i], 1, out=copies[i]), len(sources))
    return min(by_driver, by_kernel)


def _large_copy_rate(stopwatch: Stopwatch) -> float:
    sources = stopwatch.torch.ones(1, LARGE_COPY_BYTES // 4, device="cuda")
    copies = stopwatch.torch.empty_like(sources)
    return 2 * LARGE_COPY_BYTES / _copy_microseconds(stopwatch, sources, copies) / 1e3


def _time_shape(kernels: Kernels, stopwatch: Stopwatch, shape: Shape, large_copy_rate: float) -> dict[str, Any]:
    torch = stopwatch.torch
    dtype = getattr(torch, shape.dtype)
    num_bytes = shape.rows * shape.vocab_size * dtype.itemsize
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    num_buffers = max(2, math.ceil(CACHES_READ * cache / num_bytes))
    logits = torch.empty(num_buffers, shape.rows, shape.vocab_size, dtype=dtype, device="cuda")
    for buffer in logits:
        buffer.copy_(torch.randn(shape.rows, shape.vocab_size, device="cuda") * 3)
    tokens = torch.randint(shape.vocab_size, (shape.rows,), device="cuda")
    kernel = _kernel_call(kernels, torch, shape, logits, tokens)
    times = {
        "kernel_us": stopwatch.microseconds(kernel, num_buffers),
        "copy_us": _copy_microseconds(stopwatch, logits, torch.empty_like(logits)),
        "torch_us": stopwatch.microseconds(
            lambda i: _torch_results(torch, logits[i], tokens, shape.top_k), num_buffers
        ),
    }
    kernel_rate = num_bytes / times["kernel_us"] / 1e3
    copy_rate = 2 * num_bytes / times["copy_us"] / 1e3
    rates = {
        "kernel_gb_s": kernel_rate,
        "copy_gb_s": copy_rate,
        "share_of_copy": kernel_rate / copy_rate,
        "share_of_large_copy": kernel_rate / large_copy_rate,
    }
    return {**vars(shape), **times, **rates}


def _kernel_call(kernels: Kernels, torch: Any, shape: Shape, logits: Any, tokens: Any) -> Callable[[int], None]:
    num_bytes = kernels.workspace_bytes(shape.rows, shape.vocab_size, shape.top_k)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    outputs = [
        torch.empty(
            shape.rows * (shape.top_k if name in TOP_OUTPUTS else 1),
            dtype=torch.int64 if dtype is np.int64 else torch.float32,
            device="cuda",
        )
        for name, dtype in GATE_OUTPUTS.items()
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
    token_logprob = log_probs.gather(-1, tokens[:, None])[:, 0]
    return places[:, 0], entropy, entropy_topk, top[:, 0], token_logprob, places, top


def _time_accept(kernels: Kernels, stopwatch: Stopwatch, rows: int, tokens: int) -> dict[str, Any]:
    torch = stopwatch.torch

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
    microseconds = stopwatch.microseconds(lambda i: kernels.launch_loose_window_accept(args))
    return {"rows": rows, "tokens": tokens, "kernel_us": microseconds}


def _time_packed(kernels: Kernels, stopwatch: Stopwatch, requests: int, drafts: int) -> dict[str, Any]:
    """Context requests whose drafts are choices but for one in eight; the kernels' time holds the copy's."""
    torch = stopwatch.torch
    num_rows = requests * (drafts + 1)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    num_buffers = max(2, math.ceil(CACHES_READ * cache / (num_rows * PACKED_VOCAB_SIZE * 4)))
    logits = torch.randn(num_buffers, num_rows, PACKED_VOCAB_SIZE, device="cuda") * 3
    rewritten = torch.empty_like(logits)
    length = PACKED_CHUNK + drafts
    last = np.arange(PACKED_CHUNK, length + 1)[None] + length * np.arange(requests)[:, None]
    choices = logits[0].argmax(-1).cpu().numpy().reshape(requests, -1)[:, :drafts]
    choices = np.where(np.arange(drafts) % 8 == 2, 5, choices)
    ids = np.concatenate([np.zeros((requests, PACKED_CHUNK), int), choices], axis=1)
    shapes = PackedStep(
        np.empty((num_rows, PACKED_VOCAB_SIZE), np.float32), last.ravel(), ids.ravel(), np.full(requests, length)
    )
    args = packed_args(shapes, PackedPolicy())
    arrays = (shapes.last_token_ids, shapes.input_ids, shapes.context_lengths)
    on_device = [torch.from_numpy(array.astype(np.int32)).cuda() for array in arrays]
    args.last_token_ids, args.input_ids, args.context_lengths = (array.data_ptr() for array in on_device)
    num_bytes = kernels.packed_workspace_bytes(num_rows, PACKED_VOCAB_SIZE, args.top_k)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

    def call(i: int) -> None:
        args.logits, args.rewritten = logits[i].data_ptr(), rewritten[i].data_ptr()
        error = kernels.launch_packed_loose_accept(args, workspace.data_ptr(), num_bytes)
        if error != 0:
            raise RuntimeError(f"the launch of PackedLooseAccept returned CUDA error {error}")

    times = {
        "kernel_us": stopwatch.microseconds(call, num_buffers),
        "copy_us": _copy_microseconds(stopwatch, logits, rewritten),
    }
    return {"requests": requests, "drafts": drafts, **times}
