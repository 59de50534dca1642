"""The Python API on the demo pair."""

import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import (
    LLM,
    AcceptanceParams,
    ConfigError,
    EngineError,
    RequestError,
    RequestOutput,
    SamplingParams,
    SpeculativeConfig,
)
from fly_trt.engines.base import Step
from fly_trt.engines.onnxruntime import OnnxRuntimeEngine
from fly_trt.runtime import thread as thread_module

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:6]]
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(demo_engine: Path):
    with LLM(demo_engine) as llm:
        yield llm


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def wait_until(is_true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "still not true"
        time.sleep(0.002)


def is_idle(llm: LLM) -> bool:
    values = llm.metrics()
    return values["fly_trt:num_requests_running"] == values["fly_trt:num_requests_waiting"] == 0


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "fly-trt engine"}


def test_one_prompt_or_many_in_text_or_tokens(llm: LLM) -> None:
    many = llm.generate(PROMPTS)
    assert [output.prompt for output in many] == PROMPTS
    assert len({output.request_id for output in many}) == len(PROMPTS)
    one = llm.generate(PROMPTS[0])[0]
    tokens = llm.generate({"prompt_token_ids": one.prompt_token_ids})[0]
    assert tokens.prompt is None
    assert one.outputs[0].text == many[0].outputs[0].text == tokens.outputs[0].text
    assert one.outputs[0].finish_reason == "stop"
    assert one.finished


def test_the_text_is_the_decoded_tokens(llm: LLM) -> None:
    output = llm.generate(PROMPTS[0])[0].outputs[0]
    assert output.text == llm.tokenizer.decode(output.token_ids)


def test_metrics_add_up(llm: LLM) -> None:
    output = llm.generate(PROMPTS[0])[0]
    m = output.metrics
    assert m.num_output_tokens == len(output.outputs[0].token_ids)
    assert m.num_prompt_tokens == len(output.prompt_token_ids)
    assert m.num_accepted_tokens <= m.num_draft_tokens <= 15 * m.num_spec_steps
    assert sum(m.acceptance_histogram) == m.num_spec_steps
    assert sum(a * count for a, count in enumerate(m.acceptance_histogram)) == m.num_accepted_tokens
    assert m.num_accepted_tokens <= m.num_output_tokens <= m.num_accepted_tokens + m.num_spec_steps
    assert 0 < m.time_to_first_token <= m.latency


def test_a_fixed_draft_length_is_kept_in_every_round(demo_engine: Path) -> None:
    with LLM(demo_engine, speculative_config={"adaptive_draft_length": False}) as llm:
        for output in llm.generate(PROMPTS):
            assert output.metrics.num_draft_tokens == 15 * output.metrics.num_spec_steps > 0


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_max_tokens_is_exact(llm: LLM, max_tokens: int) -> None:
    full = llm.generate(PROMPTS[1])[0].outputs[0].token_ids
    cut = llm.generate(PROMPTS[1], SamplingParams(max_tokens=max_tokens))[0].outputs[0]
    assert cut.token_ids == full[:max_tokens]
    assert cut.finish_reason == "length"


