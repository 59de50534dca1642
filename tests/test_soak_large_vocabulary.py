"""Two thousand requests on a vocabulary of 40 k, half of them sampled: each result is the one that the request has
alone, also where its client leaves early, wrong ones are refused, and neither memory nor slots nor threads are left
behind.
"""

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fly_trt import LLM, AcceptanceParams, AsyncLLM, RequestError, RequestOutput, RequestOutputKind, SamplingParams
from leftovers import MIB, check_nothing_is_left, engine_threads, resident_bytes
from random_engine import build_random_engine

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

VOCAB_SIZE = 40_000
NUM_REQUESTS = 2000
NUM_KNOWN = 120
NUM_CLIENTS = 24
# One set of logits for the largest step, 512 positions of prompt log probabilities, has 78 MiB.
MAX_GROWTH_BYTES = 300 * MIB
MAX_LATE_GROWTH_BYTES = 64 * MIB  # after the first quarter

WRONG: list[tuple[Any, dict[str, Any]]] = [
    ({"prompt_token_ids": [3, VOCAB_SIZE]}, {}),
    ({"prompt_token_ids": []}, {}),
    ({"prompt_token_ids": [5] * 600}, {}),
    ("", {}),
    ("▁w7 w8", {"stop_token_ids": [VOCAB_SIZE]}),
    ({"prompt_token_ids": [3]}, {"num_speculative_tokens": 100}),
]


@dataclass(frozen=True)
class Known:
    """A request, and what comes of it when it is the only one: tokens and text of each completion."""

    prompt: Any
    params: SamplingParams
    token_ids: list[list[int]]
    texts: list[str]
    num_loosened: int


def random_request(rng: random.Random, index: int) -> tuple[Any, SamplingParams]:
    part = rng.choices(range(3, VOCAB_SIZE), k=rng.randint(1, 60))
    tokens = (part * 2)[: rng.randint(1, 120)]  # repeated, so that n-gram lookup proposes something
    prompt = " ".join(f"w{token}" for token in tokens) if rng.random() < 0.3 else {"prompt_token_ids": tokens}
    settings: dict[str, Any] = {"max_tokens": rng.randint(1, 24)}
    if index % 2:
        settings |= {"temperature": rng.uniform(0.1, 1.2), "top_p": rng.uniform(0.3, 1.0), "seed": rng.randrange(1000)}
        settings |= rng.choice([{}, {"top_k": 50}, {"n": 3}])
    settings |= rng.choice(
        [
            {},
            {"logprobs": 3},
            {"logprobs": 0, "prompt_logprobs": 2},
            {"stop": ["1 w", "77"]},
            {"repetition_penalty": 1.2, "min_tokens": 1, "bad_words": [f"w{tokens[0]}"]},
            {"num_speculative_tokens": 4},
        ]
    )
    loose = {"acceptance": "fly", "fly_entropy_threshold": 0.01, "fly_window_size": 2}
    acceptance = rng.choice([{"acceptance": "exact"}, loose, loose | {"preset": "paper"}])
    return prompt, SamplingParams(acceptance=AcceptanceParams(**acceptance), **settings)


def known_requests(engine: Path) -> list[Known]:
    rng = random.Random(1)
    known = []
    with LLM(engine, max_batch_size=1) as llm:
        for index in range(NUM_KNOWN):
            prompt, params = random_request(rng, index)
            output = llm.generate(prompt, params)[0]
            tokens, texts = [c.token_ids for c in output.outputs], [c.text for c in output.outputs]
            known.append(Known(prompt, params, tokens, texts, output.metrics.num_loosened_tokens))
    return known


