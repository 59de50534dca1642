"""Every drafter on the demo pair: under `exact` the text is plain decoding's, and under a loose rule a request's text
is its own, whatever is served beside it or was served before."""

from functools import cache
from pathlib import Path

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, SamplingParams
from fly_trt.drafting import DRAFTERS

FAMILIES = ("extract", "code", "math", "words")
BY_FAMILY = [[prompt["prompt"] for prompt in load_eval_prompts() if prompt["family"] == name] for name in FAMILIES]
# Prompts of many kinds, and some twice: the second time there is a cache of it, and an answer to copy from.
PROMPTS = [prompts[number] for number in range(2) for prompts in BY_FAMILY]
PROMPTS = [*PROMPTS, *PROMPTS[:2], *["".join(PROMPTS[:4])] * 2]
MAX_TOKENS = 32
EXACT = SamplingParams(max_tokens=MAX_TOKENS, acceptance=AcceptanceParams(acceptance="exact"))
SMALL_STEPS = {"max_num_tokens": 40, "max_batch_size": 4}  # prompts are read in chunks, beside rounds that are cut


@pytest.fixture(scope="module")
def plain(demo_engine: Path) -> list[list[int]]:
    with LLM(demo_engine, speculative_config={"method": None}) as llm:
        return texts(llm, PROMPTS, SamplingParams(max_tokens=MAX_TOKENS))


@pytest.fixture(
    scope="module",
    # Those that need other engines have tests of this of their own: test_self_draft.py, test_chain.py.
    params=[name for name, kind in DRAFTERS.items() if not (kind.needs_self_draft or kind.needs_inner_draft)],
)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def texts(llm: LLM, prompts: list[str], params: SamplingParams) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def test_under_exact_the_text_is_plain_decodings(demo_engine: Path, plain: list[list[int]], method: str) -> None:
    with LLM(demo_engine, speculative_config={"method": method}) as llm:
        alone = [texts(llm, [prompt], EXACT)[0] for prompt in PROMPTS]
        assert alone == plain, "alone, after others"
        assert texts(llm, PROMPTS, EXACT) == plain, "in a batch, with what they left behind"
        metrics = [output.metrics for output in llm.generate(PROMPTS, EXACT)]
        assert sum(one.num_accepted_tokens for one in metrics) > 0
        assert sum(one.num_cached_tokens for one in metrics) > 0
    with LLM(demo_engine, speculative_config={"method": method}, **SMALL_STEPS) as llm:
        assert texts(llm, PROMPTS, EXACT) == plain, "in small steps"


@cache
def alone(engine: Path, method: str, acceptance: str) -> list[list[int]]:
    """The text of each prompt, each served by an engine that has served nothing else."""
    params = loose(acceptance)
    with LLM(engine, speculative_config={"method": method}, enable_prefix_caching=False) as llm:
        return [texts(llm, [prompt], params)[0] for prompt in PROMPTS]


def loose(acceptance: str) -> SamplingParams:
    settings = {"typical_threshold": 0.02} if acceptance == "typical" else {}
    return SamplingParams(max_tokens=MAX_TOKENS, acceptance=AcceptanceParams(acceptance=acceptance, **settings))


@pytest.mark.parametrize("acceptance", ["fly", "typical"])
def test_under_a_loose_rule_a_requests_text_is_its_own(
    demo_engine: Path, plain: list[list[int]], method: str, acceptance: str
) -> None:
    want, params = alone(demo_engine, method, acceptance), loose(acceptance)
    with LLM(demo_engine, speculative_config={"method": method}) as llm:
        texts(llm, PROMPTS, EXACT)
        assert texts(llm, PROMPTS, params) == want, "after others, in a batch"
        mixed = llm.generate(PROMPTS * 2, [params] * len(PROMPTS) + [EXACT] * len(PROMPTS))
        assert [list(output.outputs[0].token_ids) for output in mixed] == want + plain, "beside exact ones"
    with LLM(demo_engine, speculative_config={"method": method}, **SMALL_STEPS) as llm:
        assert texts(llm, PROMPTS, params) == want, "in small steps"
