"""Decoders that torch traces once in a run, however many tests and processes export them: each takes seconds.

What is traced depends on the configuration and not on the weights, which are inputs of the graph while torch traces,
and on the length that it is built for only where that says whether a window can be outgrown.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from filelock import FileLock

from fly_build import model_build, pipeline
from fly_build.checkpoint import Checkpoint
from fly_build.export import DecoderGraph, export_decoder
from fly_build.operators import AttentionForm
from fly_build.recipe import load_recipe
from fly_build.sharding import Sharding
from fly_trt.manifest import Manifest

FOLDER = "FLY_TRT_TEST_TRACES"  # the environment's variable: where the processes of a run share them

# Where it was read from, what its weights are, and what other rooms read of it.
NOT_TRACED = {"_name_or_path", "dtype", "initializer_range", "bos_token_id", "eos_token_id", "transformers_version"}


def build(output: Path, **flags: object) -> Manifest:
    """What fly-build makes of these flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_build, "export_decoder", export_once)
        return pipeline.build(pipeline.make_plan(load_recipe(None, dict(flags)), output), lambda *_: None)


def export_once(
    checkpoint: Checkpoint,
    max_seq_len: int,
    *,
    dtype: torch.dtype = torch.float32,
    attention: AttentionForm = "lengths",
    skipped: Collection[int] = (),
    sharding: Sharding | None = None,
) -> DecoderGraph:
    """What export_decoder returns, each time a graph of its own: finishing it changes it."""
    fields = {name: value for name, value in checkpoint.config.to_dict().items() if name not in NOT_TRACED}
    # One that is too long is refused and never saved.
    outgrown = max_seq_len if fields.get("sliding_window") or max_seq_len > checkpoint.max_seq_len else None
    key = json.dumps(
        [fields, outgrown, str(dtype), attention, sorted(skipped), str(sharding)], sort_keys=True, default=str
    )
    path = Path(os.environ[FOLDER]) / f"{hashlib.sha256(key.encode()).hexdigest()}.onnx"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            decoder = export_decoder(
                checkpoint, max_seq_len, dtype=dtype, attention=attention, skipped=skipped, sharding=sharding
            )
            _save(decoder, path)
    return _load(path)


def _save(decoder: DecoderGraph, path: Path) -> None:
    with _parameters_as_inputs(decoder):
        ir.save(decoder.model, path)
    path.with_suffix(".json").write_text(json.dumps(list(decoder.parameters)))


def _load(path: Path) -> DecoderGraph:
    model = ir.load(path)
    names = json.loads(path.with_suffix(".json").read_text())
    num_inputs = len(model.graph.inputs) - len(names)
    parameters = dict(zip(names, model.graph.inputs[num_inputs:], strict=True))
    del model.graph.inputs[num_inputs:]
    return DecoderGraph(model, parameters)


@contextlib.contextmanager
def _parameters_as_inputs(decoder: DecoderGraph) -> Iterator[None]:
    """Only inputs are saved with the graph, so that the parameters are some for a moment."""
    inputs = decoder.model.graph.inputs
    num_inputs = len(inputs)
    inputs.extend(decoder.parameters.values())
    try:
        yield
    finally:
        del inputs[num_inputs:]
