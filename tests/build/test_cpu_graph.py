"""The graph of operators of plugins/cpu: what stands around a product is taken into it where it matches, stays where it
does not, and the logits are those of ONNX Runtime's own operators.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from test_architectures import CONFIGS

from fly_build.checkpoint import Checkpoint, open_checkpoint
from fly_build.cpu_linears import Prologue, fuse_linears
from fly_build.linear_form import Kernels
from fly_trt.engines.base import CPU_DOMAIN
from fly_trt.manifest import Quantization
from tiny_models import (
    MAX_SEQ_LEN,
    SHAPE,
    Runner,
    check_against_transformers,
    count_operators,
    finish_graph,
    reference_logits,
    save_tiny,
)
from traced_once import export_once

LENGTH, PREFILL = 48, 40
WIDTH = 32
MORE_ERROR = 1.15  # than with ONNX Runtime's int8: the cache is float16, and roundings fall otherwise
WATCHED = ("Attention", "Cos", "RMSNormalization", "Slice", "Split", "TensorScatter", "Transpose")
# What is left of these in two layers of int8. Norms behind a product (gemma2, gemma3, olmo2: of whole projections, too)
# and experts stay; so does attention whose heads are no multiple of 16 (qwen3 here: 24), with all that belongs to it.
LEFT = {
    "qwen3": {
        "Attention": 4,
        "Cos": 1,
        "RMSNormalization": 4,
        "Slice": 2,
        "Split": 2,
        "TensorScatter": 4,
        "Transpose": 8,
    },
    "gemma2": {"RMSNormalization": 4},
    "gemma3_text": {"RMSNormalization": 4},
    "olmo2": {"RMSNormalization": 8, "Split": 2},
    "mixtral": {"RMSNormalization": 2, "Split": 2},
    "qwen3_moe": {"RMSNormalization": 2, "Split": 2},
}


@dataclass(frozen=True)
class Tiny:
    name: str
    reference: torch.nn.Module
    checkpoint: Checkpoint
    library: Path

    def built(self, folder: Path, kernels: Kernels, quantization: Quantization) -> tuple[ir.Model, Runner]:
        path = folder / f"{kernels}.{quantization}.onnx"
        decoder = export_once(self.checkpoint, MAX_SEQ_LEN)
        graph = finish_graph(decoder, self.checkpoint, path, "float32", quantization, kernels=kernels)
        return graph, Runner(path, self.checkpoint, cpu_library=self.library)


@pytest.fixture(scope="module", params=CONFIGS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cpu_library: Path) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_tiny(CONFIGS[request.param](), folder)
    return Tiny(request.param, reference, open_checkpoint(str(folder)), cpu_library)


def _logits(runner: Runner) -> npt.NDArray[np.float32]:
    """[2, LENGTH, V] of a prompt and steps behind it, one of a single token."""
    ids = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (2, LENGTH))
    steps = [(0, PREFILL), (PREFILL, LENGTH - 1), (LENGTH - 1, LENGTH)]
    return np.concatenate([runner.step(ids[:, a:b], [a, a])["logits"] for a, b in steps], axis=1)


def test_every_architecture_agrees_with_transformers_in_float32(tiny: Tiny, tmp_path: Path) -> None:
    _, runner = tiny.built(tmp_path, "fly_cpu", "none")
    check_against_transformers(tiny.reference, runner)


def test_every_architecture_is_as_near_to_float32_as_onnxruntimes_own_int8(tiny: Tiny, tmp_path: Path) -> None:
    _, own = tiny.built(tmp_path, "cpu", "int8")
    graph, fused = tiny.built(tmp_path, "fly_cpu", "int8")
    ids = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (2, LENGTH))
    exact = np.stack(reference_logits(tiny.reference, *ids))
    error = np.abs(_logits(fused) - exact).mean()
    assert error < MORE_ERROR * np.abs(_logits(own) - exact).mean()
    found = count_operators(graph)
    assert {name: found[name] for name in WATCHED if name in found} == LEFT.get(tiny.name, {})
    caches = {value.dtype for value in graph.graph.inputs if value.name.startswith("past_")}
    assert caches == {ir.DataType.FLOAT if tiny.name == "qwen3" else ir.DataType.FLOAT16}
    assert [name for name, value in graph.graph.initializers.items() if not value.uses()] == []


def test_a_llama_layer_is_five_nodes(tmp_path: Path, cpu_library: Path) -> None:
    reference = save_tiny(CONFIGS["llama-tied"](), tmp_path)
    tiny = Tiny("llama-tied", reference, open_checkpoint(str(tmp_path)), cpu_library)
    graph, _ = tiny.built(tmp_path, "fly_cpu", "int8")
    assert count_operators(graph) == {
        "Gather": 2,  # embeddings, and the rows that the vocabulary is asked of
        "RotaryTables": 1,
        "Int8Linear": 4 * 2 + 1,
        "CacheAttention": 2,
        "Reshape": 1,
        "EntropyGate": 1,
        "LooseWindowAccept": 1,
    }


def _value(name: str, *sizes: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(sizes))


def _weight(graph: ir.Graph, name: str, size: int) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.ones(size, np.float32), name=name))
    graph.register_initializer(value)
    return value


def _linear(graph: ir.Graph, x: ir.Value, size: int, name: str) -> ir.Value:
    return _add(graph, "Int8Linear", [x, _weight(graph, f"{name}.packed", size)], name, size, domain=CPU_DOMAIN)


def _add(graph: ir.Graph, operator: str, inputs: list[ir.Value], name: str, size: int, **fields) -> ir.Value:
    domain = fields.pop("domain", "")
    node = ir.node(operator, inputs, fields, domain=domain, outputs=[_value(name, "B", "T", size)])
    graph.append(node)
    return node.outputs[0]


def _normed(graph: ir.Graph, x: ir.Value) -> ir.Value:
    return _add(graph, "RMSNormalization", [x, _weight(graph, "norm", WIDTH)], "normed", WIDTH, axis=-1, epsilon=1e-6)


def _fused(*build: Callable[[ir.Graph, ir.Value], ir.Value]) -> tuple[ir.Model, list[ir.Node]]:
    """The graph that has what each `build` makes of its input as an output, after all passes, and its products."""
    x = _value("x", "B", "T", WIDTH)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 24, CPU_DOMAIN: 1}, name="linears")
    for make in build:
        graph.outputs.append(make(graph, x))
    model = ir.Model(graph, ir_version=11)
    fuse_linears(model)
    return model, [node for node in model.graph if node.op_type == "Int8Linear"]


def test_a_norm_that_somebody_else_reads_stays() -> None:
    normed: list[ir.Value] = []

    def twice(graph: ir.Graph, x: ir.Value) -> ir.Value:
        normed.append(_normed(graph, x))
        return _linear(graph, normed[0], 8, "first")

    model, (first, second) = _fused(twice, lambda graph, x: _linear(graph, normed[0], 8, "second"))
    assert count_operators(model)["RMSNormalization"] == 1
    assert "prologue" not in first.attributes.keys() | second.attributes.keys()


def test_a_norm_is_taken_in_through_rows_that_are_picked_behind_it() -> None:
    def picked(graph: ir.Graph, x: ir.Value) -> ir.Value:
        rows = ir.node("Reshape", [_normed(graph, x), _weight(graph, "shape", 2)], outputs=[_value("rows", "N", WIDTH)])
        graph.append(rows)
        return _linear(graph, _add(graph, "Gather", [rows.outputs[0], x], "picked", WIDTH, axis=0), 8, "y")

    model, (product,) = _fused(picked)
    assert count_operators(model) == {"Reshape": 1, "Gather": 1, "Int8Linear": 1}
    assert product.attributes["prologue"].value == Prologue.RMS_NORM


def test_a_gate_needs_its_halves_in_order() -> None:
    def gated(graph: ir.Graph, x: ir.Value, gate: int, name: str) -> ir.Value:
        split = ir.node("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2)
        for half in split.outputs:
            half.shape = ir.Shape(["B", "T", WIDTH // 2])
        graph.append(split)
        activated = _add(graph, "Gelu", [split.outputs[gate]], f"{name}.gelu", WIDTH // 2, approximate="tanh")
        product = _add(graph, "Mul", [split.outputs[1 - gate], activated], f"{name}.product", WIDTH // 2)
        return _linear(graph, product, 8, name)

    model, (first, second) = _fused(
        lambda graph, x: gated(graph, x, 0, "gate first"), lambda graph, x: gated(graph, x, 1, "gate last")
    )
    assert (first.attributes["prologue"].value, first.inputs[0].name) == (Prologue.GELU_TANH_GATE, "x")
    assert (count_operators(model)["Gelu"], "prologue" in second.attributes) == (1, False)


def test_biases_of_joined_layers_are_side_by_side_and_the_residual_comes_last() -> None:
    def layer(graph: ir.Graph, x: ir.Value) -> ir.Value:
        sizes = (16, 8)
        split = ir.node("Split", [_linear(graph, x, 24, "joined")], {"axis": -1}, num_outputs=2)
        graph.append(split)
        sums = []
        for part, size in zip(split.outputs, sizes, strict=True):
            part.shape = ir.Shape(["B", "T", size])
            sums.append(_add(graph, "Add", [part, _weight(graph, f"bias{size}", size)], f"sum{size}", size))
        both = _add(graph, "Concat", [*sums, sums[1]], "both", WIDTH, axis=-1)
        biased = _add(graph, "Add", [_linear(graph, both, WIDTH, "y"), _weight(graph, "bias", WIDTH)], "biased", WIDTH)
        return _add(graph, "Add", [x, biased], "z", WIDTH)

    model, (first, second) = _fused(layer)
    assert count_operators(model) == {"Int8Linear": 2, "Split": 1, "Concat": 2}
    assert [value.name for value in first.inputs[4].producer().inputs] == ["bias16", "bias8"]
    assert [value and value.name for value in second.inputs[3:]] == [None, "bias", "x"]
    assert model.graph.outputs[0].name == "z"


def test_slices_may_be_bounded_by_numbers_of_any_type() -> None:
    def number(graph: ir.Graph, value: int) -> ir.Value:
        made = ir.val(f"number.{value}", const_value=ir.tensor(np.array([value], np.int32)))
        if made.name not in graph.initializers:
            graph.register_initializer(made)
        return graph.initializers[made.name]

    def attention(graph: ir.Graph, x: ir.Value) -> ir.Value:
        parts = []
        for start, end in ((0, 16), (16, 24), (24, 2**31 - 1)):
            inputs = [x, *(number(graph, value) for value in (start, end, 2, 1))]
            parts.append(_add(graph, "Slice", inputs, f"from {start}", 16 if start == 0 else 8))
        return _add(graph, "CacheAttention", parts, "y", 16, domain=CPU_DOMAIN)

    model, _ = _fused(attention)
    assert count_operators(model) == {"Slice": 3, "CacheAttention": 1}


@pytest.mark.parametrize(
    ("product", "residual"),
    [(("B", "T"), (1, "T")), (("B", 1), ("B", "T")), ((1, "T"), ("B", "T")), (("B", "T"), (None, "T"))],
)
@pytest.mark.parametrize("total", [("B", "T"), (None, None)])
def test_a_sum_that_is_or_may_be_broadcast_is_no_residual(
    product: tuple[int | str, ...], residual: tuple[int | str | None, ...], total: tuple[str | None, ...]
) -> None:
    other = _value("other", *residual, WIDTH)

    def layer(graph: ir.Graph, x: ir.Value) -> ir.Value:
        graph.inputs.append(other)
        y = _linear(graph, x, WIDTH, "y")
        y.shape = ir.Shape([*product, WIDTH])
        z = _add(graph, "Add", [y, other], "z", WIDTH)
        z.shape = ir.Shape([*total, WIDTH])
        return z

    model, (linear,) = _fused(layer)
    assert count_operators(model)["Add"] == 1
    assert len(linear.inputs) == 2
