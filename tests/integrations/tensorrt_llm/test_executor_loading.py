"""How engines of TensorRT-LLM 1.2 are loaded: with which configuration, on which GPUs, and what is refused before."""

import ast
import inspect
import os
import re
import stat
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simulated_executor
from executor_directory import executor_of, write_directory
from fly_trt import LLM, AcceptanceParams, ConfigError, EngineError, RequestError, SamplingParams
from fly_trt.engines.tensorrt_library import PLUGIN, PLUGIN_VERSION
from fly_trt.integrations.tensorrt_llm import executor
from fly_trt.integrations.tensorrt_llm.names import EXECUTOR
from fly_trt.verification import EXACT

PROMPT = {"prompt_token_ids": [0, 266, 306, 27, 200, 728, 294, 222, 20]}
REWRITTEN = "the engine's logits are rewritten where a draft token is let pass: leave it out"
AFTER = "TensorRT-LLM would apply it after the rule has looked at the logits: leave it out"


@pytest.fixture
def worker(bindings: Any, tmp_path: Path) -> Path:
    """TensorRT-LLM's worker program, as it is installed."""
    path = tmp_path / "tensorrt_llm" / "bin" / "executorWorker"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    return path


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"logprobs": 0}, f"logprobs 0: cannot be had of TensorRT-LLM engines, {REWRITTEN}"),
        ({"prompt_logprobs": 1}, f"prompt_logprobs 1: cannot be had of TensorRT-LLM engines, {REWRITTEN}"),
        ({"presence_penalty": 0.5}, f"presence_penalty 0.5: cannot be had of TensorRT-LLM engines, {AFTER}"),
        ({"frequency_penalty": 0.5}, f"frequency_penalty 0.5: cannot be had of TensorRT-LLM engines, {AFTER}"),
        ({"repetition_penalty": 1.1}, f"repetition_penalty 1.1: cannot be had of TensorRT-LLM engines, {AFTER}"),
        ({"logit_bias": {5: 1.0}}, f"logit_bias {{5: 1.0}}: cannot be had of TensorRT-LLM engines, {AFTER}"),
        ({"bad_words": ["the"]}, f"bad_words ['the']: cannot be had of TensorRT-LLM engines, {AFTER}"),
        ({"structured_outputs": {"regex": "a"}}, f"structured_outputs: cannot be had of TensorRT-LLM engines, {AFTER}"),
        ({"speculation_trace": True}, "speculation_trace True: cannot be had of TensorRT-LLM engines"),
        ({"draft_stop": "adasd"}, "draft_stop 'adasd': cannot be had of TensorRT-LLM engines"),
        ({"min_tokens": 3}, "min_tokens 3: cannot be had of TensorRT-LLM engines, to which each round is a request"),
        ({"stop_token_ids": [1, 40]}, "stop_token_ids [40]: the engine was built never to loosen [1] alone"),
        ({"acceptance": AcceptanceParams(exact_first=4)}, "exact_first, exact_token_ids, exact_within"),
        ({"acceptance": EXACT}, "acceptance exact: the engine was built with FlyPolicy("),
        ({"acceptance": AcceptanceParams(acceptance="typical")}, "acceptance TypicalPolicy("),
        ({"acceptance": AcceptanceParams(preset="vllm")}, "the engine was built with FlyPolicy("),
        (
            {"acceptance": AcceptanceParams(fly_entropy_threshold=0.5)},
            "num_speculative_tokens=0, which is exact",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_had_is_refused_by_name(settings: dict[str, Any], said: str, directory: Path) -> None:
    with LLM(directory) as llm:
        with pytest.raises(RequestError) as refused:
            llm.generate([PROMPT], SamplingParams(**settings))
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)
        assert executor_of("target").num_requests == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"method": "suffix", "acceptance": "fly"},
            "method 'suffix': TensorRT-LLM engines are served with one of None",
        ),
        ({"acceptance": "exact"}, "acceptance exact: demo was built with FlyPolicy"),
        ({"preset": "vllm"}, "was built with FlyPolicy"),
        ({"method": "ngram"}, "acceptance exact: demo was built with FlyPolicy"),
        ({"draft_stop": "confidence"}, "draft_stop 'confidence': cannot be had of TensorRT-LLM engines"),
        ({"exact_first": 3}, "exact_first, exact_token_ids, exact_within, max_loosened_per_100: cannot be had"),
    ],
    ids=str,
)
def test_settings_that_the_engines_were_not_built_for_are_refused_before_they_are_read(
    settings: dict[str, Any], said: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated_executor.Executor, "__init__", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=said):
        LLM(directory, speculative_config=settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enable_prefix_caching": False}, "enable_prefix_caching False: each round is a prompt that begins with"),
        ({"max_num_tokens": 64}, "max_num_tokens 64: TensorRT-LLM's engine has"),
    ],
    ids=str,
)
def test_settings_of_serving_without_effect_are_refused(
    settings: dict[str, Any], said: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated_executor.Executor, "__init__", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=said):
        LLM(directory, **settings)


