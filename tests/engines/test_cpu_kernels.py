"""An engine directory whose library of CPU kernels does not run here: one line with what to do."""

import shutil
from pathlib import Path

import pytest

from fly_trt.engines import engine_info
from fly_trt.engines.onnxruntime import OnnxRuntimeEngine
from fly_trt.errors import EngineError
from fly_trt.manifest import read_manifest


@pytest.mark.parametrize(
    ("content", "fix"),
    [
        (b"of another system", "rebuild with fly-build on this machine, or with --cpu-kernels off"),
        (None, "expected one of this machine's kinds: "),
    ],
    ids=["not a library", "a kind that is not there"],
)
def test_a_library_that_does_not_run_here_is_one_line_with_the_fix(
    content: bytes | None,
    fix: str,
    demo_engine: Path,
    cpu_library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = Path(shutil.copy(cpu_library, tmp_path / "libfly_cpu.so"))  # not loaded before, so that it asks again
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setenv("FLY_TRT_CPU_ISA", "avx1024")
    manifest = read_manifest(demo_engine)
    info = engine_info(manifest, manifest.target)
    with pytest.raises(EngineError) as refusal:
        OnnxRuntimeEngine(demo_engine / manifest.target.model, manifest.target, info, num_slots=1, cpu_kernels=library)
    message = str(refusal.value)
    assert message.startswith(f"{library}: ")
    assert fix in message
    assert "\n" not in message
