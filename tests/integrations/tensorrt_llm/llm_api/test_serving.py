"""LLM over tensorrt_llm.LLM: the outputs are those of fly-trt's own loop by the same rule."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fly_trt import LLM, EngineError, RequestOutputKind, SamplingParams
from fly_trt.integrations.tensorrt_llm.llm_streams import TokenStreams
from served_by_tensorrt_llm import ERROR, LAST_WORDS, LONG, NUM_DRAFT_TOKENS, PROMPTS, TIMEOUT, told, wait_until


@pytest.fixture(scope="module")
def stand_in(demo_engine: Path, stand_in_of: Any) -> Iterator[Callable[[], Any]]:
    with pytest.MonkeyPatch.context() as patch:
        yield from stand_in_of(demo_engine, patch)


@pytest.fixture(scope="module")
def llm(directory: Path, stand_in: Callable[[], Any]) -> Iterator[LLM]:
    with LLM(directory) as llm:
        yield llm


@pytest.fixture
def executor(llm: LLM, stand_in: Callable[[], Any]) -> Any:
    """tensorrt_llm's, of this LLM."""
    return stand_in().STARTED[0]._executor


def test_tokens_texts_and_ends_are_fly_trts_own(llm: LLM, own: LLM) -> None:
    params = SamplingParams(max_tokens=120)
    outputs, expected = llm.generate(PROMPTS, params), own.generate(PROMPTS, params)
    assert [told(output.outputs[0]) for output in outputs] == [told(output.outputs[0]) for output in expected]
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    assert sum(output.metrics.num_loosened_tokens for output in expected) > 0  # or the rule would not be seen


def test_rounds_are_counted_by_what_is_streamed(llm: LLM, executor: Any) -> None:
    (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True))
    metrics = output.metrics
    assert metrics.num_spec_steps == executor.num_responses[-1] - 1  # the first one is the prompt's
    assert metrics.num_draft_tokens == NUM_DRAFT_TOKENS * metrics.num_spec_steps
    assert 1 + metrics.num_spec_steps + metrics.num_accepted_tokens == metrics.num_output_tokens == 100
    assert metrics.num_loosened_tokens == 0  # which nobody says
    assert metrics.num_accepted_tokens_by_source == {"model": metrics.num_accepted_tokens}
    assert metrics.latency is not None
    assert metrics.time_to_first_token is not None
    assert 0 < metrics.time_to_first_token <= metrics.latency


def test_prompts_are_reused_and_counted(llm: LLM) -> None:
    for _ in range(2):
        (output,) = llm.generate("Once more: " + PROMPTS[0], SamplingParams(max_tokens=4))
    assert 0 < output.metrics.num_cached_tokens < len(output.prompt_token_ids)
    counted = llm.metrics()
    assert counted["fly_trt:prefix_cache_hits_total"] >= output.metrics.num_cached_tokens
    assert counted["fly_trt:num_requests_running"] == 0


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 33])
def test_max_tokens_is_exact(llm: LLM, max_tokens: int) -> None:
    outputs = llm.generate(PROMPTS[:4], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [max_tokens] * 4
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_a_stop_string_ends_the_text_and_frees_the_engine(llm: LLM, own: LLM, executor: Any) -> None:
    text = own.generate(PROMPTS[0], SamplingParams(max_tokens=120, ignore_eos=True))[0].outputs[0].text
    word = text[len(text) // 2 :][:3]
    params = SamplingParams(max_tokens=1500, ignore_eos=True, stop=[word])
    (output,), (expected,) = llm.generate(PROMPTS[0], params), own.generate(PROMPTS[0], params)
    assert told(output.outputs[0]) == told(expected.outputs[0])
    assert output.outputs[0].stop_reason == word
    wait_until(lambda: executor.num_open == 0)


@pytest.mark.parametrize("ignores_eos", [False, True])
@pytest.mark.parametrize("is_shown", [False, True])
def test_stop_tokens_end_a_sequence(llm: LLM, own: LLM, ignores_eos: bool, is_shown: bool) -> None:
    tokens = own.generate(PROMPTS[1], SamplingParams(max_tokens=60, ignore_eos=True))[0].outputs[0].token_ids
    ends = list(dict.fromkeys(tokens[20:40:9]))
    params = SamplingParams(
        max_tokens=200, stop_token_ids=ends, ignore_eos=ignores_eos, include_stop_str_in_output=is_shown
    )
    (output,), (expected,) = llm.generate(PROMPTS[1], params), own.generate(PROMPTS[1], params)
    assert told(output.outputs[0]) == told(expected.outputs[0])
    assert output.outputs[0].stop_reason in ends


def test_chunks_add_up(llm: LLM, own: LLM) -> None:
    params = SamplingParams(max_tokens=90, output_kind=RequestOutputKind.DELTA)
    chunks = [output.outputs[0] for output in llm.stream(PROMPTS[3], params)]
    (expected,) = own.generate(PROMPTS[3], SamplingParams(max_tokens=90))
    assert len(chunks) > 3
    assert "".join(chunk.text for chunk in chunks) == expected.outputs[0].text
    assert list(itertools.chain(*(chunk.token_ids for chunk in chunks))) == expected.outputs[0].token_ids


def test_more_requests_than_slots_wait_here(llm: LLM, own: LLM, executor: Any) -> None:
    prompts = [{"prompt_token_ids": list(range(2, 3 + i))} for i in range(20)]
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    expected = own.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert executor.most_open <= 8


def test_a_client_that_leaves_leaves_nothing_behind(llm: LLM, executor: Any) -> None:
    stream = llm.stream(PROMPTS[0], LONG)
    next(stream)
    assert executor.num_open == 1
    stream.close()
    wait_until(lambda: executor.num_open == 0)
    wait_until(lambda: llm.metrics()["fly_trt:num_requests_running"] == 0)
    assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=5))[0].outputs[0].finish_reason == "length"


