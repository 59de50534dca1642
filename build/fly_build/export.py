"""From a transformers model without weights to one ONNX opset-24 decoder graph with the contract's names.

Parameters are graph inputs while torch traces, so that no exporter pass reads, folds or copies a value; weights.py
turns them into initializers afterwards. The graph computes in float32 or in the dtype asked for.
"""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch

from fly_build.blocks import drop_silent, kept_attentions, num_blocks, silence
from fly_build.checkpoint import LENGTH_DEPENDENT_ROPE, Checkpoint
from fly_build.collectives import add_collectives, add_rank_output
from fly_build.graph_edits import DTYPES
from fly_build.operators import OPSET_VERSION, AttentionForm, onnx_operators, trace_step
from fly_build.sharding import Sharding
from fly_build.step_tensors import PAST, PRESENT, is_cache
from fly_build.tensors import OUTPUT_NAME
from fly_trt.engines.base import POSITIONS_INPUT
from fly_trt.errors import CheckpointError
from fly_trt.manifest import Dtype


@dataclass(frozen=True)
class DecoderGraph:
    """`model` has the step's inputs and outputs of DESIGN's contract without the head; `parameters` are the graph
    inputs that still wait for their values, by parameter name."""

    model: ir.Model
    parameters: dict[str, ir.Value]

    @property
    def cache_dtype(self) -> Dtype:
        """Of keys and values."""
        cache = next(value for value in self.model.graph.inputs if value.name == f"{PAST}key.0")
        return next(name for name, (_, dtype) in DTYPES.items() if dtype == cache.dtype)

    def copy(self) -> "DecoderGraph":
        """Another one, whose parameters can get other values. While it is copied they are inputs, as when traced."""
        inputs = self.model.graph.inputs
        num_inputs = len(inputs)
        inputs.extend(self.parameters.values())
        try:
            model = ir.serde.deserialize_model(ir.serde.serialize_model(self.model))
        finally:
            del inputs[num_inputs:]
        parameters = dict(zip(self.parameters, model.graph.inputs[num_inputs:], strict=True))
        del model.graph.inputs[num_inputs:]
        return DecoderGraph(model, parameters)


