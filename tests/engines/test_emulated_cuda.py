"""The real CUDA provider of onnxruntime-gpu over emulated CUDA libraries (tests/emulated_cuda): what of an engine's
graph runs on the GPU, what may be captured, and what is copied, through the product's own engine. What it computes is
not looked at: no kernel runs.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import transformers
from filelock import FileLock

from tiny_models import SHAPE, add_demo_tokenizer, save_tiny, tiny_llama
from traced_once import build

VERSION = "1.31.1"
TESTS = Path(__file__).resolve().parents[1]
EMULATION = TESTS / "emulated_cuda"
PROVIDER_LIBRARY = Path("onnxruntime/capi/libonnxruntime_providers_cuda.so")
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
SHAPE_ARITHMETIC = {"Concat", "Squeeze"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "mistral": lambda: transformers.MistralConfig(**{**SHAPE, "sliding_window": 16}),
    "gemma2": lambda: transformers.Gemma2Config(**{**SHAPE, "head_dim": 16, "sliding_window": 16}),
}
FORMS = {
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}
# Every form of weights, and every form of attention.
EVERYDAY = [*(("llama", form) for form in FORMS), ("mistral", "float16"), ("gemma2", "float16"), ("gemma2", "int4")]
LONG = [(model, form) for model in CONFIGS for form in FORMS if (model, form) not in EVERYDAY]
BuildOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def gpu_package() -> Path:
    """A folder with the package onnxruntime-gpu alone, beside the environment, which has the CPU's. 340 MB, kept."""
    folder = Path(sys.prefix) / f"onnxruntime-gpu-{VERSION}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", partial]
            result = subprocess.run([*command, f"onnxruntime-gpu=={VERSION}"], capture_output=True, text=True)
            if result.returncode and "CI" not in os.environ:
                pytest.skip(f"onnxruntime-gpu {VERSION} is not there and cannot be installed: {result.stderr[-300:]}")
            assert result.returncode == 0, result.stderr
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def emulated_libraries(gpu_package: Path, build_once: BuildOnce) -> Path:
    def make(folder: Path) -> None:
        subprocess.run([sys.executable, EMULATION / "libraries.py", gpu_package / PROVIDER_LIBRARY, folder], check=True)

    return build_once("emulated_cuda", make)


@pytest.fixture
def run_steps(gpu_package: Path, emulated_libraries: Path) -> Callable[..., dict[str, Any]]:
    """What emulated_cuda/steps.py saw of an engine directory."""

    def run(directory: Path, libraries: Path = emulated_libraries, **settings: str) -> dict[str, Any]:
        paths = [gpu_package, TESTS.parent, *map(Path, filter(None, [os.environ.get("PYTHONPATH")]))]
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(libraries),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "EMULATED_SM": "90",
            **settings,
        }
        command = [sys.executable, EMULATION / "steps.py", directory]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def build_tiny(output: Path, config: Any, **flags: Any) -> None:
    checkpoint = output.with_suffix(".checkpoint")
    save_tiny(config, checkpoint)
    add_demo_tokenizer(checkpoint)
    limits = {"max_batch_size": 2, "max_seq_len": 64, "max_draft_len": 8, "max_num_tokens": 64}
    build(output, target=str(checkpoint), **limits, **flags)


