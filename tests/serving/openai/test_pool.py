"""Several engines behind one server: who gets a request, what becomes of a dead one, and how requests are counted."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fly_trt import AsyncLLM, ConfigError, EngineError, RequestError, RequestOutput, SamplingParams
from fly_trt.errors import EngineDeadError
from fly_trt.grammar import StructuredOutputs, compiler
from fly_trt.runtime.breaker import Breaker, BreakerConfig, BreakerState
from fly_trt.serving.openai.http.errors import ApiError
from fly_trt.serving.openai.pool import EnginePool, PooledEngine, device_groups, group_devices, load_pool

LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
PROMPT = "Spell out: 21."


@pytest.fixture(scope="module")
def llms(demo_engine: Path) -> Iterator[tuple[AsyncLLM, ...]]:
    pool = load_pool([lambda: AsyncLLM(demo_engine, num_threads=1)] * 3, None)
    yield pool.llms
    pool.shutdown()


@pytest.fixture
def pool(llms: tuple[AsyncLLM, ...]) -> EnginePool:
    """A new one over the same engines."""
    return EnginePool(llms)


def counts(pool: EnginePool) -> list[int]:
    return [engine.num_requests for engine in pool.engines]


def num_answers(pool: EnginePool) -> list[float]:
    return [llm.metrics().get('fly_trt:request_success_total{finished_reason="stop"}', 0) for llm in pool.llms]


async def begin(engine: PooledEngine, params: SamplingParams = LONG) -> Any:
    """A stream that has begun."""
    stream = engine.generate(PROMPT, params)
    await anext(stream)
    return stream


async def collect(engine: PooledEngine, params: SamplingParams | None = None) -> RequestOutput:
    async for output in engine.generate(PROMPT, params):
        last = output
    return last


def test_a_request_goes_where_the_fewest_are(pool: EnginePool) -> None:
    async def main() -> None:
        streams = [await begin(pool.choose()) for _ in range(3)]
        assert counts(pool) == [1, 1, 1]
        await streams.pop(1).aclose()
        assert counts(pool) == [1, 0, 1]
        assert pool.choose() is pool.engines[1]
        streams.append(await begin(pool.choose()))
        assert counts(pool) == [1, 1, 1]
        for stream in streams:
            await stream.aclose()
        assert counts(pool) == [0, 0, 0]

    asyncio.run(main())


def test_requests_that_come_at_once_are_spread(pool: EnginePool) -> None:
    """All are placed before the first of them begins."""

    async def main() -> list[int]:
        chosen = [pool.choose() for _ in range(6)]
        streams = await asyncio.gather(*map(begin, chosen))
        found = counts(pool)
        for stream in streams:
            await stream.aclose()
        return found

    assert asyncio.run(main()) == [2, 2, 2]


def test_all_engines_give_the_same_answers(pool: EnginePool) -> None:
    before = num_answers(pool)

    async def main() -> list[RequestOutput]:
        return await asyncio.gather(*(collect(pool.choose()) for _ in range(6)))

    outputs = asyncio.run(main())
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert num_answers(pool) == [count + 2 for count in before]


@pytest.mark.parametrize("ending", ["finished", "cancelled", "refused", "left"])
def test_what_has_ended_is_not_counted_however_it_ended(pool: EnginePool, ending: str) -> None:
    async def main() -> None:
        engine = pool.choose()
        if ending == "finished":
            await collect(engine)
        elif ending == "refused":
            with pytest.raises(RequestError):
                await collect(engine, SamplingParams(stop_token_ids=[10_000]))
        elif ending == "left":
            await (await begin(engine)).aclose()
        else:
            task = asyncio.create_task(collect(engine, LONG))
            while not engine.num_requests:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert counts(pool) == [0, 0, 0]

    asyncio.run(main())


def test_a_dead_engine_gets_nothing_more_and_the_last_one_says_why(
    llms: tuple[AsyncLLM, ...], demo_engine: Path
) -> None:
    mortal = AsyncLLM(demo_engine, num_threads=1)
    pool, alone = EnginePool([mortal, *llms]), EnginePool([mortal])
    mortal._service._thread.fail("its GPU fell off the bus")
    assert pool.num_alive == 3
    assert {pool.choose() for _ in range(4)} == set(pool.engines[1:])
    with pytest.raises(EngineDeadError, match="its GPU fell off the bus"):
        alone.choose()
    mortal.shutdown()


def test_cutting_short_ends_all_with_an_error_that_says_so(pool: EnginePool) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(collect(pool.choose(), LONG)) for _ in range(4)]
        while pool.num_requests < 4:
            await asyncio.sleep(0.001)
        while not all(task.done() for task in tasks):
            await pool.cut_short()
            await asyncio.sleep(0.001)
        for task in tasks:
            with pytest.raises(ApiError, match="the server stops") as raised:
                task.result()
            assert raised.value.status == 503
        assert counts(pool) == [0, 0, 0]

    asyncio.run(main())


def test_a_request_id_is_one_requests_at_a_time(pool: EnginePool) -> None:
    async def main() -> None:
        engine = pool.choose()
        stream = engine.generate(PROMPT, LONG, "mine")
        await anext(stream)
        with pytest.raises(RequestError, match="request_id 'mine': already in use"):
            await anext(engine.generate(PROMPT, LONG, "mine"))
        assert engine.num_requests == 1
        await stream.aclose()

    asyncio.run(main())


def test_devices_of_an_engine_of_the_cpu_are_refused_as_everywhere(demo_engine: Path) -> None:
    assert device_groups(demo_engine, None) == [None]
    (group,) = device_groups(demo_engine, [0, 1])
    with pytest.raises(ConfigError, match="has no effect, demo was built for onnxruntime, which runs on the CPU"):
        AsyncLLM(demo_engine, devices=group)


@pytest.mark.parametrize(
    ("num_ranks", "devices", "groups"),
    [
        (1, [0], [[0]]),
        (1, [3, 1], [[3], [1]]),
        (4, list(range(8)), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, [0, 1, 2], [[0, 1, 2]]),  # the engine says what is wrong
        (2, [0, 0], [[0, 0]]),
        (2, [], [[]]),
    ],
)
def test_an_engine_takes_as_many_devices_as_it_has_ranks(
    num_ranks: int, devices: list[int], groups: list[list[int]]
) -> None:
    assert group_devices(devices, num_ranks) == groups


def test_where_one_engine_does_not_load_those_before_it_end(demo_engine: Path) -> None:
    loaded: list[AsyncLLM] = []

    def load() -> AsyncLLM:
        loaded.append(AsyncLLM(demo_engine))
        return loaded[-1]

    with pytest.raises(EngineError):
        load_pool([load, lambda: AsyncLLM(demo_engine / "nothing")], None)
    with pytest.raises(ConfigError, match="this LLM was shut down"):
        loaded[0].check_health()


def test_engines_are_loaded_ready_for_grammars(llms: tuple[AsyncLLM, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the tokenizer was read for a request")

    monkeypatch.setattr(compiler, "make_vocabulary", fail)
    for llm in llms:
        llm.compile_grammar(StructuredOutputs(regex="a+"))


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_queue_timeout_is_above_zero(timeout: float) -> None:
    with pytest.raises(ConfigError, match="queue_timeout"):
        load_pool([], timeout)


class Judged:
    """As much of an AsyncLLM as has a breaker."""

    def __init__(self) -> None:
        self.breaker = Breaker(BreakerConfig())

    def breaker_state(self) -> list[BreakerState]:
        return self.breaker.state()

    def reset_breaker(self, setting: str | None = None) -> list[str]:
        return [change.setting for change in self.breaker.reset("person", setting)]

    def trip(self, setting: str) -> None:
        while not self.breaker.is_tripped(setting):
            self.breaker.record(setting, 0.1)


def test_a_reset_reaches_every_engine_that_knows_the_setting() -> None:
    llms: Any = [Judged(), Judged(), Judged()]
    pool = EnginePool(llms)
    llms[0].trip("default")
    llms[1].trip("default")
    llms[2].trip("fly_window_size=1")
    assert pool.reset_breaker("fly_window_size=1") == ["fly_window_size=1"]
    assert [llm.breaker.is_tripped("default") for llm in llms] == [True, True, False]
    llms[2].trip("fly_window_size=1")
    assert pool.reset_breaker(None) == ["default", "fly_window_size=1"]
    assert not any(state.is_tripped for llm in llms for state in llm.breaker_state())
    with pytest.raises(RequestError, match="setting 'other': no audit knows it"):
        pool.reset_breaker("other")
