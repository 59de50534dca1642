"""A directory as fly-build writes it for TensorRT-LLM's PyTorch backend, and a tensorrt_llm that stands in for it."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fly_trt import LLM
from fly_trt.manifest import Manifest, hash_directory, read_manifest, write_manifest
from served_by_tensorrt_llm import RULE, SPECULATIVE_CONFIG

ROOT = Path(__file__).parents[4]
STAND_IN = Path(__file__).parent / "stand_in"
HOOKED = Path(__file__).parent / "hooked"
"""Has processes start as where fly-trt is installed."""
MakeDirectory = Callable[..., Path]


@pytest.fixture(scope="session")
def make_directory(demo_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeDirectory:
    """make_directory(speculative={...}, **yaml): a directory with other settings than usual; None leaves one out."""

    def make(speculative: dict[str, Any] | None = None, **yaml: Any) -> Path:
        directory = tmp_path_factory.mktemp("tensorrt_llm") / "pair"
        demo = read_manifest(demo_engine)
        shutil.copytree(demo_engine / "tokenizer", directory / "tokenizer")
        arguments = {
            "tensor_parallel_size": 1,
            "max_batch_size": demo.limits.max_batch_size,
            "max_seq_len": demo.limits.max_seq_len,
            "max_num_tokens": demo.limits.max_num_tokens,
            "kv_cache_config": {"enable_block_reuse": True},
            "speculative_config": SPECULATIVE_CONFIG,
        } | yaml
        arguments = {name: value for name, value in arguments.items() if value is not None}
        (directory / "llm_api.yaml").write_text(json.dumps(arguments))  # which is YAML
        of_cpu = {"cpu_kernels": None, "rollout": None}
        models = {
            role: getattr(demo, role).model_dump() | {"model": "llm_api.yaml", "tensorrt": None} | of_cpu
            for role in ("target", "draft")
        }
        models["target"]["source"]["checkpoint"] = "org/target"
        models["target"]["source"]["revision"] = "abc"
        content = demo.model_dump(mode="json") | models
        content |= {
            "backend": "tensorrt-llm",
            "device": "cuda",
            "name": "pair",
            "speculative": RULE | (speculative or {}),
            "files": {name: file.model_dump() for name, file in hash_directory(directory).items()},
        }
        write_manifest(Manifest.model_validate(content), directory)
        return directory

    return make


@pytest.fixture(scope="session")
def directory(make_directory: MakeDirectory) -> Path:
    return make_directory()


@pytest.fixture(scope="module")
def own(demo_engine: Path) -> Iterator[LLM]:
    """fly-trt's own loop, told the same rule."""
    with LLM(demo_engine, speculative_config=RULE) as llm:
        yield llm


@pytest.fixture
def stand_in(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes it importable, and has none of it and of its processes left afterwards. stand_in() is its module."""
    yield from _stand_in(demo_engine, monkeypatch)


@pytest.fixture(scope="session")
def stand_in_of() -> Callable[..., Iterator[Any]]:
    """The same for a fixture of another scope."""
    return _stand_in


def _stand_in(engines: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setenv("STAND_IN_ENGINES", str(engines))
    for variable in ("PYTHONPATH", "STAND_IN_PYTHONPATH"):
        monkeypatch.setenv(variable, os.pathsep.join([str(HOOKED), str(ROOT)]))
    _forget()
    yield lambda: sys.modules["tensorrt_llm"]
    started = sys.modules["tensorrt_llm"].STARTED if "tensorrt_llm" in sys.modules else []
    _forget()
    for llm in started:
        assert llm._executor is None, "an LLM that nobody shut down"


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]
