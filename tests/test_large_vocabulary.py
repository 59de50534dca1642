"""What a vocabulary of 150 k costs in memory: one position's logits are 0.6 MB."""

import random
from pathlib import Path

import pytest

from fly_trt import LLM, AcceptanceParams, RequestOutput, SamplingParams
from leftovers import MIB, resident_bytes
from random_engine import build_random_engine

VOCAB_SIZE = 150_000
NUM_REQUESTS, NUM_LONG_REQUESTS = 50, 100
BATCH = 5
# The largest step here with the logits of every position, 5 rows of 16, has 46 MiB of them.
MAX_GROWTH_BYTES = 400 * MIB


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_engine(tmp_path_factory.mktemp("large_vocabulary"), VOCAB_SIZE, hidden_size=16)


def requests(rng: random.Random, count: int) -> tuple[list[dict[str, list[int]]], list[SamplingParams]]:
    """Sampled, each prompt of another length, with and without drafts, and some with log probabilities."""
    prompts, params = [], []
    for index, length in enumerate(rng.sample(range(20, 20 + NUM_LONG_REQUESTS), count)):
        part = rng.choices(range(3, VOCAB_SIZE), k=length // 2 + 1)
        prompts.append({"prompt_token_ids": (part * 2)[:length]})  # repeated, so that n-gram lookup proposes something
        acceptance = AcceptanceParams(acceptance=rng.choice(["exact", "fly"]))
        logprobs = 2 if index % 10 == 0 else None
        params.append(
            SamplingParams(
                max_tokens=rng.randint(2, 6), temperature=0.7, seed=index, logprobs=logprobs, acceptance=acceptance
            )
        )
    return prompts, params


def test_sampled_requests_leave_memory_flat(engine: Path, is_long: bool) -> None:
    num_requests = NUM_LONG_REQUESTS if is_long else NUM_REQUESTS
    prompts, params = requests(random.Random(5), num_requests)
    with LLM(engine) as llm:
        llm.generate(prompts[:BATCH], params[:BATCH])
        settled = resident_bytes()
        outputs: list[RequestOutput] = []
        for start in range(0, num_requests, BATCH):
            outputs += llm.generate(prompts[start : start + BATCH], params[start : start + BATCH])
            grown = resident_bytes() - settled
            assert grown < MAX_GROWTH_BYTES, f"{grown // MIB} MiB after {start + BATCH} requests"
    with LLM(engine, max_batch_size=1) as llm:
        alone = llm.generate(prompts[::20], params[::20])
    for got, want in zip(outputs[::20], alone, strict=True):
        assert got.outputs == want.outputs
