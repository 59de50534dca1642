"""The rule gets into every process of TensorRT-LLM, or the process does not start; and out again.

The processes are real, with a Python environment of their own whose site-packages has the .pth of the wheel; the
tensorrt_llm in it is a stand-in.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import hatchling.build
import pytest

import check_tensorrt_llm
from fly_trt.integrations.tensorrt_llm.environment import FORWARDED, STOP_TOKENS_VARIABLE, VARIABLE
from tensorrt_llm_stand_in import INTERFACES, write_package

ROOT = Path(__file__).parents[3]
PTH = "fly_trt_tensorrt_llm.pth"
PROGRAM = """
import json, multiprocessing, os, subprocess, sys


def num_accepted():
    import torch
    from tensorrt_llm._torch.speculative import interface

    class Worker(interface.SpecWorkerBase):
        max_draft_len = 8

    logits = torch.zeros(9, 40)
    logits[:, 7] = 1.0
    draft = torch.full((1, 8), 7)
    draft[0, 0] = 3
    _, num = Worker()._sample_and_accept_draft_tokens_base(logits, draft, 0, 1, interface.SpecMetadata())
    return num.item()


def answer(_):
    with_rule = num_accepted()
    from fly_trt.integrations.tensorrt_llm.install import counts, install, uninstall
    if with_rule > 1:
        install()  # is there: nothing happens
    loosened = counts()
    uninstall()
    uninstall()
    return {"pid": os.getpid(), "with": with_rule, "counts": loosened, "without": num_accepted()}


if __name__ == "__main__":
    answers = [answer(0)]
    if sys.argv[1] == "parent":
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            answers += pool.map(answer, range(2), chunksize=1)
        answers += json.loads(subprocess.check_output([sys.executable, __file__, "child"]))
    print(json.dumps(answers))
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the .pth, this fly_trt and the libraries of this process."""
    folder = tmp_path_factory.mktemp("site")
    venv.create(folder, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / PTH).write_bytes((ROOT / "fly_trt/integrations/tensorrt_llm" / PTH).read_bytes())
    (packages / "_paths.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    return folder


@pytest.fixture
def run(site: Path, tmp_path: Path) -> Run:
    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "program.py").write_text(PROGRAM)
        kept = {name: value for name, value in os.environ.items() if name not in (VARIABLE, STOP_TOKENS_VARIABLE)}
        environment = kept | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"} | variables
        command = [site / "bin" / "python", *(arguments or ("program.py", "child"))]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.parametrize(("release", "as_", "num_answers"), [("1.2", "parent", 4), ("main", "child", 1)])
def test_it_is_in_every_process_and_out_again(
    run: Run, tmp_path: Path, release: str, as_: str, num_answers: int
) -> None:
    write_package(tmp_path, release)
    result = run("program.py", as_, **{VARIABLE: "vllm,0.2", STOP_TOKENS_VARIABLE: "5"})
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert [answer["without"] for answer in answers] == [1] * num_answers
    first = {answer["pid"]: answer for answer in reversed(answers)}  # one of the pool may answer twice, later without
    assert len(first) >= min(num_answers, 3)
    assert all(answer["with"] == 9 and answer["counts"] == [8, 1] for answer in first.values())
    lines = [line for line in result.stderr.splitlines() if "lossy" in line]
    assert len(lines) == len(first)
    for pid in first:
        (line,) = (line for line in lines if f"[process {pid}]" in line)
        assert "vllm,0.2, never loosened: (5,)" in line


def test_without_the_variable_nothing_of_it_is_loaded(run: Run, tmp_path: Path) -> None:
    loaded = "import sys; print([name for name in sys.modules if name.split('.')[0] in ('fly_trt', 'numpy')])"
    assert run("-c", loaded).stdout.strip() == "[]"
    write_package(tmp_path, "1.2")
    (answer,) = json.loads(run().stdout)
    assert (answer["with"], answer["without"]) == (1, 1)


def test_a_process_that_is_told_later_to_accept_exactly_does(run: Run, tmp_path: Path) -> None:
    """As an LLM that is exact tells it before it loads the package, whatever the shell has exported."""
    write_package(tmp_path, "1.2")
    program = """
import os
from fly_trt.integrations.tensorrt_llm.environment import NO_ACCEPTANCE
os.environ.update(NO_ACCEPTANCE)
from tensorrt_llm._torch.speculative.interface import SpecWorkerBase
print(hasattr(SpecWorkerBase._sample_and_accept_draft_tokens_base, "fly_acceptance"))
"""
    result = run("-c", program, **{VARIABLE: "reference"})
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr
    assert "lossy" not in result.stderr


def test_what_finds_or_loads_modules_otherwise_is_left_alone(run: Run, tmp_path: Path) -> None:
    """A finder of the old kind, and a loader that has other modules to load too."""
    write_package(tmp_path, "1.2")
    program = """
