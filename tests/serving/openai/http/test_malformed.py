"""Each request of tools/malformed_requests.py has its right answer, and those that are healthy go on meanwhile."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from fly_trt import AsyncLLM
from malformed_requests import Malformed, malformed_requests, send
from openai_servers import SECONDS, ThreadServer, wait_until

BODY_SECONDS = 0.3
KINDS = malformed_requests(2 * BODY_SECONDS)
BODY = {"prompt": "### Instruction:\nSpell out: 21.\n### Response:\n", "temperature": 0, "max_tokens": 32}


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[ThreadServer]:
    with ThreadServer([llm]) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(llm: AsyncLLM) -> Iterator[ThreadServer]:
    with ThreadServer([llm], body_timeout=BODY_SECONDS) as server:
        yield server


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_it_is_answered_as_it_should_be(server: ThreadServer, impatient: ThreadServer, kind: Malformed) -> None:
    server = impatient if kind.pause else server
    status = asyncio.run(send(kind, "127.0.0.1", server.port, SECONDS))
    assert status in kind.statuses
    wait_until(lambda: not server.lifecycle.num_active)
    assert server.pool.num_requests == 0


def test_all_of_them_at_once_disturb_nobody(server: ThreadServer) -> None:
    kinds = [kind for kind in KINDS if not kind.pause]

    async def main() -> tuple[list[int], list[str]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS) as client:
            healthy = [client.post("/v1/completions", json=BODY) for _ in range(8)]
            sent = [send(kind, "127.0.0.1", server.port, SECONDS) for kind in kinds]
            statuses, answers = await asyncio.gather(asyncio.gather(*sent), asyncio.gather(*healthy))
        return statuses, [answer.json()["choices"][0]["text"] for answer in answers]

    alone = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=SECONDS).json()["choices"][0]["text"]
    statuses, texts = asyncio.run(main())
    assert [kind.name for kind, status in zip(kinds, statuses, strict=True) if status not in kind.statuses] == []
    assert texts == [alone] * 8


def test_there_are_at_least_forty_kinds() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 40
