"""LLM on quantised TensorRT engine directories, on the simulated GPU: token for token what ONNX Runtime generates with
float32 weights that are what the codes stand for.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_checkpoints import FORMATS, Floats, write
from safetensors.torch import load_file, save_file

import simulated_engine as simulation
from eval_prompts import load_eval_prompts
from fly_build import quantization as q
from fly_trt import LLM, AcceptanceParams, SamplingParams
from fly_trt.manifest import read_manifest
from simulated_cuda import SimulatedCuda
from simulated_engine import PAIR
from traced_once import build

PROMPTS = [record["prompt"] for record in load_eval_prompts()[::40]]


def _restored(weight: Floats, quantization: str, *, is_output: bool) -> Floats:
    if quantization == "int8" or is_output:
        codes, scales = q.quantize_channels(weight, np.float32)
        return codes * scales
    codes, scales = q.quantize_int4(weight, 64, np.float32)
    return codes * np.repeat(scales, 64, axis=1)


def _with_weights(source: Path, folder: Path, change: Any) -> Path:
    """The checkpoint `source` in float32, its linear layers with the weights that `change(module, weight)` returns."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        config["tie_word_embeddings"] = False
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        weight = tensor.to(torch.float32)
        if module.endswith(("_proj", "lm_head")):
            weight = torch.from_numpy(np.ascontiguousarray(change(module, weight.numpy())))
        tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    for path in source.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _generate(directory: Path) -> list[list[int]]:
    acceptance = AcceptanceParams(acceptance="fly")
    with LLM(directory, speculative_config={"method": "draft_model"}, max_batch_size=3, max_seq_len=300) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=40, acceptance=acceptance))
    return [output.outputs[0].token_ids for output in outputs]


def _reference(folder: Path, target: Path, draft: Path) -> list[list[int]]:
    costs = dict.fromkeys(("draft_token_cost", "verification_token_cost"), 0.1)
    build(folder, target=str(target), draft=str(draft), max_seq_len=300, speculative=costs)
    return _generate(folder)


@pytest.mark.parametrize("quantization", ["int4", pytest.param("int8", marks=pytest.mark.long)])
def test_the_demo_pair_quantised_for_tensorrt(quantization: str, tmp_path: Path, gpu: SimulatedCuda) -> None:
    costs = dict.fromkeys(("draft_token_cost", "verification_token_cost"), 0.1)
    engine = simulation.build(tmp_path / "engine", quantization=quantization, speculative=costs)
    manifest = read_manifest(engine)
    assert manifest.draft is not None
    assert (manifest.target.quantization, manifest.draft.quantization) == (quantization, quantization)

    def change(module: str, weight: Floats) -> Floats:
        return _restored(weight, quantization, is_output=module == "lm_head")

    pair = [_with_weights(PAIR / name, tmp_path / name, change) for name in ("target", "draft")]
    assert _generate(engine) == _reference(tmp_path / "reference", *pair)


def test_a_quantised_checkpoint_with_zero_points_and_a_draft_that_is_not_quantised(
    tmp_path: Path, gpu: SimulatedCuda
) -> None:
    costs = dict.fromkeys(("draft_token_cost", "verification_token_cost"), 0.1)
    layers = write(PAIR / "target", tmp_path / "quantised", FORMATS["awq"])
    engine = simulation.build(tmp_path / "engine", target=str(tmp_path / "quantised"), speculative=costs)
    manifest = read_manifest(engine)
    assert manifest.draft is not None
    assert (manifest.target.quantization, manifest.draft.quantization) == ("int4", "none")

    def change(module: str, weight: Floats) -> Floats:
        return layers[module].weight if module in layers else weight

    target = _with_weights(PAIR / "target", tmp_path / "target", change)
    assert _generate(engine) == _reference(tmp_path / "reference", target, PAIR / "draft")
