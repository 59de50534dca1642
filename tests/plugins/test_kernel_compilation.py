"""nvcc accepts the plugins' kernels for every GPU generation they are built for, without warnings or spills."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from kernel_library import find_nvcc

PLUGINS = Path(__file__).parents[2] / "plugins"
SOURCES = [
    "entropy_gate/entropy_gate.cu",
    "loose_window_accept/loose_window_accept.cu",
    "packed_accept/packed_accept.cu",
]
NUM_KERNELS = {SOURCES[0]: 12, SOURCES[1]: 1, SOURCES[2]: 13}
ARCHITECTURES = [80, 86, 89, 90, 100, 120]
EVERYDAY_ARCHITECTURES = [80, 90]
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-I", str(PLUGINS)]
VECTORS_PER_THREAD = 8
KERNEL = re.compile(
    r"(reduceChunks|mergeChunks|acceptRows|findDrafts|reduceDraftRows|loosenRows)"
    r"(?:INS\d?_(?:12entropy_gate)?\d+?([A-Z][a-z]+\d+)ELi(\d+)E)?"
)
COMPILED = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?P<memory>[^\n]*)",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = find_nvcc()
    if found is None:
        pytest.skip("nvcc was not found on the PATH or in CUDA_HOME: the kernels are not compiled")
    return found


def run(*command: str) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def kernel_name(mangled: str) -> str:
    found = KERNEL.search(mangled)
    assert found, mangled
    kernel, logits_type, top = found.groups()
    return f"{kernel}<{logits_type}, {top}>" if logits_type else kernel


@pytest.fixture(scope="module", params=[80, 90])
def architecture(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def ptx(nvcc: str, architecture: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The PTX of each of EntropyGate's kernels."""
    output = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    run(
        nvcc,
        *FLAGS,
        f"-arch=compute_{architecture}",
        "-ptx",
        str(PLUGINS / "entropy_gate/entropy_gate.cu"),
        "-o",
        str(output),
    )
    entries = re.split(r"^(?=\.visible \.entry|\.entry|\.weak \.entry)", output.read_text(), flags=re.MULTILINE)[1:]
    return {kernel_name(entry.split("(", 1)[0]): entry for entry in entries}


@pytest.mark.parametrize("source", NUM_KERNELS)
def test_kernels_compile_without_warnings_and_spills(
    nvcc: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_long: bool
) -> None:
    supported = run(nvcc, "--list-gpu-code")
    wanted = ARCHITECTURES if is_long else EVERYDAY_ARCHITECTURES
    architectures = [number for number in wanted if f"sm_{number}\n" in supported]
    assert {80, 90} <= set(architectures)
    targets = [f"-gencode=arch=compute_{number},code=[compute_{number},sm_{number}]" for number in architectures]
    output = run(nvcc, *FLAGS, *targets, "-Xptxas", "-v", "-fatbin", str(PLUGINS / source), "-o", str(tmp_path / "out"))
    compiled = [found.groupdict() for found in COMPILED.finditer(output)]
    with capsys.disabled():
        print()
        for kernel in sorted(compiled, key=lambda kernel: (int(kernel["architecture"]), kernel_name(kernel["name"]))):
            shared = re.search(r"(\d+) bytes smem", kernel["memory"])
            print(
                f"sm_{kernel['architecture']:<3} {kernel_name(kernel['name']):28} {kernel['registers']:>3} registers, "
                f"{shared[1] if shared else 0:>3} bytes shared, {kernel['stores']} + {kernel['loads']} bytes spilled"
            )
    counts = Counter(int(kernel["architecture"]) for kernel in compiled)
    assert counts == dict.fromkeys(architectures, NUM_KERNELS[source])
    for kernel in compiled:
        assert (kernel["stack"], kernel["stores"], kernel["loads"]) == ("0", "0", "0"), kernel


def test_logits_are_read_once_in_vectors_of_16_bytes(ptx: dict[str, str]) -> None:
    reducing = {name: code for name, code in ptx.items() if name.startswith("reduce")}
    assert len(reducing) == 6
    for name, code in reducing.items():
        loads = Counter(re.findall(r"ld\.global[\w.:]*", code))
        width = r"\.[ub](128|32)$"
        streamed = sum(n for load, n in loads.items() if re.search(r"\.cs\.v4" + width, load))
        cached = sum(n for load, n in loads.items() if re.search(r"\.nc\.v4" + width, load))
        # Aligned rows, chunks inside and at the end; two words for each vector of other rows; and the loop over the
        # elements of a row's ends.
        assert (streamed, cached) == (2 * VECTORS_PER_THREAD, 2 * VECTORS_PER_THREAD), (name, loads)
        assert sum(loads.values()) - streamed - cached == 1, (name, loads)


def test_the_merge_waits_for_the_chunks_where_it_may_start_early(architecture: int, ptx: dict[str, str]) -> None:
    """The launch lets it start early only where the code was compiled for sm_90 or newer."""
    for name, code in ptx.items():
        wanted = "griddepcontrol.wait" if name.startswith("merge") else "griddepcontrol.launch_dependents"
        assert (wanted in code) == (architecture >= 90), name


def test_the_merge_loads_the_tokens_logit_before_it_waits(architecture: int, ptx: dict[str, str]) -> None:
    """A volatile load, which the assembler leaves where it stands."""
    for name, code in ptx.items():
        if name.startswith("merge"):
            before, *after = code.split("griddepcontrol.wait")
            assert len(after) == (architecture >= 90), name
            assert len(re.findall(r"ld\.volatile\.global", before)) == 1, name