class _ParameterInputs(torch.nn.Module):
    """Calls the decoder with parameters that came in as inputs."""

    def __init__(self, model: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.decoder: torch.nn.Module
        self.__dict__["decoder"] = _Decoder(model)  # not a submodule: its parameters must not be exported
        self.names = [f"model.{name}" for name in names]

    def forward(
        self,
        input_ids: torch.Tensor,
        write_indices: torch.Tensor,
        logits_positions: torch.Tensor,
        past: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> Any:
        parameters = dict(zip(self.names, values, strict=True))
        return torch.func.functional_call(self.decoder, parameters, (input_ids, write_indices, logits_positions, past))


class _Decoder(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        write_indices: torch.Tensor,
        logits_positions: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        return trace_step(self.model, input_ids, write_indices, logits_positions, past)


def export_decoder(
    checkpoint: Checkpoint,
    max_seq_len: int,
    *,
    dtype: torch.dtype = torch.float32,
    attention: AttentionForm = "lengths",
    skipped: Collection[int] = (),
    sharding: Sharding | None = None,
) -> DecoderGraph:
    """Traces the decoder. Inputs input_ids, write_indices, logits_positions, past_key.i, past_value.i; outputs logits
    [B, L, V] at those positions (operators.trace_step) and present_*. Without the blocks `skipped` (blocks.py): i then
    counts the attentions that are left, and parameters that nothing reads any more are among those that wait for
    values. With `sharding` it is the decoder of one rank, whichever.

    `max_seq_len` decides whether a sliding window can ever be outgrown, `dtype` is that of arithmetic, parameters and
    cache (norms and softmax stay float32). Raises CheckpointError when torch cannot export the model.
    """
    if max_seq_len > checkpoint.max_seq_len:
        raise CheckpointError(
            f"{checkpoint.name}: positions beyond {checkpoint.max_seq_len} are not supported, "
            f"asked for max_seq_len {max_seq_len}: use --max-seq-len {checkpoint.max_seq_len} or less"
        )
    if sharding is not None:
        checkpoint = replace(checkpoint, config=sharding.rank_config(checkpoint.config))
    is_shared = dtype == torch.float32 and not skipped and sharding is None
    model = checkpoint.empty_model if is_shared else checkpoint.make_empty_model(dtype)
    silence(model, skipped)
    if sharding is not None:
        add_collectives(model, sharding)
    parameters = dict(model.state_dict(keep_vars=True).items())
    names = list(parameters)
    num_layers = len(kept_attentions(num_blocks(checkpoint), skipped))
    cache_shape = (2, checkpoint.num_kv_heads, 64, checkpoint.head_dim)
    past = [torch.zeros(cache_shape, dtype=dtype) for _ in range(2 * num_layers)]
    batch, length, asked, slot = (torch.export.Dim(name) for name in ("B", "T", "L", "S"))
    ids, positions = torch.ones(2, 5, dtype=torch.int64), torch.tensor([[2, 3, 4], [7, 8, 9]])
    arguments = (ids, torch.tensor([3, 7]), positions, past, [parameters[name] for name in names])
    shapes = (
        {0: batch, 1: length},
        {0: batch},
        {0: batch, 1: asked},
        [{0: batch, 2: slot} for _ in past],
        [None] * len(names),
    )
    operators = onnx_operators(model, checkpoint.head_dim, max_seq_len, attention)
    with operators, _fixed_rotary(model), _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _ParameterInputs(model, names).eval(),
                arguments,
                dynamo=True,
                opset_version=OPSET_VERSION,
                dynamic_shapes=shapes,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"{checkpoint.name}: torch cannot export {checkpoint.architecture}: {reason}"
            ) from error
    assert program is not None
    decoder = _name_contract(program.model, names, num_layers)
    drop_silent(decoder.model)
    if sharding is not None:
        add_rank_output(decoder.model.graph, decoder.parameters[OUTPUT_NAME])
    return decoder


def _name_contract(model: ir.Model, names: list[str], num_layers: int) -> DecoderGraph:
    graph = model.graph
    cache = [f"{kind}.{layer}" for layer in range(num_layers) for kind in ("key", "value")]
    inputs = ["input_ids", "write_indices", POSITIONS_INPUT, *(f"{PAST}{name}" for name in cache), *names]
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    outputs = ["logits", *(f"{PRESENT}{name}" for name in cache)]
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    batch, length, asked = (ir.SymbolicDim(name) for name in ("B", "T", "L"))
    by_name = {value.name: value for value in graph.inputs}
    shapes = {
        "input_ids": ir.Shape([batch, length]),
        "write_indices": ir.Shape([batch]),
        POSITIONS_INPUT: ir.Shape([batch, asked]),
    }
    names_of: dict[str, ir.SymbolicDim] = {}
    for name, shape in shapes.items():
        traced = by_name[name].shape
        assert traced is not None
        names_of |= {str(old): new for old, new in zip(traced, shape, strict=True) if isinstance(new, ir.SymbolicDim)}
        by_name[name].shape = shape
    for value in (output for node in graph for output in node.outputs if output.shape is not None):
        assert value.shape is not None
        value.shape = ir.Shape([names_of.get(str(size), size) for size in value.shape])
    for value in (*graph.inputs, *graph.outputs):
        if is_cache(value) and value.shape is not None:
            _, heads, _, channels = value.shape
            value.shape = ir.Shape([batch, heads, ir.SymbolicDim("S"), channels])
    logits = graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([batch, asked, logits.shape[2]])
    parameters = {name: by_name[name] for name in names}
    for value in parameters.values():
        graph.inputs.remove(value)
    model.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.name = None
    return DecoderGraph(model, parameters)


@contextlib.contextmanager
def _fixed_rotary(model: torch.nn.Module) -> Iterator[None]:
    """Rotary frequencies that transformers would switch on the sequence's length stay those of the built length."""
    switched = []
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        kinds = types.values() if isinstance(types, dict) else [types]
        if any(kind in LENGTH_DEPENDENT_ROPE for kind in kinds):
            module.forward = inspect.unwrap(type(module).forward).__get__(module)
            switched.append(module)
    try:
        yield
    finally:
        for module in switched:
            del module.forward


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns about its own internals and about torchvision; neither concerns the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