class Received:
    """What a stream of any kind has brought so far."""

    def __init__(self) -> None:
        self.token_ids: dict[int, list[int]] = defaultdict(list)
        self.texts: dict[int, str] = defaultdict(str)
        self.num_outputs = 0

    def add(self, output: RequestOutput, kind: RequestOutputKind) -> None:
        self.num_outputs += 1
        for completion in output.outputs:
            if kind is not RequestOutputKind.DELTA:
                self.token_ids[completion.index], self.texts[completion.index] = [], ""
            self.token_ids[completion.index] += completion.token_ids
            self.texts[completion.index] += completion.text
            if completion.logprobs is not None:
                assert len(completion.logprobs) == len(completion.token_ids)


class Soak:
    """Clients that send requests until `NUM_REQUESTS` were sent, and what became of them."""

    def __init__(self, llm: AsyncLLM, known: list[Known]) -> None:
        self.counts: Counter[str] = Counter()
        self._llm = llm
        self._known = known
        self._num_left = 0
        self._baseline = resident_bytes()

    async def run(self, num_requests: int, seed: int) -> int:
        """Serves so many requests, and returns the bytes by which this process has grown."""
        self._num_left = num_requests
        rngs = [random.Random(seed + index) for index in range(NUM_CLIENTS)]
        await asyncio.gather(*(self._client(rng) for rng in rngs))
        return resident_bytes() - self._baseline

    async def _client(self, rng: random.Random) -> None:
        while self._num_left:
            self._num_left -= 1
            if self._num_left % 50 == 0:
                grown = resident_bytes() - self._baseline
                assert grown < MAX_GROWTH_BYTES, f"{grown // MIB} MiB after {self.counts.total()} requests"
            if rng.random() < 0.05:
                await self._send_wrong(rng)
            else:
                await self._send(rng)

    async def _send_wrong(self, rng: random.Random) -> None:
        prompt, settings = rng.choice(WRONG)
        with pytest.raises(RequestError):
            async for _ in self._llm.generate(prompt, SamplingParams(**settings)):
                pass
        self.counts["refused"] += 1

    async def _send(self, rng: random.Random) -> None:
        known = rng.choice(self._known)
        kind = rng.choice(list(RequestOutputKind))
        leaves_after = rng.randint(1, 3) if rng.random() < 0.2 else None
        timeout = rng.uniform(0.0, 0.2) if rng.random() < 0.1 else None
        received = Received()
        try:
            async with asyncio.timeout(timeout):
                async for output in self._llm.generate(known.prompt, replace(known.params, output_kind=kind)):
                    received.add(output, kind)
                    if received.num_outputs == leaves_after and not output.finished:
                        break
                ended = "finished" if output.finished else "left"
        except TimeoutError:
            ended = "cancelled"
        self.counts[ended] += 1
        for index, (tokens, text) in enumerate(zip(known.token_ids, known.texts, strict=True)):
            got, got_text = received.token_ids[index], received.texts[index]
            if ended == "finished":
                assert (got, got_text) == (tokens, text)
            else:
                assert (got, got_text) == (tokens[: len(got)], text[: len(got_text)])


def test_two_thousand_requests_of_a_large_vocabulary(tmp_path: Path) -> None:
    engine = build_random_engine(tmp_path, VOCAB_SIZE, hidden_size=64)
    known = known_requests(engine)
    assert sum(request.num_loosened for request in known) > 0
    assert len({tuple(tokens) for request in known for tokens in request.token_ids}) > NUM_KNOWN / 2

    async def run() -> None:
        async with AsyncLLM(engine) as llm:
            soak = Soak(llm, known)
            early = await soak.run(NUM_REQUESTS // 4, seed=0)
            late = await soak.run(NUM_REQUESTS - NUM_REQUESTS // 4, seed=1000)
            assert soak.counts.total() == NUM_REQUESTS
            assert min(soak.counts[kind] for kind in ("finished", "left", "cancelled", "refused")) > 20, soak.counts
            assert late < MAX_GROWTH_BYTES
            assert late - early < MAX_LATE_GROWTH_BYTES, f"{early // MIB} MiB, then {late // MIB} MiB"
            await check_nothing_is_left(llm)

    before = engine_threads()
    asyncio.run(run())
    assert engine_threads() == before
