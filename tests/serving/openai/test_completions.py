"""/v1/completions through the official client: tokens, texts and numbers are those of LLM.generate."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, SamplingParams

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:50]]
PROMPT = PROMPTS[0]
TOKENS = {"return_token_ids": True}


@pytest.fixture(scope="module")
def llm(demo_engine: Path):
    with LLM(demo_engine) as llm:
        yield llm


def test_fifty_prompts_at_once_give_the_tokens_of_generate(demo: Any, llm: LLM) -> None:
    expected = llm.generate(PROMPTS, SamplingParams(max_tokens=48))

    async def ask() -> list[Any]:
        async with demo.async_client() as client:

            async def whole(prompt: str) -> tuple[str, list[int]]:
                found = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=48, temperature=0, extra_body=TOKENS
                )
                return found.choices[0].text, found.choices[0].token_ids

            async def streamed(prompt: str) -> tuple[str, list[int]]:
                text, tokens = "", []
                stream = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=48, temperature=0, stream=True, extra_body=TOKENS
                )
                async for chunk in stream:
                    text += chunk.choices[0].text
                    tokens += chunk.choices[0].token_ids
                return text, tokens

            return await asyncio.gather(
                *(whole(prompt) if number % 2 else streamed(prompt) for number, prompt in enumerate(PROMPTS))
            )

    answers = asyncio.run(ask())
    assert answers == [(output.outputs[0].text, output.outputs[0].token_ids) for output in expected]


@pytest.mark.parametrize("acceptance", ["exact", "fly"])
def test_a_request_chooses_how_drafts_are_accepted(demo: Any, llm: LLM, acceptance: str) -> None:
    params = SamplingParams(max_tokens=48, acceptance=AcceptanceParams(acceptance=acceptance))
    expected = llm.generate(PROMPT, params)[0]
    found = demo.client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=48, temperature=0, extra_body={"acceptance": acceptance}
    )
    assert found.choices[0].text == expected.outputs[0].text
    assert found.metrics["acceptance"] == acceptance
    assert found.metrics["num_loosened_tokens"] == expected.metrics.num_loosened_tokens
