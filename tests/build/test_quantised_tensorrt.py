"""Quantised engines, really built by TensorRT-RTX: their weights stay packed in the plan, attention stays native, fp8
asks for the GPUs that have it, and checkpoints that are quantised already are built as they are.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import FORMATS, write

from fly_build import tensorrt_builder
from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe
from fly_trt.engines.tensorrt_library import Library, import_library
from fly_trt.errors import EngineError
from fly_trt.manifest import Limits, Manifest
from tiny_models import MAX_SEQ_LEN, add_demo_tokenizer, save_tiny, tiny_llama

pytest.importorskip("tensorrt_rtx")

SMALL = {"max_seq_len": MAX_SEQ_LEN, "max_num_tokens": 64, "max_draft_len": 8}
NUM_LAYERS = 2
HIDDEN, NARROW, WIDE = 1024, 1024, 3072
BYTES_PER_WEIGHT = {"int8": 1.0, "int4": 0.5 + 2 / 64, "fp8": 1.0}
LONG = pytest.mark.long


def _checkpoint(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    save_tiny(tiny_llama(vocab_size=896, **changes), folder, dtype)
    add_demo_tokenizer(folder)
    return folder


def _build(target: Path, output: Path, **fields: Any) -> Manifest:
    flags = {"backend": "tensorrt", "tensorrt_library": "tensorrt_rtx", "target": str(target), **SMALL, **fields}
    return build(make_plan(load_recipe(None, flags), output), lambda *_: None)


@pytest.mark.parametrize("quantization", ["int4", pytest.param("int8", marks=LONG), pytest.param("fp8", marks=LONG)])
def test_a_plan_grows_by_its_packed_weights(quantization: str, tmp_path: Path) -> None:
    """Two models that differ in the width of their MLP; the rest of a plan, mostly kernels, is nearly the same."""
    sizes = []
    for width in (NARROW, WIDE):
        heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 1}
        folder = tmp_path / str(width)
        checkpoint = _checkpoint(folder, torch.bfloat16, hidden_size=HIDDEN, intermediate_size=width, **heads)
        manifest = _build(checkpoint, folder / "engine", quantization=quantization)
        assert manifest.target.quantization == quantization
        sizes.append(manifest.files["target/model.plan"].size)
    weights = 3 * HIDDEN * (WIDE - NARROW)
    assert (sizes[1] - sizes[0]) / weights == pytest.approx(BYTES_PER_WEIGHT[quantization], rel=0.06)


@pytest.mark.parametrize("quantization", ["int8", "fp8", pytest.param("int4", marks=LONG)])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=LONG)])
def test_attention_stays_native_and_fp8_needs_a_newer_gpu(
    quantization: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint")
    manifest = _build(checkpoint, tmp_path / "engine", quantization=quantization, dtype=dtype)
    record = manifest.target.tensorrt
    assert record is not None
    assert (record.layers.native_attention, record.layers.kv_cache_update) == (NUM_LAYERS, 2 * NUM_LAYERS)
    assert record.compute_capability == ("8.9" if quantization == "fp8" else "8.0")
    says_hopper = "tensorrt_rtx supports no Hopper (H100, H200): for those build with --tensorrt-library tensorrt"
    assert (says_hopper in caplog.text) == (quantization == "fp8")


CHECKPOINTS = ["awq", "modelopt fp8"]
MORE_CHECKPOINTS = [name for name in FORMATS if name not in CHECKPOINTS]


@pytest.mark.parametrize("name", [*CHECKPOINTS, *(pytest.param(name, marks=LONG) for name in MORE_CHECKPOINTS)])
def test_quantised_checkpoints_are_built_as_they_are(name: str, tmp_path: Path) -> None:
    original = _checkpoint(tmp_path / "original", intermediate_size=128)
    write(original, tmp_path / "quantised", FORMATS[name])
    manifest = _build(tmp_path / "quantised", tmp_path / "engine")
    assert manifest.target.quantization == FORMATS[name].kind
    record = manifest.target.tensorrt
    assert record is not None
    assert record.layers.native_attention == NUM_LAYERS


def test_a_gpu_without_fp8_is_said_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full TensorRT builds for the GPU that is there."""
    library = Library("tensorrt", import_library("tensorrt_rtx").trt)
    sizes = tensorrt_builder.Sizes.of(Limits(max_batch_size=1, max_seq_len=64, max_draft_len=0, max_num_tokens=8))
    monkeypatch.setattr(tensorrt_builder, "_compute_capability", lambda: "8.6")
    message = (
        "fp8 needs compute capability 8.9 or later, this GPU has 8.6: use --quantization int8, or build on the GPU"
    )
    with pytest.raises(EngineError, match=message):
        tensorrt_builder.EngineBuilder(library, sizes, "bfloat16", None, None, needs_fp8=True)
