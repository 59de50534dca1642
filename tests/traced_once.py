"""Decoders that torch traces once in a process, however many tests export them: each takes seconds.

What is traced depends on the configuration and not on the weights, which are inputs of the graph while torch traces.
"""

import json
from typing import Any

import torch

from fly_build.checkpoint import Checkpoint
from fly_build.export import DecoderGraph, export_decoder
from fly_build.operators import AttentionForm

_traced: dict[tuple[Any, ...], DecoderGraph] = {}


def export_once(
    checkpoint: Checkpoint,
    max_seq_len: int,
    *,
    dtype: torch.dtype = torch.float32,
    attention: AttentionForm = "lengths",
) -> DecoderGraph:
    """What export_decoder returns, each time a copy: finishing a graph changes it."""
    fields = checkpoint.config.to_dict()
    fields.pop("_name_or_path", None)  # where it was read from
    key = (json.dumps(fields, sort_keys=True, default=str), max_seq_len, dtype, attention)
    if key not in _traced:
        _traced[key] = export_decoder(checkpoint, max_seq_len, dtype=dtype, attention=attention)
    return _copy(_traced[key])


def _copy(decoder: DecoderGraph) -> DecoderGraph:
    """Only inputs are copied with the graph, so that the parameters are some for a moment."""
    inputs = decoder.model.graph.inputs
    num_inputs = len(inputs)
    inputs.extend(decoder.parameters.values())
    model = decoder.model.clone()
    parameters = dict(zip(decoder.parameters, model.graph.inputs[num_inputs:], strict=True))
    del inputs[num_inputs:], model.graph.inputs[num_inputs:]
    return DecoderGraph(model, parameters)
