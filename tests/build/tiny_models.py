"""Tiny random checkpoints, graphs made from them and a runner for those graphs, shared by the tests of fly_build.

Weights are drawn so wide that logits spread over several units and attention is far from uniform: a wrong mask,
position or multiplier then moves logits by far more than a rounding error. Caches start full of noise, so reading a
position that was never written is seen too.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers

from fly_build.attention import make_shape_invariant
from fly_build.checkpoint import Checkpoint, open_checkpoint
from fly_build.cpu_attention import fuse_attention
from fly_build.cpu_library import LIBRARY_NAME
from fly_build.cpu_linears import fuse_linears
from fly_build.export import DecoderGraph
from fly_build.head import GATE_OUTPUTS, HeadForm, append_head
from fly_build.linear_form import Kernels
from fly_build.operators import AttentionForm
from fly_build.weights import WeightWriter
from fly_trt.engines.base import POSITIONS_INPUT
from fly_trt.engines.onnxruntime import session_options
from fly_trt.manifest import Dtype, Quantization
from traced_once import export_once

PAIR = Path(__file__).resolve().parents[1] / "assets" / "pair"
MAX_SEQ_LEN = 64
PREFILL, CONTINUED, REWOUND = 40, 46, 25
TOLERANCE = 1e-4
SILENT_BELOW_ERROR = 3
# ONNX Runtime makes MatMulNBits of a DequantizeLinear and a MatMul, and would round the activations to 8 bits.
EXACT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "1")
SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXACT_MATCH = {
    "num_context": np.int64(1),
    "num_draft": np.int64(0),
    "entropy_threshold": np.float32(np.inf),
    "use_full_entropy": np.bool_(False),
    "window": np.int64(0),
    "lookahead": np.int64(0),
}


def save_tiny(config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Saves a seeded random model of this configuration and returns it in float32, running transformers' eager code."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at 0 or 1, where a forgotten one would not show
                parameter += 0.2 * torch.randn_like(parameter)
            parameter.copy_(parameter.to(dtype))
    model.to(dtype).save_pretrained(folder)
    return model.to(torch.float32)


def tiny_llama(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**{**SHAPE, **changes})


def add_demo_tokenizer(folder: Path) -> None:
    """892 tokens, of which <|bos|> is 0 and <|eos|> is 1."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PAIR / "target" / name, folder / name)


def reference_logits(model: torch.nn.Module, *rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float32]]:
    """transformers' logits [T, V] of each row, computed from its first token with no cache."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor(row)[None], use_cache=False).logits[0].numpy() for row in rows]


def build_graph(
    checkpoint: Checkpoint, path: Path, *, dtype: Dtype = "float32", quantization: Quantization = "none"
) -> ir.Model:
    """Exports the decoder with its head and weights, and saves it at `path` with external data."""
    return finish_graph(export_once(checkpoint, MAX_SEQ_LEN), checkpoint, path, dtype, quantization)


def finish_graph(
    decoder: DecoderGraph,
    checkpoint: Checkpoint,
    path: Path,
    dtype: Dtype,
    quantization: Quantization,
    attention: AttentionForm = "lengths",
    kernels: Kernels = "cpu",
) -> ir.Model:
    num_heads, num_kv_heads = checkpoint.config.num_attention_heads, checkpoint.num_kv_heads
    is_own = kernels == "fly_cpu"
    is_fused = is_own and fuse_attention(decoder.model, num_heads, num_kv_heads, quantization) is None
    if attention == "lengths" and not is_fused:  # as for ONNX Runtime
        make_shape_invariant(decoder.model, num_heads, num_kv_heads)
    writer = WeightWriter(decoder.model.graph, checkpoint.load_weights(), dtype, quantization, kernels=kernels)
    writer.attach(decoder.parameters)
    if is_own:
        fuse_linears(decoder.model)
    portable: HeadForm = "lazy_functions" if attention == "lengths" else "functions"
    append_head(decoder.model, 3, [2], form="operators" if is_own else portable)
    ir.save(decoder.model, path, external_data=f"{path.name}.data")
    return decoder.model


def count_operators(model: ir.Model) -> dict[str, int]:
    """By type, with those in branches."""
    types = [node.op_type for node in model.graph.all_nodes()]
    return {name: types.count(name) for name in set(types)}


@dataclass(frozen=True)
class TinyPair:
    """Checkpoint folders and the target as transformers runs it. The draft's embedding table is padded."""

    target: Path
    draft: Path
    target_model: torch.nn.Module