def test_a_sequence_is_never_longer_than_a_prompt_may_be(bindings: Any, demo_engine: Path, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "engine", demo_engine, max_num_tokens=512)
    with pytest.raises(ConfigError, match=r"max_seq_len 2048: .* max_num_tokens 512: serve with a smaller max_seq_len"):
        LLM(directory)
    with LLM(directory, max_seq_len=512) as llm:
        prompt = {"prompt_token_ids": (PROMPT["prompt_token_ids"] * 60)[:490]}
        output = llm.generate([prompt], SamplingParams(max_tokens=None, ignore_eos=True))[0].outputs[0]
        assert (len(output.token_ids), output.finish_reason) == (22, "length")
        with pytest.raises(RequestError, match="prompt has 512 tokens"):
            llm.generate([{"prompt_token_ids": [5] * 512}])


def test_without_tensorrt_llm_the_error_says_what_to_install(
    demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_directory(tmp_path / "engine", demo_engine)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(EngineError, match=r"TensorRT-LLM's Executor cannot be loaded .*: install tensorrt_llm 1\.2"):
        LLM(directory)


def test_an_engine_that_cannot_be_loaded_takes_the_other_with_it(directory: Path) -> None:
    plan = directory / "target" / "rank0.engine"
    plan.write_bytes(b"x" * plan.stat().st_size)
    with pytest.raises(EngineError, match=r"target: TensorRT-LLM cannot load the target \("):
        LLM(directory)
    assert simulated_executor.Executor.alive == []


def test_caches_reuse_blocks_and_the_draft_has_what_all_slots_need(directory: Path) -> None:
    with LLM(directory, max_batch_size=3, max_seq_len=1000):
        draft, target = executor_of("draft"), executor_of("target")
        assert simulated_executor.Executor.alive == [draft, target], "the target takes what the draft leaves"
        assert draft.cache.enable_block_reuse
        assert target.cache.enable_block_reuse
        assert draft.cache.max_tokens == 3 * (1000 + draft.built["max_draft_len"])
        assert target.cache.max_tokens is None
        assert draft.max_batch_size == target.max_batch_size == 3
        assert draft.places is target.places is None


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plugin libraries that were loaded into this process."""
    loaded: list[str] = []

    class Registry:
        def get_creator(self, name: str, version: str, namespace: str) -> object | None:
            return object() if loaded and (name, version) == (PLUGIN, PLUGIN_VERSION) else None

        def load_library(self, path: str) -> object:
            loaded.append(path)
            return object()

    registry = Registry()

    class Logger:
        ERROR = INTERNAL_ERROR = WARNING = INFO = VERBOSE = 0

        def __init__(self, *_: Any) -> None: ...

    library = types.ModuleType("tensorrt")
    library.__dict__.update(__version__="10.14.1", ILogger=Logger, Logger=Logger, get_plugin_registry=lambda: registry)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(
        "fly_trt.engines.tensorrt_library.ctypes.CDLL", lambda _: types.SimpleNamespace(getCreators=object())
    )
    return loaded


def test_plugins_are_loaded_before_an_engine_of_this_process(
    bindings: Any, demo_engine: Path, tmp_path: Path, tensorrt: list[str]
) -> None:
    directory = write_directory(tmp_path / "engine", demo_engine, files={"libfly_plugins.so": b"a library"})
    with LLM(directory) as llm:
        assert tensorrt == [str((directory / "libfly_plugins.so").resolve())]
        assert llm.generate([PROMPT], SamplingParams(max_tokens=5))[0].outputs[0].token_ids


def test_engines_of_several_gpus_run_in_workers_that_have_the_plugins(
    bindings: Any, worker: Path, demo_engine: Path, tmp_path: Path
) -> None:
    library = {"libfly_plugins.so": b"a library"}
    directory = write_directory(tmp_path / "a 'b' engine", demo_engine, tp_size=2, files=library)
    with LLM(directory) as llm:
        for role in ("draft", "target"):
            places = executor_of(role).places
            assert places.device_ids == [0, 1]
            program = Path(places.orchestrator_config.worker_executable_path)
        assert os.access(program, os.X_OK)
        # What the program starts, with what loaded before its main function.
        worker.write_text('#!/bin/sh\necho "$LD_PRELOAD|$FLY_TRT_REGISTER_PLUGINS|$1"\n')
        worker.chmod(0o700)
        shown = os.popen(f"LD_PRELOAD= '{program}' x 2>/dev/null").read().strip()
        preloaded, *others = shown.split("|")
        assert others == ["1", "x"]
        assert Path(preloaded).resolve() == (directory / "libfly_plugins.so").resolve()
        assert " " not in preloaded
        assert stat.S_IMODE(program.stat().st_mode) == 0o700
        tokens = llm.generate([PROMPT], SamplingParams(max_tokens=5))[0].outputs[0].token_ids
    assert not program.exists()
    with LLM(write_directory(tmp_path / "one", demo_engine)) as llm:
        assert llm.generate([PROMPT], SamplingParams(max_tokens=5))[0].outputs[0].token_ids == tokens


def test_a_worker_that_is_not_installed_is_named(bindings: Any, demo_engine: Path, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "engine", demo_engine, tp_size=2)
    with pytest.raises(EngineError, match=r"bin/executorWorker: no such program: TensorRT-LLM 1\.2 installs it"):
        LLM(directory)
    assert simulated_executor.Executor.alive == []


def test_settings_that_say_what_is_so_anyway_are_taken(directory: Path) -> None:
    taken = SamplingParams(
        max_tokens=3, draft_stop="none", logit_bias={}, bad_words=[], repetition_penalty=1.0, stop_token_ids=[1]
    )
    same = AcceptanceParams(acceptance="fly", preset="reference", fly_entropy_threshold=0.3, fly_window_size=6)
    with LLM(directory, speculative_config={"draft_stop": "none", "adaptive_acceptance": False}) as llm:
        assert len(llm.generate([PROMPT], taken)[0].outputs[0].token_ids) == 3
        assert len(llm.generate([PROMPT], SamplingParams(max_tokens=3, acceptance=same))[0].outputs[0].token_ids) == 3
        assert llm.generate([PROMPT], SamplingParams(num_speculative_tokens=0, acceptance=EXACT, max_tokens=3))


def test_the_simulated_library_is_as_strict_as_the_real_one(bindings: Any) -> None:
    with pytest.raises(TypeError):
        bindings.Request(input_token_ids=[1], max_tokens=1, draft_tokens=[1])
    with pytest.raises(TypeError):
        bindings.Request(input_token_ids=np.array([1]), max_tokens=1)
    with pytest.raises(TypeError):
        bindings.SamplingConfig(1, 5)
    with pytest.raises(TypeError):
        bindings.KvCacheConfig(block_reuse=True)
    with pytest.raises(RuntimeError):
        bindings.ExternalDraftTokensConfig(tokens=[])


def test_the_table_of_names_has_every_keyword_that_is_passed() -> None:
    """And no other, of what the bindings are called with; the stand-in takes each."""
    passed: dict[str, set[str]] = {}
    for path in Path(executor.__file__).parent.glob("executor*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and re.fullmatch(r"(self\._)?bindings\.[A-Z]\w+", called):
                assert not node.args, called
                passed.setdefault(called.rpartition(".")[2], set()).update(str(k.arg) for k in node.keywords)
    table = {name.name: set(name.parameters) for name in EXECUTOR if name.name in simulated_executor.NAMES}
    assert {name: keywords for name, keywords in table.items() if keywords} == passed
    for name, keywords in passed.items():
        signature = inspect.signature(getattr(simulated_executor, name))
        assert keywords <= signature.parameters.keys(), name
