"""A build needs little more memory than its checkpoint: weights are computed when they are written and dropped after.

The build runs in a process of its own, since the peak of this one says nothing about it. Its peak comes from
/proc/self/status: ru_maxrss starts at the peak of the process that forked it. Of a checkpoint that is mapped from its
files only what is in anonymous memory (RssAnon) has to fit beside it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fly_build.checkpoint import Checkpoint
from tiny_models import TinyPair, add_demo_tokenizer, tiny_llama

STATUS = Path("/proc/self/status")
LARGEST_RATIO = 2.0
BUILD_AND_PRINT_GROWTH = """
import re, sys
from pathlib import Path
from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def run(checkpoint, output):
    recipe = load_recipe(None, {"target": checkpoint, "max_seq_len": 64})
    build(make_plan(recipe, Path(output)), lambda step, fraction: None)

tiny, big, folder = sys.argv[1:]
run(tiny, folder + "/tiny")
before = peak()
run(big, folder + "/big")
print(peak() - before)
"""
BUILD_RANKS_AND_PRINT_GROWTH = """
import contextlib, json, re, sys, threading, time
from pathlib import Path
from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe
from fly_build.tensorrt_builder import EngineBuilder

growth, at = {}, {}

class Written(Exception):
    pass

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    while True:
        for step, begin in list(at.items()):
            growth[step] = max(growth.get(step, 0), anonymous() - begin)
        time.sleep(0.002)

def report(step, fraction):
    if step.endswith("rank 1 of 2: compile"):
        raise Written
    if fraction == 0.0:
        at.clear()
        at[step] = anonymous()
    elif step in at:
        growth[step] = max(growth.get(step, 0), anonymous() - at[step])

sizes = {"max_seq_len": 64, "max_num_tokens": 64, "max_draft_len": 8}
library = {"backend": "tensorrt", "tensorrt_library": "tensorrt_rtx"}
recipe = load_recipe(None, {"target": sys.argv[1], "tp_size": 2, **sizes, **library})
EngineBuilder.build = lambda *arguments: (b"", None)  # takes most of the time and is not what is measured
threading.Thread(target=watch, daemon=True).start()
with contextlib.suppress(Written):
    build(make_plan(recipe, Path(sys.argv[2])), report)
print(json.dumps(growth))
"""


@pytest.fixture
def big_checkpoint(tmp_path: Path) -> Path:
    """A hundred million zeros in bfloat16: what they are does not matter here."""
    folder = tmp_path / "checkpoint"
    sizes = {"hidden_size": 1024, "intermediate_size": 12288, "num_attention_heads": 16, "num_key_value_heads": 4}
    config = tiny_llama(vocab_size=8000, num_hidden_layers=2, **sizes)
    parameters = Checkpoint(str(folder), None, config).empty_model.state_dict()
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    zeros = {name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in parameters.items()}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    add_demo_tokenizer(folder)
    return folder


@pytest.mark.skipif(not STATUS.is_file() or "VmHWM" not in STATUS.read_text(), reason="no peak memory in /proc")
def test_peak_memory_is_at_most_twice_the_checkpoint(big_checkpoint: Path, tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Twice as many bytes are written as read here, so keeping what was written would take three times."""
    command = [sys.executable, "-c", BUILD_AND_PRINT_GROWTH, tiny_pair.target, big_checkpoint, tmp_path]
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    written = (tmp_path / "big" / "target" / "model.onnx.data").stat().st_size
    size = (big_checkpoint / "model.safetensors").stat().st_size
    assert size > 180e6
    assert written == pytest.approx(2 * size, rel=0.01)
    assert int(finished.stdout.split()[-1]) < LARGEST_RATIO * size


@pytest.mark.skipif(not STATUS.is_file() or "RssAnon" not in STATUS.read_text(), reason="no RssAnon in /proc")
def test_a_rank_is_written_with_one_tensor_at_a_time_in_memory(big_checkpoint: Path, tmp_path: Path) -> None:
    """Neither the checkpoint nor a rank's part of it is in memory as a whole, for the first rank or a later one."""
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, "-c", BUILD_RANKS_AND_PRINT_GROWTH, big_checkpoint, tmp_path / "engine"]
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    growth = json.loads(finished.stdout.splitlines()[-1])
    size = (big_checkpoint / "model.safetensors").stat().st_size
    # Of a rank's part, half of all. Its largest tensor is an eighth, there once as it is written and once as it lies in
    # the file, and a process takes some memory besides.
    half_a_part = size / 2 / 2
    for step in ("load weights", "rank 0 of 2: write weights", "rank 1 of 2: write weights"):
        (seen,) = (value for name, value in growth.items() if name.endswith(step))
        assert seen < half_a_part, growth
