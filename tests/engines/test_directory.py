"""Engines that are loaded once and shared by LLMs that take turns."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, ConfigError, EngineError, LoadedEngines, SamplingParams
from fly_trt.manifest import Manifest

PROMPTS = [record["prompt"] for record in load_eval_prompts()[::60]]
PARAMS = SamplingParams(max_tokens=16)
MODES = ({"method": None}, {"acceptance": "exact"}, {"method": "draft_model"}, {"method": "ngram"})


@pytest.fixture
def engines(demo_engine: Path) -> Iterator[LoadedEngines]:
    with LoadedEngines(demo_engine, max_batch_size=3) as engines:
        yield engines


def tokens(llm: LLM, prompts: list[str] = PROMPTS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS)]


def test_each_emits_what_it_emits_alone_whoever_had_the_turn_before(engines: LoadedEngines, demo_engine: Path) -> None:
    alone = []
    for config in MODES:
        with LLM(demo_engine, speculative_config=config, max_batch_size=3, enable_prefix_caching=False) as llm:
            alone.append(tokens(llm))
    sharing = [LLM(engines, speculative_config=config, enable_prefix_caching=False) for config in MODES]
    for llm, want in zip(sharing, alone, strict=True):
        assert tokens(llm) == want
    for index in range(len(PROMPTS)):
        for llm, want in zip(sharing, alone, strict=True):
            assert tokens(llm, PROMPTS[index : index + 1]) == want[index : index + 1]
    for llm in sharing:
        llm.shutdown()


def test_requests_of_several_at_once_are_served_by_turns(engines: LoadedEngines) -> None:
    sharing = [LLM(engines, speculative_config=config, enable_prefix_caching=False) for config in MODES]
    want = [tokens(llm) for llm in sharing]
    with ThreadPoolExecutor(len(sharing)) as pool:
        for _ in range(3):
            assert list(pool.map(tokens, sharing)) == want
    for llm in sharing:
        llm.shutdown()


def test_shutting_one_down_leaves_the_engines_to_the_others(engines: LoadedEngines) -> None:
    with LLM(engines, enable_prefix_caching=False, max_batch_size=2) as first:
        want = tokens(first)
    with LLM(engines, enable_prefix_caching=False) as second:
        assert tokens(second) == want
    engines.close()
    engines.close()
    with pytest.raises(ConfigError, match="these engines were closed: load them again"):
        LLM(engines, enable_prefix_caching=False)


def test_engines_that_nobody_else_holds_live_as_long_as_who_uses_them(demo_engine: Path) -> None:
    with LLM(LoadedEngines(demo_engine, max_batch_size=1), enable_prefix_caching=False) as llm:
        gc.collect()
        assert all(tokens(llm))


def test_only_what_is_used_is_loaded(engines: LoadedEngines) -> None:
    assert engines.load_seconds == {}
    LLM(engines, speculative_config={"method": None}, enable_prefix_caching=False).shutdown()
    assert list(engines.load_seconds) == ["target"]
    LLM(engines, enable_prefix_caching=False).shutdown()
    LLM(engines, enable_prefix_caching=False).shutdown()
    assert list(engines.load_seconds) == ["target", "draft"]
    assert min(engines.load_seconds.values()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "enable_prefix_caching True: others write to the caches of shared engines"),
        ({"num_threads": 1}, "num_threads 1: the engines are loaded already: give it to LoadedEngines"),
        ({"device_id": 0}, "device_id 0: the engines are loaded already"),
        ({"verify_hashes": True}, "verify_hashes True: the engines are loaded already"),
        (
            {"max_batch_size": 4, "enable_prefix_caching": False},
            "max_batch_size 4: the engines were loaded for 3: give LoadedEngines max_batch_size=4",
        ),
    ],
)
def test_what_loading_settled_or_sharing_forbids_is_refused(
    engines: LoadedEngines, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(engines, **settings)


def test_a_draft_that_was_not_built_is_named(engines: LoadedEngines) -> None:
    manifest: Manifest = engines.manifest
    engines.manifest = manifest.model_copy(update={"draft": None})
    with pytest.raises(EngineError, match="built without a draft: rebuild with --draft"):
        _ = engines.draft
