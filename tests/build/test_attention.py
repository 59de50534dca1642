"""What a token's logits are does not depend on the step that computes them, to the last bit: not on how many tokens
the step has, on other rows, on padding, nor on the steps that filled the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import transformers

from fly_build.checkpoint import Checkpoint, open_checkpoint
from fly_build.linear_form import Kernels
from fly_trt.manifest import Quantization
from tiny_models import MAX_SEQ_LEN, SHAPE, Runner, finish_graph, save_tiny, tiny_llama
from traced_once import export_once

LENGTH = 30
TOKENS = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], LENGTH)
SLIDING = {"sliding_window": 12}
OWN_HEADS = {"num_key_value_heads": SHAPE["num_attention_heads"]}
# Attention with several query heads for each key-value head and with one, with and without a window that the sequence
# outgrows; in gemma2, layers of both kinds squash their scores.
CONFIGS: dict[str, Callable[[], Any]] = {
    "grouped": tiny_llama,
    "ungrouped-sliding": lambda: transformers.MistralConfig(**{**SHAPE, **OWN_HEADS}, **SLIDING),
    "grouped-sliding-softcap": lambda: transformers.Gemma2Config(
        **SHAPE, **SLIDING, head_dim=16, query_pre_attn_scalar=40, attn_logit_softcapping=5.0
    ),
}
STEPS = {
    "all at once": [LENGTH],
    "one by one": [1] * LENGTH,
    "two by two": [2] * (LENGTH // 2),
    "the beginning one by one": [1] * 17 + [13],
    "the middle one by one": [7] + [1] * 12 + [11],
}


QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8")
# How many rows are beside it, and how many tokens of padding behind it.
COMPANY = {"alone": (0, 0), "beside two rows": (2, 0), "beside two rows and padded": (2, 5)}


@dataclass(frozen=True)
class Built:
    checkpoint: Checkpoint
    path: Path
    library: Path | None = None

    def logits(self, steps: list[int], num_mates: int, padding: int) -> npt.NDArray[np.float32]:
        """Logits [LENGTH, V] of TOKENS, processed in steps of these lengths by a row that has half of its mates above
        and half below it, each at another position than it, and `padding` tokens behind it in every step."""
        runner = Runner(self.path, self.checkpoint, 1 + num_mates, self.library)
        row, noise = num_mates // 2, np.random.default_rng(1)
        logits: list[npt.NDArray[np.float32]] = []
        for length in steps:
            cached = sum(map(len, logits))
            ids = noise.integers(3, SHAPE["vocab_size"], (1 + num_mates, length + padding))
            ids[row, :length] = TOKENS[cached : cached + length]
            write_indices = noise.integers(0, MAX_SEQ_LEN - length - padding, 1 + num_mates)
            write_indices[row] = cached
            logits.append(runner.step(ids, write_indices.tolist())["logits"][row, :length])
        return np.concatenate(logits)

    @cached_property
    def expected(self) -> npt.NDArray[np.float32]:
        return self.logits([LENGTH], 0, 0)


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(CONFIGS[request.param](), folder)
    return open_checkpoint(str(folder))


def _built(checkpoint: Checkpoint, folder: Path, kernels: Kernels, library: Path | None = None) -> dict[str, Built]:
    """By quantisation."""
    models = {}
    for quantization in QUANTIZATIONS:
        path = folder / f"{quantization}.onnx"
        decoder = export_once(checkpoint, MAX_SEQ_LEN)
        finish_graph(decoder, checkpoint, path, "float32", quantization, kernels=kernels)
        models[quantization] = Built(checkpoint, path, library)
    return models


@pytest.fixture(scope="module")
def built(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    return _built(checkpoint, tmp_path_factory.mktemp("built"), "cpu")


@pytest.fixture(scope="module")
def built_with_operators(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, cpu_library: Path
) -> dict[str, Built]:
    return _built(checkpoint, tmp_path_factory.mktemp("built"), "fly_cpu", cpu_library)


@pytest.mark.parametrize("company", COMPANY.values(), ids=COMPANY)
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_logits_have_the_same_bits_in_any_steps_beside_any_rows_and_with_padding(
    built: dict[str, Built], quantization: str, steps: list[int], company: tuple[int, int]
) -> None:
    model = built[quantization]
    assert np.array_equal(model.logits(steps, *company), model.expected)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_so_they_have_by_operators_of_this_project(
    built_with_operators: dict[str, Built], quantization: str, steps: list[int]
) -> None:
    model = built_with_operators[quantization]
    assert np.array_equal(model.logits(steps, *COMPANY["beside two rows and padded"]), model.expected)
