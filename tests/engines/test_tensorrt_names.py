"""Every name of TensorRT that the code uses exists in both real libraries, with the arguments that it is called with.

Full TensorRT cannot be installed from PyPI alone, so that a wrong name would be found on somebody's GPU.
"""

from pathlib import Path

import pytest

from tensorrt_calls import HOLDS, ONLY_RTX, problem, uses
from tensorrt_modules import MODULES, describe

ROOT = Path(__file__).resolve().parents[2]
# The files that call TensorRT, and what their variables hold where it is something else than elsewhere.
FILES: dict[str, dict[str, str]] = {
    "build/fly_build/tensorrt_builder.py": {},
    "build/fly_build/tensorrt_llm_engine.py": {"engine": ""},  # TensorRT-LLM's own class
    "fly_trt/engines/tensorrt_library.py": {},
    "fly_trt/engines/tensorrt.py": {"cache": "", "runtime": "Runtime"},
    "fly_trt/engines/kernel_cache.py": {"config": "IRuntimeConfig", "cache": "IRuntimeCache"},
}
# For older versions than those that are looked at here, behind a hasattr or a getattr.
OLDER = {"INetworkDefinition.add_attention"}
# What TensorRT-RTX lacks, in the file that builds with full TensorRT alone.
ONLY_FULL = {"INetworkDefinition.add_plugin_v3"}


def holds(file: str) -> dict[str, str]:
    return {name: of for name, of in (HOLDS | FILES[file]).items() if of}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("file", FILES)
def test_names_and_arguments_are_those_of_the_real_module(file: str, module: str) -> None:
    described = describe(module)
    found = uses((ROOT / file).read_text(), described, holds(file))
    assert found
    skipped = OLDER | (ONLY_RTX if module == "tensorrt" else ONLY_FULL)
    named = [use for use in found if not {f"{use.owner}.{use.name}".lstrip("."), use.owner} & skipped]
    assert [text for use in named if (text := problem(use, described))] == []


def test_all_files_that_call_tensorrt_are_read() -> None:
    calling = {
        path.relative_to(ROOT).as_posix()
        for folder in ("fly_trt", "build/fly_build")
        for path in (ROOT / folder).rglob("*.py")
        if any(word in path.read_text() for word in (" trt.", "(trt.", ".trt.", "set_communicator"))
    }
    assert calling == FILES.keys()


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("network.add_shapes(x)", "INetworkDefinition.add_shapes (line 1): no such member"),
        ("network.add_shape()", "INetworkDefinition.add_shape (line 1): takes other arguments"),
        ("network.add_shape(x, y)", "INetworkDefinition.add_shape (line 1): takes other arguments"),
        ("network.add_shape(x).get_output(0).shap", "ITensor.shap (line 1): no such member"),
        ("network.add_slice(x, begin=1, shape=2, stride=3)", "INetworkDefinition.add_slice (line 1): takes other"),
        ("trt.BuilderFlag.TF33", "BuilderFlag.TF33 (line 1): no such member"),
        ("trt.Bilder", "trt.Bilder (line 1): no such name"),
        ("self._context.set_input_shape(name)", "IExecutionContext.set_input_shape (line 1): takes other"),
    ],
)
def test_a_wrong_name_or_argument_is_noticed(source: str, expected: str, module: str) -> None:
    described = describe(module)
    problems = [text for use in uses(source, described) if (text := problem(use, described))]
    assert len(problems) == 1
    assert problems[0].startswith(expected)