def test_without_a_limit_the_engines_length_is_the_limit(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [0, 266] * 1010}
    output = llm.generate(prompt, SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert output.outputs[0].finish_reason == "length"
    assert output.metrics.num_prompt_tokens + output.metrics.num_output_tokens == 2048


def test_end_of_sequence_can_be_ignored(llm: LLM) -> None:
    output = llm.generate(PROMPTS[1], SamplingParams(max_tokens=120, ignore_eos=True))[0].outputs[0]
    assert len(output.token_ids) == 120
    assert 1 in output.token_ids[:-1]


def test_a_stop_string_cuts_the_text_also_inside_a_round(llm: LLM) -> None:
    full = llm.generate(PROMPTS[0])[0].outputs[0].text
    stop = full[20:24]
    output = llm.generate(PROMPTS[0], SamplingParams(stop=stop))[0].outputs[0]
    assert output.text == full[: full.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    kept = llm.generate(PROMPTS[0], SamplingParams(stop=[stop], include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == full[: full.index(stop) + len(stop)]


def test_a_stop_token_ends_the_sequence_and_is_named(llm: LLM) -> None:
    exact = AcceptanceParams(acceptance="exact")
    full = llm.generate(PROMPTS[0], SamplingParams(acceptance=exact))[0].outputs[0].token_ids
    output = llm.generate(PROMPTS[0], SamplingParams(acceptance=exact, stop_token_ids=[full[9]]))[0].outputs[0]
    assert output.token_ids == full[: full.index(full[9]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", full[9])


def test_acceptance_is_chosen_per_request_on_one_engine(llm: LLM, demo_engine: Path) -> None:
    exact = SamplingParams(acceptance=AcceptanceParams(acceptance="exact"))
    with LLM(demo_engine, speculative_config=SpeculativeConfig(method=None)) as plain_llm:
        plain = plain_llm.generate(PROMPTS)
    mixed = llm.generate([p for p in PROMPTS for _ in range(2)], [exact, SamplingParams()] * len(PROMPTS))
    assert [o.outputs[0].token_ids for o in mixed[0::2]] == [o.outputs[0].token_ids for o in plain]
    assert sum(o.metrics.num_loosened_tokens for o in mixed[0::2]) == 0
    assert sum(o.metrics.num_loosened_tokens for o in mixed[1::2]) > 0


def test_a_stream_grows_to_what_generate_returns(llm: LLM) -> None:
    outputs = [output.outputs[0] for output in llm.stream(PROMPTS[0])]
    want = llm.generate(PROMPTS[0])[0].outputs[0]
    assert len(outputs) > 2
    assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(outputs))
    assert (outputs[-1].text, outputs[-1].token_ids, outputs[-1].finish_reason) == (want.text, want.token_ids, "stop")
    assert all(output.finish_reason is None for output in outputs[:-1])


def test_leaving_a_stream_early_leaves_nothing_behind(llm: LLM) -> None:
    want = llm.generate(PROMPTS[1])[0].outputs[0].token_ids
    for _ in llm.stream(PROMPTS[0]):
        break
    assert llm.generate(PROMPTS[1])[0].outputs[0].token_ids == want


def test_streams_and_other_calls_may_interleave(llm: LLM) -> None:
    want = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[:3])]
    first, second = llm.stream(PROMPTS[0]), llm.stream(PROMPTS[1])
    seen = [[next(first)], [next(second)]]
    assert llm.generate(PROMPTS[2])[0].outputs[0].token_ids == want[2]
    seen[1] += second
    seen[0] += first
    assert [outputs[-1].outputs[0].token_ids for outputs in seen] == want[:2]
    assert all(outputs[-1].finished for outputs in seen)
    assert [outputs[0].prompt for outputs in seen] == PROMPTS[:2]


def test_each_streamed_output_has_the_metrics_of_its_moment(demo_engine: Path) -> None:
    """With a fixed draft length, since a round that is verified in parts is counted once but has several outputs."""
    with LLM(demo_engine, speculative_config={"adaptive_draft_length": False}) as llm:
        outputs = list(llm.stream(PROMPTS[0]))
    steps = [output.metrics.num_spec_steps for output in outputs]
    assert steps == sorted(set(steps)), "every output comes from another step"
    assert [o.metrics.num_output_tokens for o in outputs] == [len(o.outputs[0].token_ids) for o in outputs]
    assert [o.metrics.latency is None for o in outputs] == [not o.finished for o in outputs]


def test_requests_share_the_batch_and_outputs_keep_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [record["prompt"] for record in load_eval_prompts()[:24]]
    params = [SamplingParams(max_tokens=3 + 5 * (index % 7)) for index in range(24)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    for index in (0, 5, 11, 23):
        assert token_ids(llm.generate(prompts[index], params[index])) == token_ids([outputs[index]])


def test_more_prompts_than_the_queue_holds_complete_in_order(demo_engine: Path) -> None:
    prompts = [record["prompt"] for record in load_eval_prompts()[:20]]
    with LLM(demo_engine, max_queue_size=4, max_batch_size=2) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=12))
        assert [output.prompt for output in outputs] == prompts
        assert all(len(tokens) == 12 for tokens in token_ids(outputs))
        with pytest.raises(RequestError, match="n 5: more than max_queue_size 4"):
            llm.generate(prompts[0], SamplingParams(n=5, temperature=1))
        sampled = llm.generate(prompts[:3], SamplingParams(n=4, temperature=1, max_tokens=2))
        assert [len(output.outputs) for output in sampled] == [4, 4, 4]


def test_threads_may_use_one_llm_at_once(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40)
    want = token_ids(llm.generate(PROMPTS, params))
    with ThreadPoolExecutor(6) as pool:
        batches = list(pool.map(lambda _: token_ids(llm.generate(PROMPTS, params)), range(3)))
        streams = list(pool.map(lambda prompt: list(llm.stream(prompt, params))[-1], PROMPTS))
    assert batches == [want] * 3
    assert token_ids(streams) == want


def test_progress_goes_to_standard_error_and_only_when_asked_for(llm: LLM, capfd: pytest.CaptureFixture) -> None:
    llm.generate(PROMPTS[:3], SamplingParams(max_tokens=2))
    assert capfd.readouterr() == ("", "")
    llm.generate(PROMPTS[:3], SamplingParams(max_tokens=2), use_tqdm=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Processed prompts: 100%" in err
    assert "3/3" in err


def test_no_prompts_are_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert token_ids(llm.generate((PROMPTS[0],))) == token_ids(llm.generate(PROMPTS[0]))


def test_smaller_sizes_than_built_give_the_same_tokens(llm: LLM, demo_engine: Path) -> None:
    want = token_ids(llm.generate(PROMPTS))
    with LLM(demo_engine, max_num_seqs=3, max_model_len=256, max_num_tokens=20) as small:
        outputs = small.generate(PROMPTS)
        assert token_ids(outputs) == want
        (output,) = small.generate(PROMPTS[0], SamplingParams(max_tokens=None, ignore_eos=True))
        assert output.metrics.num_prompt_tokens + output.metrics.num_output_tokens == 256
        with pytest.raises(RequestError, match="prompt has 256 tokens, max_seq_len is 256 with the output"):
            small.generate({"prompt_token_ids": [5] * 256})


def test_metrics_are_a_flat_dict_of_numbers(llm: LLM) -> None:
    values = llm.metrics()
    assert all(name.startswith("fly_trt:") for name in values)
    assert all(isinstance(value, int | float) for value in values.values())
    (output,) = llm.generate(PROMPTS[0])
    grown = llm.metrics()["fly_trt:generation_tokens_total"] - values["fly_trt:generation_tokens_total"]
    assert grown == len(output.outputs[0].token_ids)


@pytest.mark.usefixtures("slow_steps")
def test_an_abort_from_another_thread_keeps_what_was_emitted(llm: LLM) -> None:
    outputs = []
    for output in llm.stream(PROMPTS[0], LONG):
        if not outputs:
            threading.Thread(target=llm.abort, args=(output.request_id,)).start()
        outputs.append(output)
    last = outputs[-1].outputs[0]
    assert (last.finish_reason, last.stop_reason) == ("abort", None)
    assert outputs[-1].finished
    assert 0 < len(last.token_ids) < 1500
    assert last.text.startswith(outputs[0].outputs[0].text)
    assert last.text == llm.tokenizer.decode(last.token_ids)
    assert is_idle(llm)


def test_an_abort_of_what_is_not_served_does_nothing(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=3))
    llm.abort(output.request_id)
    llm.abort("no such request")
    assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=3))[0].outputs[0].finish_reason == "length"


