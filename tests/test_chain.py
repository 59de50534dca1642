"""Chains of three models on the demo pair: the weak draft guesses for the draft, which drafts for the target."""

from pathlib import Path
from typing import Any

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, ConfigError, SamplingParams
from fly_trt.benchmark.modes import choose_modes
from fly_trt.manifest import read_manifest

PROMPTS = [prompt["prompt"] for prompt in load_eval_prompts()[::40]]
SETTINGS = {"method": "chain", "acceptance": "exact"}


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLY_TRT_CHECK", "1")


def answers(engine: Path, config: dict[str, Any], prompts: list[str] = PROMPTS, **settings: Any) -> list[list[int]]:
    with LLM(engine, speculative_config=config, **settings) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=48))
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def plain(chain_engine: Path) -> list[list[int]]:
    return answers(chain_engine, {"method": None})


@pytest.mark.parametrize("inner", [{}, {"inner_acceptance": "fly", "inner_num_tokens": 9}])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_an_exact_chain_emits_plain_decodings_tokens(
    chain_engine: Path, plain: list[list[int]], inner: dict[str, Any], max_batch_size: int
) -> None:
    assert answers(chain_engine, SETTINGS | inner, max_batch_size=max_batch_size) == plain


def test_prompts_that_begin_alike_start_from_one_anothers_cache_in_all_three_models(
    chain_engine: Path, plain: list[list[int]]
) -> None:
    twice = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    assert answers(chain_engine, SETTINGS, twice, max_batch_size=2) == [plain[0], plain[0], plain[1], plain[0]]


@pytest.mark.parametrize("inner", ["exact", "fly"])
def test_a_loose_target_says_the_same_in_any_batch(chain_engine: Path, inner: str) -> None:
    """Where tokens depend on the draft, it is the draft model's own text, whatever the inner rule lets pass."""
    fly = {"method": "chain", "acceptance": "fly", "inner_acceptance": inner}
    want = answers(chain_engine, {"method": "multi_level", "acceptance": "fly"}, max_batch_size=1)
    assert answers(chain_engine, fly, max_batch_size=4) == want


def test_a_pair_refuses_a_chain_in_one_line_that_names_the_fix(demo_engine: Path) -> None:
    with pytest.raises(ConfigError, match=r"^method 'chain' needs a second, inner draft model and .* --inner-draft$"):
        LLM(demo_engine, speculative_config=SETTINGS)
    with pytest.raises(ConfigError, match="mode chain: method 'chain' needs a second, inner draft model"):
        choose_modes(["chain"], read_manifest(demo_engine))


def test_a_chain_is_a_mode_of_the_benchmark(chain_engine: Path) -> None:
    (config,) = choose_modes(["chain+exact,inner_num_tokens=5"], read_manifest(chain_engine)).values()
    assert (config.method, config.acceptance, config.inner_num_tokens) == ("chain", "exact", 5)
