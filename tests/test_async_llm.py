"""AsyncLLM: streams of three kinds, many clients at once, and clients that go away."""

import asyncio
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import (
    LLM,
    AsyncLLM,
    ConfigError,
    QueueFullError,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:16]]
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=40, logprobs=2)
ALL_TOKENS = list(range(896))
IMPOSSIBLE = SamplingParams(stop_token_ids=ALL_TOKENS, min_tokens=5)
"""Every token ends the sequence and none may: found only when the first one is chosen."""


@pytest.fixture(scope="module")
def llm(demo_engine: Path):
    llm = AsyncLLM(demo_engine)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def reference(demo_engine: Path):
    """What the synchronous API returns, by prompt."""
    with LLM(demo_engine) as llm:
        return {prompt: output.outputs[0] for prompt, output in zip(PROMPTS, llm.generate(PROMPTS), strict=True)}


async def collect(
    llm: AsyncLLM, prompt: Any = PROMPTS[0], params: SamplingParams | None = None, request_id: str | None = None
) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, params, request_id)]


async def wait_until(is_true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "still not true"
        await asyncio.sleep(0.002)


def gauge(llm: AsyncLLM, name: str) -> float:
    return llm.metrics()[f"fly_trt:{name}"]


async def wait_until_idle(llm: AsyncLLM) -> None:
    await wait_until(lambda: gauge(llm, "num_requests_running") == gauge(llm, "num_requests_waiting") == 0)


async def start(llm: AsyncLLM, params: SamplingParams = LONG, request_id: str | None = None) -> asyncio.Task:
    """A task that collects a request's outputs, once it has emitted tokens."""
    emitted = gauge(llm, "generation_tokens_total")
    task = asyncio.create_task(collect(llm, PROMPTS[0], params, request_id))
    await wait_until(lambda: gauge(llm, "generation_tokens_total") > emitted)
    return task


def with_kind(params: SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    given = {field.name: getattr(params, field.name) for field in dataclasses.fields(params) if field.init}
    return SamplingParams(**(given | {"output_kind": kind}))


def test_cumulative_outputs_grow_to_what_generate_returns(llm: AsyncLLM, reference: dict) -> None:
    outputs = asyncio.run(collect(llm))
    completions = [output.outputs[0] for output in outputs]
    assert len(outputs) > 2
    for earlier, later in itertools.pairwise(completions):
        assert later.text.startswith(earlier.text)
        assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert completions[-1] == reference[PROMPTS[0]]
    assert {output.prompt for output in outputs} == {PROMPTS[0]}


@pytest.mark.parametrize("params", [SamplingParams(logprobs=2), SamplingParams(stop="is"), SAMPLED])
def test_delta_outputs_join_to_the_final_one(llm: AsyncLLM, params: SamplingParams) -> None:
    (whole,) = asyncio.run(collect(llm, params=with_kind(params, RequestOutputKind.FINAL_ONLY)))
    deltas = asyncio.run(collect(llm, params=with_kind(params, RequestOutputKind.DELTA)))
    assert len(deltas) > 1
    for index, want in enumerate(whole.outputs):
        parts = [part for delta in deltas for part in delta.outputs if part.index == index]
        assert "".join(part.text for part in parts) == want.text
        assert list(itertools.chain.from_iterable(part.token_ids for part in parts)) == want.token_ids
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert (parts[-1].finish_reason, parts[-1].stop_reason) == (want.finish_reason, want.stop_reason)
        if params.logprobs is not None:
            joined = [entry for part in parts for entry in part.logprobs]
            assert [list(entry) for entry in joined] == [list(entry) for entry in want.logprobs]
            assert [entry[t].logprob for t, entry in zip(want.token_ids, joined, strict=True)] == pytest.approx(
                [entry[t].logprob for t, entry in zip(want.token_ids, want.logprobs, strict=True)], abs=1e-4
            )
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]


def test_deltas_of_several_completions_have_each_index_complete(llm: AsyncLLM) -> None:
    deltas = asyncio.run(collect(llm, params=with_kind(SAMPLED, RequestOutputKind.DELTA)))
    lengths = dict.fromkeys(range(3), 0)
    reasons: dict[int, str] = {}
    for part in itertools.chain.from_iterable(delta.outputs for delta in deltas):
        assert part.index not in reasons, "nothing comes after the finish reason"
        lengths[part.index] += len(part.token_ids)
        if part.finish_reason is not None:
            reasons[part.index] = part.finish_reason
    assert set(reasons) == set(lengths) == {0, 1, 2}
    assert sum(lengths.values()) == deltas[-1].metrics.num_output_tokens
    assert all(lengths[index] == 40 for index, reason in reasons.items() if reason == "length")


def test_final_only_yields_exactly_one_output(llm: AsyncLLM, reference: dict) -> None:
    (output,) = asyncio.run(collect(llm, params=SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY)))
    assert output.finished
    assert output.outputs[0] == reference[PROMPTS[0]]