@pytest.mark.usefixtures("slow_steps")
def test_an_interrupt_leaves_nothing_running_and_the_llm_usable(llm: LLM) -> None:
    want = token_ids(llm.generate(PROMPTS[:2]))
    emitted = llm.metrics()["fly_trt:generation_tokens_total"]

    def interrupt() -> None:
        wait_until(lambda: llm.metrics()["fly_trt:generation_tokens_total"] > emitted)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS * 4, LONG)
    finally:
        signal.signal(signal.SIGINT, handler)
    interrupter.join()
    wait_until(lambda: is_idle(llm))
    assert token_ids(llm.generate(PROMPTS[:2])) == want


@pytest.mark.usefixtures("slow_steps")
def test_shutdown_ends_a_running_stream_with_what_it_has(demo_engine: Path) -> None:
    llm = LLM(demo_engine)
    stream = llm.stream(PROMPTS[0], LONG)
    first = next(stream)
    llm.shutdown()
    *_, last = stream
    assert last.outputs[0].finish_reason == "abort"
    assert last.outputs[0].text.startswith(first.outputs[0].text)
    with pytest.raises(ConfigError, match="shut down"):
        next(llm.stream(PROMPTS[0]))
    llm.abort(first.request_id)
    assert llm.metrics()["fly_trt:num_requests_running"] == 0


