"""The table of engine backends: a module and a line in it are all that a new one takes."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import toy_executor
from fly_trt import LLM, ConfigError, EngineError, LoadedEngines, RequestError, SamplingParams
from fly_trt.drafting import DRAFTERS
from fly_trt.engines import BACKENDS, EngineBackend, find_backend
from fly_trt.manifest import (
    SCHEMA_VERSION,
    Device,
    Head,
    Limits,
    Manifest,
    ModelEngine,
    Source,
    hash_directory,
    read_manifest,
    write_manifest,
)
from table_engine import STOP_TOKEN, greedy
from toy_engine import table

TOKENIZER = Path(__file__).parents[1] / "assets" / "pair" / "target"
VOCAB_SIZE = 880
SALTS = {"target": 3, "draft": 4}
NUM_TOKENS = 24
KNOWN = "onnxruntime, tensorrt, tensorrt-llm, tensorrt-llm-engine"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An engine directory for the backend "toy", with the demo pair's tokenizer."""
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, tmp_path / "tokenizer" / name)
    for role, salt in SALTS.items():
        (tmp_path / role).mkdir()
        (tmp_path / role / "model.toy").write_text(str(salt))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        backend="toy",
        name="toy",
        fly_trt_version="0",
        library_versions={},
        limits=Limits(max_batch_size=2, max_seq_len=128, max_draft_len=8, max_num_tokens=32),
        head=Head(entropy_top_k=3, stop_token_ids=[STOP_TOKEN]),
        speculative={"draft_token_cost": 0.1, "verification_token_cost": 0.05},
        target=_model("target"),
        draft=_model("draft"),
        files=hash_directory(tmp_path),
    )
    write_manifest(manifest, tmp_path)
    return tmp_path


def _model(role: str) -> ModelEngine:
    return ModelEngine(
        model=f"{role}/model.toy",
        source=Source(checkpoint="org/toy", architecture="Toy", num_parameters=1),
        vocab_size=VOCAB_SIZE,
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
    )


@pytest.mark.parametrize("method", ["draft_model", None])
def test_a_module_and_a_line_in_the_table_are_a_backend(
    method: str | None, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, ("toy", "cpu"), EngineBackend("toy_engine", is_gpu=False))
    with LLM(directory, speculative_config={"method": method}) as llm:
        (output,) = llm.generate(["Hello, world"], SamplingParams(temperature=0, max_tokens=NUM_TOKENS))
    next_token = table(SALTS["target"], VOCAB_SIZE)
    assert output.outputs[0].token_ids == greedy(next_token, output.prompt_token_ids, NUM_TOKENS)


@pytest.fixture
def counting(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same directory, with a backend that schedules by itself."""
    monkeypatch.setitem(BACKENDS, ("toy", "cpu"), EngineBackend("toy_executor", is_gpu=False, schedules=True))
    toy_executor.CLOSED.clear()
    return directory


def test_a_backend_that_schedules_by_itself_is_a_module_and_a_line_too(counting: Path) -> None:
    with LLM(counting) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": [first]} for first in (5, 7, VOCAB_SIZE - 2)],
            SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True),
        )
        assert toy_executor.CLOSED == []
    for output, first in zip(outputs, (5, 7, VOCAB_SIZE - 2), strict=True):
        assert output.outputs[0].token_ids == [(first + 1 + i) % VOCAB_SIZE for i in range(NUM_TOKENS)]
    assert toy_executor.CLOSED == ["toy"]


def test_what_an_executor_cannot_do_is_refused_before_anything_runs(counting: Path) -> None:
    with LLM(counting) as llm, pytest.raises(RequestError, match=r"temperature 0\.5: the toy samples nothing"):
        llm.generate(["Hello"], SamplingParams(temperature=0.5))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_threads": 2}, "num_threads 2: toy was built for toy, which places its models by itself"),
        ({"device_id": 0}, "device_id 0: toy was built for toy, which places its models by itself"),
        ({"devices": [0]}, r"devices \[0\]: toy was built for toy, which places its models by itself"),
        ({"speculative_config": {"method": "ngram"}}, "method 'ngram': the toy has none"),
        ({"drafter": DRAFTERS["ngram"].make}, "drafter: toy makes its drafts by itself"),
        ({"audit_fraction": 0.1}, r"audit_fraction 0\.1: toy runs its models by itself, and no steps that read a text"),
    ],
)
def test_settings_of_engines_are_not_an_executors(settings: dict[str, Any], said: str, counting: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        LLM(counting, **settings)


def test_what_schedules_by_itself_is_neither_shared_nor_stepped(counting: Path) -> None:
    with LoadedEngines(counting) as engines:
        with pytest.raises(ConfigError, match="toy schedules by itself and is not to be shared"):
            LLM(engines, enable_prefix_caching=False)
        with pytest.raises(EngineError, match="toy runs its models by itself"):
            engines.target.clear(0)
        assert engines.info.vocab_size == VOCAB_SIZE


def test_a_backend_that_is_not_in_the_table_is_refused_with_those_that_are(directory: Path) -> None:
    with pytest.raises(EngineError) as refused:
        LLM(directory)
    assert str(refused.value) == (f"{directory}: built for backend 'toy', this version runs {KNOWN}: rebuild it")


def test_what_is_said_of_a_backend_needs_none_of_its_code(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, ("toy", "cpu"), EngineBackend("a_module_that_is_not_installed", is_gpu=True))
    assert find_backend(directory, read_manifest(directory)).is_gpu
    assert not BACKENDS["onnxruntime", "cpu"].is_gpu
    assert BACKENDS["onnxruntime", "cuda"].is_gpu
    assert BACKENDS["tensorrt", "cuda"].is_gpu


@pytest.mark.parametrize(
    ("backend", "device", "module"),
    [
        ("onnxruntime", None, "onnxruntime"),
        ("onnxruntime", "cpu", "onnxruntime"),
        ("onnxruntime", "cuda", "onnxruntime_cuda"),
        ("tensorrt", None, "tensorrt"),
        ("tensorrt", "cuda", "tensorrt"),
    ],
)
def test_an_engine_is_found_by_backend_and_device(
    backend: str, device: Device | None, module: str, directory: Path
) -> None:
    """Directories of older versions name no device."""
    manifest = read_manifest(directory).model_copy(update={"backend": backend, "device": device})
    assert find_backend(directory, manifest).module == f"fly_trt.engines.{module}"


def test_a_device_that_a_backend_does_not_have_is_refused(directory: Path) -> None:
    manifest = read_manifest(directory).model_copy(update={"backend": "tensorrt", "device": "cpu"})
    with pytest.raises(EngineError, match="built for tensorrt on 'cpu', this version runs it on cuda: rebuild it"):
        find_backend(directory, manifest)
