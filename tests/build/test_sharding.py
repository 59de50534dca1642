"""Tensor parallelism without a GPU: the sharded graphs of all ranks, merged into one, compute what transformers
computes, for every supported architecture; and the arithmetic of what a rank has, for sizes drawn at random.
"""

from pathlib import Path

import pytest
from merged_ranks import MergedRunner
from test_architectures import CONFIGS

from fly_build.checkpoint import open_checkpoint
from tiny_models import check_against_transformers, save_tiny


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_together_compute_what_transformers_computes(name: str, num_ranks: int, tmp_path: Path) -> None:
    """Prefill, continuation and rewind of ragged rows. Two key-value heads: at four ranks, two have the same one."""
    model = save_tiny(CONFIGS[name](), tmp_path)
    runner = MergedRunner(open_checkpoint(str(tmp_path)), num_ranks, tmp_path / "merged.onnx")
    check_against_transformers(model, runner)