def test_every_shutdown_says_when_a_step_does_not_end(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, is_stuck = threading.Event(), threading.Event()
    run = OnnxRuntimeEngine.run

    def stuck(engine: OnnxRuntimeEngine, step: Step) -> None:
        is_stuck.set()
        assert ends.wait(60)
        run(engine, step)

    monkeypatch.setattr(thread_module, "JOIN_SECONDS", 0.01)
    llm = LLM(demo_engine)
    monkeypatch.setattr(OnnxRuntimeEngine, "run", stuck)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(llm.generate, PROMPTS[0])
        assert is_stuck.wait(60)
        for _ in range(2):
            with pytest.raises(EngineError, match="has not ended"):
                llm.shutdown()
        monkeypatch.setattr(thread_module, "JOIN_SECONDS", 60)
        ends.set()
        assert call.result(60)[0].outputs[0].finish_reason == "abort"
        llm.shutdown()
        llm.shutdown()


@pytest.mark.usefixtures("slow_steps")
def test_shutdown_wakes_a_thread_that_generates(demo_engine: Path) -> None:
    llm = LLM(demo_engine, max_batch_size=2)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(llm.generate, PROMPTS, LONG)
        wait_until(lambda: llm.metrics()["fly_trt:generation_tokens_total"] > 0)
        llm.shutdown()
        outputs = call.result(timeout=20)
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort"] * len(PROMPTS)


@pytest.mark.usefixtures("slow_steps")
def test_an_llm_that_nobody_holds_ends_its_thread(demo_engine: Path) -> None:
    before = engine_threads()
    llm = LLM(demo_engine)
    stream = llm.stream(PROMPTS[0], LONG)
    next(stream)
    (thread,) = engine_threads() - before
    del llm, stream
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("ending", ["", "stream = llm.stream(prompt, params); next(stream)", "raise SystemExit(0)"])
def test_a_program_that_never_calls_shutdown_exits_cleanly(demo_engine: Path, ending: str) -> None:
    code = (
        "import sys\nfrom fly_trt import LLM, SamplingParams\n"
        "llm, prompt, params = LLM(sys.argv[1]), sys.argv[2], SamplingParams(max_tokens=1500, ignore_eos=True)\n"
        f"print(llm.generate(prompt, SamplingParams(max_tokens=4))[0].finished)\n{ending}"
    )
    command = [sys.executable, "-c", code, str(demo_engine), PROMPTS[0]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")
