"""What else is served changes no token: alone, in batches, and among requests that come and go at random times.

In float32 and in int8, where every activation row has a scale of its own; plain, with exact and with loose speculation,
with draft lengths that follow the load and ones that the requests ask for.
"""

import asyncio
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, AsyncLLM, SamplingParams

PROMPTS = [record["prompt"] for record in load_eval_prompts()[::10]]
NUM_ARRIVALS = 32
MAX_TOKENS = 64
METHODS = {"plain": None, "exact": "multi_level", "fly": "multi_level"}
PARAMS = {
    mode: SamplingParams(
        max_tokens=MAX_TOKENS, acceptance=AcceptanceParams(acceptance="fly" if mode == "fly" else "exact")
    )
    for mode in METHODS
}
Tokens = list[list[int]]


@dataclass(frozen=True)
class Engines:
    directory: Path
    alone: dict[str, Tokens]


@pytest.fixture(scope="module", params=["demo_engine", "demo_int8_engine"])
def engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    """An engine directory, and by mode the tokens of each prompt when it is the only one."""
    directory = request.getfixturevalue(request.param)
    with ExitStack() as stack:
        llms = {
            method: stack.enter_context(LLM(directory, max_batch_size=1, speculative_config={"method": method}))
            for method in set(METHODS.values())
        }
        alone = {mode: tokens_of(llms[method], mode) for mode, method in METHODS.items()}
    return Engines(directory, alone)


def tokens_of(llm: LLM, mode: str, prompts: list[str] = PROMPTS) -> Tokens:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS[mode])]


def different(got: Tokens, want: Tokens) -> list[int]:
    return [index for index, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]


def test_the_prompts_say_enough(engines: Engines) -> None:
    assert len(PROMPTS) == 24
    assert sum(map(len, engines.alone["plain"])) > 24 * 40
    assert different(engines.alone["fly"], engines.alone["exact"]), "loose speculation has something to loosen"


def test_exact_speculation_is_lossless(engines: Engines) -> None:
    assert different(engines.alone["exact"], engines.alone["plain"]) == []


@pytest.mark.parametrize("method", [None, "multi_level"])
def test_a_batch_of_eight_changes_no_token(engines: Engines, method: str | None) -> None:
    with LLM(engines.directory, speculative_config={"method": method}) as llm:
        for mode in (mode for mode, its_method in METHODS.items() if its_method == method):
            assert different(tokens_of(llm, mode), engines.alone[mode]) == []


def test_a_small_budget_of_tokens_changes_no_token(engines: Engines) -> None:
    """Prompts are read in chunks that ride with other requests' drafts."""
    with LLM(engines.directory, max_num_tokens=24, max_batch_size=3) as llm:
        prompts = PROMPTS[:9]
        assert different(tokens_of(llm, "fly", prompts), engines.alone["fly"][:9]) == []
        assert different(tokens_of(llm, "exact", prompts), engines.alone["exact"][:9]) == []


def test_draft_lengths_that_requests_ask_for_change_no_token_of_the_others(engines: Engines) -> None:
    asked = [None, 0, 10, 3, 12, 0]
    params = [replace(PARAMS["fly"], num_speculative_tokens=number) for number in asked * 2]
    prompts = PROMPTS[: len(params)]
    with LLM(engines.directory) as llm:
        alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
        mixed = llm.generate(prompts, params)
    tokens = [output.outputs[0].token_ids for output in mixed]
    assert different(tokens, [output.outputs[0].token_ids for output in alone]) == []
    for index, one in enumerate(params):
        if one.num_speculative_tokens in (None, 0):
            usual = engines.alone["plain" if one.num_speculative_tokens == 0 else "fly"]
            assert tokens[index] == usual[index]
    for output, lone, one in zip(mixed, alone, params, strict=True):
        most = 15 if one.num_speculative_tokens is None else one.num_speculative_tokens
        metrics = output.metrics
        assert metrics.acceptance_histogram == lone.metrics.acceptance_histogram
        assert len(metrics.acceptance_histogram) == (most + 1 if most else 0), "a whole round stood"
        assert metrics.num_draft_tokens <= most * metrics.num_spec_steps


@pytest.mark.parametrize("method", [None, "multi_level"])
def test_random_arrivals_and_cancellations_change_no_token(engines: Engines, method: str | None) -> None:
    modes = [mode for mode, its_method in METHODS.items() if its_method == method]
    rng = random.Random(3)

    async def client(llm: AsyncLLM, index: int, delay: float, leaves_after: int | None) -> list[int] | None:
        await asyncio.sleep(delay)
        num_outputs = 0
        async for output in llm.generate(PROMPTS[index % len(PROMPTS)], PARAMS[modes[index % len(modes)]]):
            num_outputs += 1
            if num_outputs == leaves_after and not output.finished:
                return None
        return output.outputs[0].token_ids

    async def main() -> list[list[int] | None]:
        async with AsyncLLM(engines.directory, speculative_config={"method": method}) as llm:
            clients = [
                client(llm, index, rng.uniform(0, 0.5), rng.randint(1, 6) if rng.random() < 0.3 else None)
                for index in range(NUM_ARRIVALS)
            ]
            return await asyncio.gather(*clients)

    results = asyncio.run(main())
    finished = {index: tokens for index, tokens in enumerate(results) if tokens is not None}
    assert NUM_ARRIVALS / 2 < len(finished) < NUM_ARRIVALS
    want = [engines.alone[modes[index % len(modes)]][index % len(PROMPTS)] for index in finished]
    assert different(list(finished.values()), want) == []