import importlib.machinery, importlib.util, sys


class OldFinder:
    def find_module(self, fullname, path=None):
        return None


class Shared:
    def find_spec(self, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if name.startswith("tensorrt_llm._torch.speculative."):
            self.files = getattr(self, "files", {}) | {name: spec.origin}
            spec = importlib.util.spec_from_loader(name, self)
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(open(self.files[module.__name__]).read(), module.__dict__)


sys.meta_path[1:1] = [OldFinder(), Shared()]
from tensorrt_llm._torch.speculative import interface, other
print(hasattr(interface.SpecWorkerBase._sample_and_accept_draft_tokens_base, "fly_acceptance"), other.NUMBER)
"""
    (tmp_path / "tensorrt_llm/_torch/speculative/other.py").write_text("NUMBER = 3\n")
    result = run("-c", program, **{VARIABLE: "reference"})
    assert (result.returncode, result.stdout.strip()) == (0, "True 3"), result.stderr


@pytest.mark.parametrize("variable", [VARIABLE, FORWARDED[VARIABLE]])
def test_with_the_variable_nothing_heavy_is_loaded_before_its_time(run: Run, variable: str) -> None:
    loaded = "import sys; print(sorted({name.split('.')[0] for name in sys.modules} & {'fly_trt', 'numpy', 'torch'}))"
    assert run("-c", loaded, **{variable: "reference"}).stdout.strip() == "['fly_trt']"


@pytest.mark.parametrize(
    ("version", "changes", "value", "said"),
    [
        (
            "1.2.1",
            ("num_contexts: int,\n        batch_size", "batch_size"),
            "vllm",
            "expected SpecWorkerBase._sample_and",
        ),
        ("1.2.1", ("class SpecWorkerBase", "class Other"), "vllm", "found no such method: hold it against"),
        ("1.1.0", ("", ""), "vllm", "tensorrt_llm 1.1.0: expected 1.2.x or 1.3.x"),
        ("1.2.1", ("", ""), "strict", "preset 'strict': expected one of reference"),
    ],
)
def test_what_does_not_fit_does_not_start(
    run: Run, tmp_path: Path, version: str, changes: tuple[str, str], value: str, said: str
) -> None:
    text = INTERFACES["1.2"].read_text(encoding="utf-8")
    assert changes[0] in text
    write_package(tmp_path, "1.2", version=version, interface=text.replace(*changes))
    # Whoever takes a module that cannot be imported for one that is not there, or tries again, does not get it either.
    program = """
try:
    import tensorrt_llm
except ImportError:
    pass
except Exception:
    from tensorrt_llm._torch.speculative import interface
"""
    result = run("-c", program, **{VARIABLE: value})
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("fly_trt.errors.ConfigError: ")
    assert said in last
    if "expected SpecWorkerBase" in said:
        assert "(self, logits, draft_tokens, num_contexts, batch_size, spec_metadata), found (self, logits, dra" in last


@pytest.mark.parametrize("release", INTERFACES)
def test_the_stand_in_has_the_names_of_the_table(tmp_path: Path, release: str) -> None:
    write_package(tmp_path, release)
    assert check_tensorrt_llm.main([str(tmp_path), "--part", "acceptance"]) == 0


def test_by_hand(run: Run, tmp_path: Path) -> None:
    write_package(tmp_path, "main")
    program = """
from fly_trt.errors import ConfigError
from fly_trt.integrations.tensorrt_llm import install
from fly_trt.integrations.tensorrt_llm.environment import Acceptance
try:
    install.install()
except ConfigError as error:
    print(error)
from tensorrt_llm._torch.speculative.interface import SpecWorkerBase
original = SpecWorkerBase._sample_and_accept_draft_tokens_base
install.install(Acceptance("paper"))
installed = SpecWorkerBase._sample_and_accept_draft_tokens_base
install.install(Acceptance("paper"))
try:
    install.install(Acceptance("vllm"))
except ConfigError as error:
    print(error)
print(installed is SpecWorkerBase._sample_and_accept_draft_tokens_base is not original, install.counts())
install.uninstall()
print(original is SpecWorkerBase._sample_and_accept_draft_tokens_base)
"""
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
    unset, other, *others = result.stdout.splitlines()
    assert unset.startswith("FLY_TRT_TRTLLM is not set: expected FLY_TRT_TRTLLM=preset")
    assert "call uninstall() first" in other
    assert others == ["True (0, 0)", "True"]


def test_the_wheel_has_the_line_that_python_runs_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / hatchling.build.build_wheel(str(tmp_path))) as wheel:
        assert [name for name in wheel.namelist() if name.endswith(".pth")] == [PTH]
        (line,) = wheel.read(PTH).decode().splitlines()
    assert line.startswith("import os; ")  # any other line would be a path