@pytest.mark.parametrize(
    ("model", "form"), [*EVERYDAY, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_all_but_shape_arithmetic_runs_on_the_gpu_and_is_captured(
    model: str, form: str, build_once: BuildOnce, run_steps: Callable[..., dict[str, Any]]
) -> None:
    config = CONFIGS[model]()
    directory = build_once(f"{model}_{form}", lambda path: build_tiny(path, config, device="cuda", **FORMS[form]))
    seen = run_steps(directory)
    assert "refused" not in seen, seen["refused"]
    nodes = seen["nodes"]
    assert set(nodes) == {CUDA, CPU}
    assert not [name for provider in nodes.values() for name in provider if "Memcpy" in name]
    assert set(nodes[CPU]) <= SHAPE_ARITHMETIC
    assert {"Attention", "TensorScatter", "TopK", "Softmax"} <= set(nodes[CUDA])
    assert ("MatMulNBits" in nodes[CUDA]) == ("quantization" in FORMS[form])
    *verifications, prompt = seen["steps"]
    for step in verifications:
        first, *others = step["runs"]
        # Two runs that make all ready, and a third that is captured and then launched.
        assert (first["captures"], first["graphs"], first["graph_launches"]) == (1, 1, 1)
        assert 3 * first["captured_launches"] == first["launches"] > 50
        for run in others:
            assert (run["launches"], run["captures"], run["graph_launches"]) == (0, 0, 1)
    for run in prompt["runs"]:
        assert (run["captures"], run["graph_launches"]) == (0, 0)
        assert run["launches"] > 50
    runs = [run for step in seen["steps"] for run in step["runs"]]
    assert all(run["host_copies"] == 0 for run in runs)  # but for the step's own, whose direction CUDA finds out
    assert (sum(run["faults"] for run in runs), seen["fault"]) == (0, "")
    assert seen["largest_device_copy"] < seen["cache_bytes"] // 4  # caches are updated in place
    assert seen["graphs_left"] == 0


def test_steps_that_cannot_be_captured_run_without_a_graph(
    build_once: BuildOnce, run_steps: Callable[..., dict[str, Any]]
) -> None:
    config = CONFIGS["llama"]()
    directory = build_once("llama_float16", lambda path: build_tiny(path, config, device="cuda", **FORMS["float16"]))
    seen = run_steps(directory, EMULATED_CAPTURES_FAIL="1")
    runs = [run for step in seen["steps"] for run in step["runs"]]
    assert [run["captures"] for run in runs] == [1] + [0] * (len(runs) - 1)
    assert sum(run["graph_launches"] for run in runs) == 0
    assert all(run["launches"] > 50 for run in runs)
    assert "cannot be captured" in seen["fault"]


def changed(directory: Path, output: Path, change: Callable[[ir.Model], None]) -> Path:
    """The engine directory with another graph."""
    shutil.copytree(directory, output)
    path = output / "target" / "model.onnx"
    model = ir.load(path)
    change(model)
    ir.save(model, path)
    manifest = json.loads((output / "fly.json").read_text())
    manifest["files"]["target/model.onnx"]["size"] = path.stat().st_size
    (output / "fly.json").write_text(json.dumps(manifest))
    return output


def pad_next_tokens(model: ir.Model) -> None:
    """Made in the graph, as torch and people write it: the rows without their first tokens, and 0 at the end."""
    graph = model.graph
    given = next(value for value in graph.inputs if value.name == "next_tokens")
    constants = {"pads": [0, 0, 0, 1], "second": [1], "behind": [2**31], "axis": [1]}
    values = {
        name: ir.val(name, const_value=ir.tensor(content, ir.DataType.INT64, name=name))
        for name, content in constants.items()
    }
    for value in values.values():
        graph.register_initializer(value)
    pad = ir.node("Pad", [given, values["pads"]])
    rest = ir.node("Slice", [pad.outputs[0], values["second"], values["behind"], values["axis"]])
    ir.convenience.replace_all_uses_with(given, rest.outputs[0])
    pad.replace_input_with(0, given)
    graph.insert_before(graph[0], [pad, rest])


def add_last_position(model: ir.Model) -> None:
    """The valid length from the number of tokens, which only the host knows."""
    graph = model.graph
    input_ids, write_indices = (
        next(value for value in graph.inputs if value.name == name) for name in ("input_ids", "write_indices")
    )
    length = ir.node("Shape", [input_ids], {"start": 1, "end": 2})
    total = ir.node("Add", [write_indices, length.outputs[0]])
    graph.insert_before(graph[0], [length, total])
    for node in graph:
        if node.op_type == "Attention":
            node.replace_input_with(6, total.outputs[0])


@pytest.mark.parametrize("change", [pad_next_tokens, add_last_position])
def test_a_graph_that_waits_for_the_host_is_refused(
    change: Callable[[ir.Model], None],
    build_once: BuildOnce,
    run_steps: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """So the test above can fail, and an engine never runs on the CPU in parts without a word."""
    config = CONFIGS["llama"]()
    directory = build_once("llama_float16", lambda path: build_tiny(path, config, device="cuda", **FORMS["float16"]))
    seen = run_steps(changed(directory, tmp_path / "changed", change))
    assert "cannot load it: " in seen["refused"]
    assert "graph capture feature" in seen["refused"]


def test_the_graph_of_the_cpu_is_refused(
    build_once: BuildOnce, run_steps: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """It has branches."""
    build_tiny(tmp_path / "cpu", CONFIGS["llama"](), cpu_kernels="off")
    path = tmp_path / "cpu" / "fly.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    assert "control flow nodes" in run_steps(tmp_path / "cpu")["refused"]


def test_missing_cuda_libraries_are_named(
    build_once: BuildOnce, run_steps: Callable[..., dict[str, Any]], emulated_libraries: Path, tmp_path: Path
) -> None:
    shutil.copy(emulated_libraries / "libcudart.so.13", tmp_path)
    config = CONFIGS["llama"]()
    directory = build_once("llama_float16", lambda path: build_tiny(path, config, device="cuda", **FORMS["float16"]))
    refused = run_steps(directory, tmp_path)["refused"]
    assert "cannot load its CUDA provider (libcublas" in refused
    assert "pip install 'fly-trt[cuda]'" in refused
    assert "\n" not in refused
