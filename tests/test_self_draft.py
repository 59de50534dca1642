"""The demo target drafts for itself: what it emits is plain decoding's, in batches and with reused prefixes."""

from pathlib import Path

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, ConfigError, SamplingParams
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import EngineError
from fly_trt.manifest import read_manifest

PROMPTS = [record["prompt"] for record in load_eval_prompts()[::30]]
LONG = " ".join(f"Line {number}: the keeper wrote {number * 7 % 31} letters." for number in range(12))
PARAMS = SamplingParams(max_tokens=48)


def prompts() -> list[str]:
    """Short ones and, for the other draft, long ones that begin alike."""
    return [*PROMPTS, *(f"{LONG}\n{prompt}" for prompt in PROMPTS[:3])]


def answers(engine: Path, method: str | None, **settings: object) -> list[list[int]]:
    """Rounds are as long as can be: what pays is a matter of clocks."""
    with LLM(engine, speculative_config={"method": method, "adaptive_draft_length": False}, **settings) as llm:
        outputs = llm.generate(prompts(), PARAMS)
    assert (sum(output.metrics.num_accepted_tokens for output in outputs) > 100) == (method is not None)
    return [output.outputs[0].token_ids for output in outputs]


def test_the_directory_drafts_for_itself_by_default_and_exactly(self_engine: Path) -> None:
    with LLM(self_engine) as llm:
        config = llm.speculative_config
        assert (config.method, config.acceptance, config.draft_stop) == ("self", "exact", "confidence")
        lengths = [len(llm.tokenizer.encode(prompt).ids) for prompt in prompts()]
    least = [draft.min_tokens for draft in llm.manifest.self_drafts]
    assert least == [0, 100]
    assert min(lengths) < 100 < max(lengths)


@pytest.mark.parametrize("settings", [{}, {"max_batch_size": 1}, {"max_num_tokens": 40, "max_batch_size": 3}], ids=str)
def test_a_self_draft_changes_no_token(self_engine: Path, settings: dict[str, int]) -> None:
    """With one slot each prompt starts from the cache that the one before it left there."""
    assert answers(self_engine, "self", **settings) == answers(self_engine, None)


def test_engines_are_loaded_when_first_used(self_engine: Path) -> None:
    with LoadedEngines(self_engine, max_batch_size=1) as engines:
        _ = engines.target
        assert list(engines.load_seconds) == ["target"]
        first, second = engines.self_drafts
        assert list(engines.load_seconds) == ["target", "self_draft"]
        drafts = engines.manifest.self_drafts
        assert (first[1] is second[1]) == (drafts[0].engine == drafts[1].engine)
        assert engines.self_drafts == [first, second]


def test_a_directory_without_a_self_draft_says_so(target_only_engine: Path, self_engine: Path) -> None:
    with pytest.raises(ConfigError, match=r"'self' needs a self-draft .* method='ngram' or rebuild with --self-draft"):
        LLM(target_only_engine, speculative_config={"method": "self"})
    with pytest.raises(ConfigError, match=r"'multi_level' needs a draft model .* method='self' or rebuild"):
        LLM(self_engine, speculative_config={"method": "multi_level"})
    with (
        LoadedEngines(target_only_engine) as engines,
        pytest.raises(EngineError, match="built without a self-draft: rebuild with --self-draft"),
    ):
        _ = engines.self_drafts
    assert read_manifest(target_only_engine).self_drafts == []
