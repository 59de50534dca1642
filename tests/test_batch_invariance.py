"""What else is served changes no token: alone, in batches, and among requests that come and go at random times.

In float32 and in int8, where every activation row has a scale of its own; plain, with exact and with loose speculation,
with either entropy as the gate, greedy and sampled, on drafts of the draft model and of n-grams, with draft lengths
that follow the load, fixed ones, and ones that the requests ask for.
"""

import asyncio
import random
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, AsyncLLM, RequestOutput, SamplingParams

PROMPTS = [record["prompt"] for record in load_eval_prompts()[::20]]
NUM_ARRIVALS = 32
MAX_TOKENS = 64
METHODS = (None, "multi_level", "ngram")


def loose(**settings: Any) -> SamplingParams:
    names = {field.name for field in fields(AcceptanceParams)} & settings.keys()
    acceptance = AcceptanceParams(acceptance="fly", **{name: settings.pop(name) for name in names})
    return SamplingParams(max_tokens=MAX_TOKENS, acceptance=acceptance, **settings)


EXACT = SamplingParams(max_tokens=MAX_TOKENS, acceptance=AcceptanceParams(acceptance="exact"))
# By mode the method of the drafts and the request. The thresholds are low enough that every loose mode loosens: of
# preset paper, whose entropy is the whole vocabulary's, the usual one hardly ever does.
MODES: dict[str, tuple[str | None, SamplingParams]] = {
    "plain": (None, EXACT),
    "exact": ("multi_level", EXACT),
    "fly": ("multi_level", loose()),
    "paper": ("multi_level", loose(preset="paper", fly_entropy_threshold=0.02)),
    "paper-short": ("multi_level", loose(preset="paper", fly_entropy_threshold=0.01, fly_window_size=2)),
    "custom": ("multi_level", loose(preset="vllm", fly_entropy_threshold=0.05, fly_window_size=4)),
    "sampled": ("multi_level", loose(temperature=0.8, seed=11)),
    "sampled-paper": ("multi_level", loose(temperature=0.8, seed=11, preset="paper", fly_entropy_threshold=0.02)),
    "ngram": ("ngram", loose()),
    "ngram-paper": ("ngram", loose(preset="paper", fly_entropy_threshold=0.005, fly_window_size=2)),
}
LOOSE_MODES = [mode for mode, (_, params) in MODES.items() if params is not EXACT]
Tokens = list[list[int]]


@dataclass(frozen=True)
class Engines:
    directory: Path
    alone: dict[str, Tokens]
    num_loosened: dict[str, int]


@pytest.fixture(scope="module", params=["demo_engine", "demo_int8_engine"])
def engines(request: pytest.FixtureRequest) -> Engines:
    """An engine directory, and by mode the tokens of each prompt when it is the only one."""
    directory = request.getfixturevalue(request.param)
    alone: dict[str, list[RequestOutput]] = {}
    for method in METHODS:
        with LLM(directory, max_batch_size=1, speculative_config={"method": method}) as llm:
            alone |= {mode: llm.generate(PROMPTS, MODES[mode][1]) for mode in modes_of(method)}
    num_loosened = {mode: sum(o.metrics.num_loosened_tokens for o in outputs) for mode, outputs in alone.items()}
    tokens = {mode: [output.outputs[0].token_ids for output in outputs] for mode, outputs in alone.items()}
    return Engines(directory, tokens, num_loosened)


def modes_of(method: str | None) -> list[str]:
    return [mode for mode, (its_method, _) in MODES.items() if its_method == method]


def tokens_of(llm: LLM, mode: str, prompts: list[str] = PROMPTS) -> Tokens:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, MODES[mode][1])]


def different(got: Tokens, want: Tokens) -> list[int]:
    return [index for index, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]


def test_the_prompts_say_enough(engines: Engines) -> None:
    assert len(PROMPTS) == 12
    assert sum(map(len, engines.alone["plain"])) > 12 * 40
    assert different(engines.alone["fly"], engines.alone["exact"]), "loose speculation has something to loosen"
    assert min(engines.num_loosened[mode] for mode in LOOSE_MODES) > 0, engines.num_loosened


def test_exact_speculation_is_lossless(engines: Engines) -> None:
    assert different(engines.alone["exact"], engines.alone["plain"]) == []


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_eight_changes_no_token(engines: Engines, method: str | None, adaptive: bool) -> None:
    speculative = {"method": method, "adaptive_draft_length": adaptive}
    with LLM(engines.directory, speculative_config=speculative) as llm:
        changed = {mode: different(tokens_of(llm, mode), engines.alone[mode]) for mode in modes_of(method)}
    assert {mode: prompts for mode, prompts in changed.items() if prompts} == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_small_budget_of_tokens_changes_no_token(engines: Engines, method: str | None) -> None:
    """Prompts are read in chunks that ride with other requests' drafts, and rounds are cut."""
    prompts = PROMPTS[:6]
    with LLM(engines.directory, max_num_tokens=24, max_batch_size=3, speculative_config={"method": method}) as llm:
        changed = {mode: different(tokens_of(llm, mode, prompts), engines.alone[mode][:6]) for mode in modes_of(method)}
    assert {mode: prompts for mode, prompts in changed.items() if prompts} == {}


@pytest.mark.parametrize("method", ["multi_level", "ngram"])
def test_requests_of_other_modes_in_the_batch_change_no_token(engines: Engines, method: str) -> None:
    """Each step has rows with and without the full entropy, with and without logits."""
    modes = modes_of(method)
    rows = [(prompt, modes[(prompt + turn) % len(modes)]) for turn in range(2) for prompt in range(len(PROMPTS))]
    with LLM(engines.directory, speculative_config={"method": method}) as llm:
        outputs = llm.generate([PROMPTS[prompt] for prompt, _ in rows], [MODES[mode][1] for _, mode in rows])
    got = [output.outputs[0].token_ids for output in outputs]
    changed = [rows[index] for index in different(got, [engines.alone[mode][prompt] for prompt, mode in rows])]
    assert changed == []


def test_draft_lengths_that_requests_ask_for_change_no_token_of_the_others(engines: Engines) -> None:
    asked = [None, 0, 10, 3, 12, 0]
    params = [replace(MODES["fly"][1], num_speculative_tokens=number) for number in asked * 2]
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


@pytest.mark.parametrize("method", METHODS)
def test_random_arrivals_and_cancellations_change_no_token(engines: Engines, method: str | None) -> None:
    modes = modes_of(method)
    rng = random.Random(3)

    async def client(llm: AsyncLLM, index: int, delay: float, leaves_after: int | None) -> list[int] | None:
        await asyncio.sleep(delay)
        num_outputs = 0
        async for output in llm.generate(PROMPTS[index % len(PROMPTS)], MODES[modes[index % len(modes)]][1]):
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
    changed = [
        (index % len(PROMPTS), modes[index % len(modes)])
        for index, tokens in finished.items()
        if tokens != engines.alone[modes[index % len(modes)]][index % len(PROMPTS)]
    ]
    assert changed == []