def test_an_error_of_one_request_is_its_own(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[4], SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    with pytest.raises(EngineError, match="tensorrt_llm ended it: the engine has something against this one"):
        llm.generate(ERROR)
    with pytest.raises(EngineError, match="tensorrt_llm ended it: timeout"):
        llm.generate(TIMEOUT)
    with pytest.raises(EngineError, match="tensorrt_llm ended it: it ran out of blocks"):
        llm.generate(LAST_WORDS)
    for output in stream:
        last = output
    assert len(last.outputs[0].token_ids) == 200


def test_what_a_release_refuses_is_that_requests_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = importlib.import_module("tensorrt_llm.sampling_params").SamplingParams
    check = params.__post_init__

    def refuse_77(self: Any) -> None:
        check(self)
        if self.max_tokens == 77:
            raise ValueError("max_tokens 77 is\nnot taken")

    stream = llm.stream(PROMPTS[4], SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    monkeypatch.setattr(params, "__post_init__", refuse_77)
    with pytest.raises(EngineError, match="tensorrt_llm refuses it: max_tokens 77 is not taken"):
        llm.generate(PROMPTS[3], SamplingParams(max_tokens=77))
    assert len(list(stream)[-1].outputs[0].token_ids) == 200
    assert llm.metrics()["fly_trt:num_requests_running"] == 0


def test_a_step_that_fails_costs_the_requests_in_it(
    llm: LLM, executor: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After it one token is made, to see whether the engine still lives."""
    stream = llm.stream(PROMPTS[5], LONG)
    next(stream)
    events, num_sent = TokenStreams.events, len(executor.sent)

    def fail_once(self: TokenStreams, timeout: float) -> Any:
        monkeypatch.setattr(TokenStreams, "events", events)
        raise ValueError("something odd")

    monkeypatch.setattr(TokenStreams, "events", fail_once)
    with pytest.raises(EngineError, match=r"the step that it was in failed \(something odd\): send it again"):
        list(stream)
    wait_until(lambda: len(executor.sent) > num_sent and executor.num_open == 0)
    assert [params.max_tokens for params in executor.sent[num_sent:]] == [1]
    assert llm.generate(PROMPTS[5], SamplingParams(max_tokens=3))


def test_a_request_that_ended_in_a_step_that_then_failed_is_told_its_end(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last token, and something odd of the other one, come in one step."""
    events, held = TokenStreams.events, []
    stream = llm.stream(PROMPTS[5], LONG)
    next(stream)

    def hold_back(self: TokenStreams, timeout: float) -> Any:
        held.extend(events(self, timeout))
        ended = [event.key for event in held if getattr(event, "finish_reason", None) is not None]
        if not ended or held[-1].key in ended:
            return []
        monkeypatch.setattr(TokenStreams, "events", events)
        monkeypatch.setattr(held[-1].key.detokenizer, "push", None)
        return [event for event in held if event.key in ended] + held[-1:]

    monkeypatch.setattr(TokenStreams, "events", hold_back)
    (output,) = llm.generate(PROMPTS[4], SamplingParams(max_tokens=3, ignore_eos=True))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (3, "length")
    with pytest.raises(EngineError, match="the step that it was in failed"):
        list(stream)
