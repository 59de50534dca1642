"""A step looks at the vocabulary for the positions that it is asked of, in whatever form the projection is stored and
whatever is behind it. What every architecture makes of logits is in test_architectures.py.
"""

from pathlib import Path

import pytest
from merged_ranks import MergedRunner, rank_graph

from fly_build.checkpoint import open_checkpoint
from fly_build.linear_forms import Kernels
from fly_trt.manifest import Quantization
from tiny_models import check_asked_positions, save_tiny, tiny_llama, tiny_runner

FORMS: list[tuple[Quantization, Kernels]] = [
    ("none", "cpu"),
    ("int8", "cpu"),
    ("int4", "cpu"),
    ("int8", "cuda"),
    ("int8", "tensorrt"),
    ("int4", "tensorrt"),
]


@pytest.mark.parametrize(("quantization", "kernels"), FORMS)
def test_in_every_form_of_the_projection(quantization: Quantization, kernels: Kernels, tmp_path: Path) -> None:
    attention = "mask" if kernels == "tensorrt" else "lengths"
    forms = {"quantization": quantization, "kernels": kernels, "attention": attention}
    _, runner, graph = tiny_runner(tiny_llama(), tmp_path, **forms)
    check_asked_positions(runner, graph)


def test_with_the_embedding_table_as_the_projection(tmp_path: Path) -> None:
    _, runner, graph = tiny_runner(tiny_llama(tie_word_embeddings=True), tmp_path, quantization="int8")
    check_asked_positions(runner, graph)


def test_on_every_rank_of_several(tmp_path: Path) -> None:
    """What the ranks say of themselves is of the same positions."""
    save_tiny(tiny_llama(), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    runner = MergedRunner(checkpoint, 2, tmp_path / "model.onnx")
    check_asked_positions(runner, rank_graph(checkpoint, runner.sharding, 0))