def test_concurrent_requests_get_what_generate_returns(llm: AsyncLLM, reference: dict) -> None:
    async def main() -> list[list[RequestOutput]]:
        kinds = itertools.cycle(RequestOutputKind)
        requests = [collect(llm, prompt, SamplingParams(output_kind=next(kinds))) for prompt in PROMPTS]
        return await asyncio.gather(*requests)

    for prompt, outputs in zip(PROMPTS, asyncio.run(main()), strict=True):
        text = "".join(output.outputs[0].text for output in outputs)
        assert text.endswith(reference[prompt].text)
        assert outputs[-1].outputs[0].finish_reason == "stop"


@pytest.mark.usefixtures("slow_steps")
def test_cancelling_the_task_frees_the_slot(llm: AsyncLLM) -> None:
    async def main() -> None:
        task = await start(llm)
        await wait_until(lambda: gauge(llm, "num_requests_running") == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until_idle(llm)
        assert gauge(llm, "kv_cache_usage_perc") == 0

    asyncio.run(main())


@pytest.mark.usefixtures("slow_steps")
def test_cancelling_a_request_that_waits_takes_it_out_of_the_queue(demo_engine: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(demo_engine, max_batch_size=1) as llm:
            running = await start(llm)
            waiting = asyncio.create_task(collect(llm))
            await wait_until(lambda: gauge(llm, "num_requests_waiting") == 1)
            waiting.cancel()
            await wait_until(lambda: gauge(llm, "num_requests_waiting") == 0)
            assert not running.done()
            running.cancel()
            await wait_until_idle(llm)

    asyncio.run(main())


@pytest.mark.usefixtures("slow_steps")
def test_leaving_the_iteration_frees_the_slot(llm: AsyncLLM) -> None:
    async def main() -> None:
        async for output in llm.generate(PROMPTS[0], LONG):
            assert output.outputs[0].token_ids
            break
        await wait_until_idle(llm)
        stream = llm.generate(PROMPTS[0], LONG)
        await anext(stream)
        await stream.aclose()
        await wait_until_idle(llm)

    asyncio.run(main())


@pytest.mark.usefixtures("slow_steps")
def test_a_timeout_frees_the_slot(llm: AsyncLLM) -> None:
    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(collect(llm, PROMPTS[0], LONG), timeout=0.05)
        await wait_until_idle(llm)

    asyncio.run(main())


@pytest.mark.usefixtures("slow_steps")
def test_an_abort_ends_the_iteration_with_what_there_is(llm: AsyncLLM) -> None:
    async def main(kind: RequestOutputKind) -> list[RequestOutput]:
        task = await start(llm, with_kind(LONG, kind), f"mine {kind.value}")
        await llm.abort(f"mine {kind.value}")
        outputs = await task
        await wait_until_idle(llm)  # the step in flight counts tokens, too
        return outputs

    for kind in RequestOutputKind:
        outputs = asyncio.run(main(kind))
        last = outputs[-1]
        assert (last.request_id, last.finished) == (f"mine {kind.value}", True)
        assert last.outputs[0].finish_reason == "abort"
        parts = outputs if kind is RequestOutputKind.DELTA else outputs[-1:]
        tokens = [token for part in parts for token in part.outputs[0].token_ids]
        assert "".join(part.outputs[0].text for part in parts) == llm.tokenizer.decode(tokens)
        assert 0 < len(tokens) < 1500


def test_an_abort_of_an_unknown_request_does_nothing(llm: AsyncLLM) -> None:
    asyncio.run(llm.abort("nobody"))
    assert asyncio.run(collect(llm))[-1].outputs[0].finish_reason == "stop"


@pytest.mark.usefixtures("slow_steps")
def test_a_request_id_in_use_is_refused_and_free_again_afterwards(llm: AsyncLLM) -> None:
    async def main() -> None:
        task = await start(llm, request_id="mine")
        with pytest.raises(RequestError, match="request_id 'mine': already in use: give each request its own"):
            await collect(llm, request_id="mine")
        assert not task.done(), "the one that has the id is not disturbed"
        await llm.abort("mine")
        await task
        assert (await collect(llm, request_id="mine"))[-1].outputs[0].finish_reason == "stop"

    asyncio.run(main())


@pytest.mark.parametrize("leaves_early", [False, True])
def test_a_request_id_may_be_used_again_at_once(llm: AsyncLLM, leaves_early: bool) -> None:
    """Nothing of the finished request, such as its clean-up, may touch the next one."""
    params = SamplingParams(max_tokens=6)

    async def main() -> list[str | None]:
        reasons = []
        for _ in range(100):
            async for output in llm.generate(PROMPTS[0], params, "again"):
                if output.finished:
                    reasons.append(output.outputs[0].finish_reason)
                    if leaves_early:
                        break
        return reasons

    assert asyncio.run(main()) == ["length"] * 100


@pytest.mark.usefixtures("slow_steps")
def test_a_full_queue_is_an_error_in_one_line_and_disturbs_nobody(demo_engine: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(demo_engine, max_batch_size=1, max_queue_size=3) as llm:
            running = await start(llm)
            waiting = [asyncio.create_task(collect(llm, prompt)) for prompt in PROMPTS[:3]]
            await wait_until(lambda: gauge(llm, "num_requests_waiting") == 3)
            with pytest.raises(QueueFullError) as raised:
                await collect(llm)
            message = "the queue is full: 3 requests wait and max_queue_size is 3: try again later"
            assert message in str(raised.value)
            assert "\n" not in str(raised.value)
            running.cancel()
            for outputs in await asyncio.gather(*waiting):
                assert outputs[-1].outputs[0].finish_reason == "stop"

    asyncio.run(main())


def test_wrong_requests_do_not_disturb_healthy_ones(llm: AsyncLLM, reference: dict) -> None:
    wrong = [
        (PROMPTS[0], IMPOSSIBLE),
        ("", SamplingParams()),
        ({"prompt_token_ids": [5] * 3000}, SamplingParams()),
        (PROMPTS[0], SamplingParams(logit_bias={9999: 1.0})),
        (PROMPTS[0], IMPOSSIBLE),
    ]

    async def main() -> list[Any]:
        healthy = [collect(llm, prompt) for prompt in PROMPTS[:5]]
        broken = [collect(llm, prompt, params) for prompt, params in wrong]
        mixed = itertools.chain.from_iterable(zip(healthy, broken, strict=True))
        results = await asyncio.gather(*mixed, return_exceptions=True)
        await wait_until_idle(llm)
        return results

    results = asyncio.run(main())
    assert [outputs[-1].outputs[0] for outputs in results[0::2]] == [reference[prompt] for prompt in PROMPTS[:5]]
    for error in results[1::2]:
        assert isinstance(error, RequestError)
        assert "\n" not in str(error)


def test_an_impossible_request_with_several_completions_is_one_error(llm: AsyncLLM) -> None:
    async def main() -> None:
        params = SamplingParams(n=4, temperature=1.0, stop_token_ids=ALL_TOKENS, min_tokens=5)
        with pytest.raises(RequestError, match="leave no token"):
            await collect(llm, PROMPTS[0], params)
        await wait_until_idle(llm)

    asyncio.run(main())


def test_one_event_loop_after_another_may_use_it(llm: AsyncLLM, reference: dict) -> None:
    for prompt in PROMPTS[:3]:
        assert asyncio.run(collect(llm, prompt))[-1].outputs[0] == reference[prompt]


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_event_loop_that_closes_in_the_middle_frees_its_requests(llm: AsyncLLM, reference: dict) -> None:
    def num_aborted() -> float:
        return llm.metrics().get('fly_trt:request_success_total{finished_reason="abort"}', 0)

    before = num_aborted()
    loop = asyncio.new_event_loop()
    stream = llm.generate(PROMPTS[0], LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    assert asyncio.run(collect(llm, PROMPTS[1]))[-1].outputs[0] == reference[PROMPTS[1]]
    asyncio.run(wait_until_idle(llm))
    assert num_aborted() == before + 1
    del stream
    gc.collect()


@pytest.mark.usefixtures("slow_steps")
def test_the_context_manager_shuts_down(demo_engine: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(demo_engine) as llm:
            task = await start(llm)
        outputs = await task
        assert outputs[-1].outputs[0].finish_reason == "abort"
        with pytest.raises(ConfigError, match="shut down: make a new one"):
            await collect(llm)
        llm.shutdown()

    asyncio.run(main())


def test_a_conversation_is_rendered_for_generate(llm: AsyncLLM) -> None:
    question = PROMPTS[0].removeprefix("### Instruction:\n").removesuffix("\n### Response:\n")
    prompt = llm.render_chat([{"role": "user", "content": question}])
    assert asyncio.run(collect(llm, prompt))[-1].outputs == asyncio.run(collect(llm))[-1].outputs


def test_a_long_prompt_is_tokenised_like_a_short_one(llm: AsyncLLM, reference: dict[str, Any]) -> None:
    async def serve() -> list[RequestOutput]:
        with pytest.raises(RequestError, match="max_seq_len is 2048"):
            await collect(llm, "word " * 4_001)  # in a thread of its own
        return await collect(llm)

    assert asyncio.run(serve())[-1].outputs[0].text == reference[PROMPTS[0]].text
