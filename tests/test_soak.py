"""Many requests of every kind, many of them cut off: nothing leaks and nothing grows. Two thousand in a long run."""

import asyncio
import dataclasses
import random
from pathlib import Path

from eval_prompts import load_eval_prompts
from fly_trt import AcceptanceParams, AsyncLLM, RequestOutputKind, SamplingParams
from leftovers import MIB, check_nothing_is_left, resident_bytes

NUM_REQUESTS, NUM_LONG_REQUESTS = 500, 2000
NUM_CLIENTS = 24
NUM_SETTLED = 200  # requests after which memory must not grow
MAX_GROWTH_BYTES = 32 * MIB
FEWEST = 1 / 90  # of the requests end in each of the three ways
TEXTS = [record["prompt"] for record in load_eval_prompts()]


def random_params(rng: random.Random) -> SamplingParams:
    params = SamplingParams(max_tokens=rng.randint(1, 12), output_kind=rng.choice(list(RequestOutputKind)))
    changes = [
        {"temperature": rng.uniform(0.2, 1.5), "top_p": rng.uniform(0.3, 1.0), "n": rng.randint(1, 3)},
        {"acceptance": AcceptanceParams(acceptance="exact")},
        {"stop": ["a", "number"], "include_stop_str_in_output": True},
        {"repetition_penalty": 1.3, "min_tokens": 1, "logit_bias": {5: -100.0}, "bad_words": ["the"]},
        {"logprobs": 3, "prompt_logprobs": 1},
        {"ignore_eos": True, "stop_token_ids": [rng.randrange(896)]},
        {},
        {},
    ]
    return dataclasses.replace(params, **rng.choice(changes))


async def serve(llm: AsyncLLM, rng: random.Random, counts: dict[str, int]) -> None:
    prompt = (
        rng.choice(TEXTS) if rng.random() < 0.5 else {"prompt_token_ids": rng.choices(range(896), k=rng.randint(1, 40))}
    )
    leave_after = rng.randint(1, 3) if rng.random() < 0.2 else None
    num_seen = 0
    async for output in llm.generate(prompt, random_params(rng)):
        num_seen += 1
        if output.finished:
            counts["finished"] += 1
        elif num_seen == leave_after:
            counts["left"] += 1
            return


async def client(llm: AsyncLLM, rng: random.Random, pending: list[int], counts: dict[str, int]) -> None:
    while pending:
        pending.pop()
        if rng.random() < 0.1:
            try:
                await asyncio.wait_for(serve(llm, rng, counts), rng.uniform(0.001, 0.2))
            except TimeoutError:
                counts["cancelled"] += 1
        else:
            await serve(llm, rng, counts)


async def serve_all(llm: AsyncLLM, num_requests: int, seed: int) -> dict[str, int]:
    counts = {"finished": 0, "left": 0, "cancelled": 0}
    pending = list(range(num_requests))
    await asyncio.gather(*(client(llm, random.Random(seed + i), pending, counts) for i in range(NUM_CLIENTS)))
    return counts


def test_requests_leave_no_slot_taken_and_no_memory_behind(demo_engine: Path, is_long: bool) -> None:
    num_more = (NUM_LONG_REQUESTS if is_long else NUM_REQUESTS) - NUM_SETTLED

    async def run() -> None:
        async with AsyncLLM(demo_engine) as llm:
            await serve_all(llm, NUM_SETTLED, seed=0)
            settled = resident_bytes()
            counts = await serve_all(llm, num_more, seed=1000)
            grown = resident_bytes() - settled
            assert sum(counts.values()) == num_more
            assert min(counts.values()) > FEWEST * num_more, counts
            assert grown < MAX_GROWTH_BYTES, f"{grown // MIB} MiB"
            await check_nothing_is_left(llm)

    asyncio.run(run())