class Runner:
    """A graph with its cache; each step copies the cache, which costs nothing at this size."""

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        batch_size: int = 2,
        cpu_library: Path | None = None,
    ) -> None:
        """`cpu_library`: that of the graph's operators; None: of the engine directory, if it lies in one with such."""
        options = session_options()
        library = cpu_library or path.parents[1] / LIBRARY_NAME
        if library.is_file():
            options.register_custom_ops_library(str(library))
        options.log_severity_level = SILENT_BELOW_ERROR  # TensorScatter warns about the copies
        options.add_session_config_entry(*EXACT_PRODUCTS)
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        noise, sizes = np.random.default_rng(1), {"S": MAX_SEQ_LEN, "S16": MAX_SEQ_LEN // 16}
        self.cache = {}
        for value in self.session.get_inputs():
            if value.name.startswith("past_"):
                shape = (batch_size, *(sizes.get(size, size) for size in value.shape[1:]))
                dtype = np.float16 if value.type == "tensor(float16)" else np.float32
                self.cache[value.name] = 9 * noise.standard_normal(shape, np.float32).astype(dtype)

    def step(self, input_ids: npt.ArrayLike, write_indices: list[int], **head_inputs: Any) -> dict[str, np.ndarray]:
        """input_ids [B, T], tokens cached per row -> every output but the cache, which is kept for the next step. Of
        all positions, unless `logits_positions` int64 [B, L] says which."""
        ids, rows = np.asarray(input_ids, np.int64), len(write_indices)
        positions = head_inputs.pop("logits_positions", np.arange(ids.size).reshape(ids.shape))
        head = {name: np.full(rows, value) for name, value in (EXACT_MATCH | head_inputs).items()}
        feeds = {"input_ids": ids, "write_indices": np.array(write_indices, np.int64), "logits_positions": positions}
        feeds["next_tokens"] = np.roll(ids, -1, axis=1).reshape(-1)[positions]
        names = [output.name for output in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(names, feeds | head | self.cache), strict=True))
        self.cache = {name: outputs.pop(name.replace("past", "present")) for name in self.cache}
        return outputs


def tiny_runner(
    config: Any,
    folder: Path,
    *,
    dtype: Dtype = "float32",
    quantization: Quantization = "none",
    batch_size: int = 2,
    attention: AttentionForm = "lengths",
    kernels: Kernels = "cpu",
) -> tuple[torch.nn.Module, Runner, ir.Model]:
    """The reference model, the runner and the graph of one configuration."""
    model = save_tiny(config, folder)
    checkpoint = open_checkpoint(str(folder))
    decoder = export_once(checkpoint, MAX_SEQ_LEN, attention=attention)
    graph = finish_graph(decoder, checkpoint, folder / "model.onnx", dtype, quantization, attention, kernels)
    return model, Runner(folder / "model.onnx", checkpoint, batch_size), graph


def check_against_transformers(model: torch.nn.Module, runner: Runner) -> None:
    """Both rows prefill; then row 0 continues while row 1 rewinds to an earlier position and takes other tokens."""
    rng = np.random.default_rng(0)
    rows = rng.integers(3, SHAPE["vocab_size"], (2, CONTINUED))
    step = CONTINUED - PREFILL
    rewound = np.concatenate([rows[1, :REWOUND], rng.integers(3, SHAPE["vocab_size"], step + 1)])
    continued = np.append(rows[0], 5)
    first, second = reference_logits(model, continued, rewound)
    (before_rewind,) = reference_logits(model, rows[1, :PREFILL])
    assert first.std() > 0.3, "logits too flat to tell a wrong graph from a right one"

    run = runner.step
    prefill = run(rows[:, :PREFILL], [0, 0])["logits"]
    middle = run([rows[0, PREFILL:], rewound[REWOUND : REWOUND + step]], [PREFILL, REWOUND])["logits"]
    last = run([continued[-1:], rewound[-1:]], [CONTINUED, REWOUND + step])["logits"]

    np.testing.assert_allclose(prefill[0], first[:PREFILL], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(prefill[1], before_rewind, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(middle[0], first[PREFILL:CONTINUED], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(middle[1], second[REWOUND : REWOUND + step], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(last[0], first[-1:], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(last[1], second[-1:], atol=TOLERANCE, rtol=0)


def check_asked_positions(runner: Runner, graph: ir.Model) -> None:
    """That a step says of some positions what it says of them among all, with the same bits of the logits, and that its
    logits see the rest of a row through nothing but the operator that takes these positions out of it."""
    ids = np.random.default_rng(3).integers(3, SHAPE["vocab_size"], (2, 9))
    every = runner.step(ids, [0, 0])
    for asked in ([8], [4, 5, 6, 7, 8], [2, 3], [8, 8, 8]):
        positions = np.array([asked, [9 + position for position in reversed(asked)]])
        some = runner.step(ids, [0, 0], logits_positions=positions)
        for name in ("logits", *GATE_OUTPUTS):
            want = every[name].reshape(ids.size, *every[name].shape[2:])[positions]
            # ONNX Runtime takes the last few exponentials of a tensor by themselves, in another way.
            rtol = 0 if name in ("logits", "argmax", "top_ids") else 1e-5
            np.testing.assert_allclose(some[name], want, rtol=rtol, atol=rtol, err_msg=f"{name} at {asked}")
    readers = [node for node in graph.graph if any(is_named(value, POSITIONS_INPUT) for value in node.inputs)]
    (taken,) = [node for node in readers if node.op_type != "Shape"]
    assert taken.op_type == "Gather"
    above, seen = [value for value in graph.graph.outputs if value.name == "logits"], set()
    while above:
        value = above.pop()
        assert not is_named(value, "input_ids"), "logits of positions that nobody asked for"
        node = value.producer()
        if node is not None and node is not taken and node not in seen:
            seen.add(node)
            above += [read for read in node.inputs if read is not None]
    assert seen


def is_named(value: ir.Value | None, name: str) -> bool:
    return value is not None and value.name == name
