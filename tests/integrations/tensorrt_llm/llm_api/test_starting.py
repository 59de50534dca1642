"""How tensorrt_llm.LLM is started for a directory, what it is started with, and how it ends."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from check_tensorrt_llm import Tree, check
from fly_trt import (
    LLM,
    AsyncLLM,
    ConfigError,
    EngineDeadError,
    EngineError,
    QueueTimeoutError,
    SamplingParams,
)
from fly_trt.integrations.tensorrt_llm.environment import FORWARDED, STOP_TOKENS_VARIABLE, VARIABLE
from fly_trt.integrations.tensorrt_llm.names import NAMES
from served_by_tensorrt_llm import DEATH, LONG, PROMPTS, RULE, SPECULATIVE_CONFIG, told


def test_the_rule_is_seen(directory: Path, own: LLM, stand_in: Any) -> None:
    params = SamplingParams(max_tokens=120)
    loose = [output.outputs[0].token_ids for output in own.generate(PROMPTS, params)]
    with LLM(directory, speculative_config={"acceptance": "exact"}) as exact:
        strict = [output.outputs[0].token_ids for output in exact.generate(PROMPTS, params)]
    assert loose != strict


def test_an_end_token_that_is_not_emitted_is_there_all_the_same(
    directory: Path, own: LLM, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_EMITS_END", "no")
    params = SamplingParams(max_tokens=120)
    with LLM(directory) as llm:
        outputs = llm.generate(PROMPTS, params)
    expected = own.generate(PROMPTS, params)
    assert [told(output.outputs[0]) for output in outputs] == [told(output.outputs[0]) for output in expected]


def test_async_llm_serves_many_clients(directory: Path, own: LLM, stand_in: Any) -> None:
    params = SamplingParams(max_tokens=60)

    async def one(llm: AsyncLLM, prompt: str) -> tuple[Any, ...]:
        async for output in llm.generate(prompt, params):
            last = output
        return told(last.outputs[0])

    async def leave(llm: AsyncLLM) -> None:
        async for _ in llm.generate(PROMPTS[0], LONG):
            break

    async def all_of_them() -> list[tuple[Any, ...]]:
        async with AsyncLLM(directory) as llm:
            results = await asyncio.gather(leave(llm), *(one(llm, prompt) for prompt in PROMPTS), leave(llm))
            return results[1:-1]

    expected = [told(output.outputs[0]) for output in own.generate(PROMPTS, params)]
    assert asyncio.run(all_of_them()) == expected


@pytest.mark.parametrize("version", ["1.2.1", "1.3.0rc4"])
def test_a_worker_that_dies_ends_the_llm_with_one_line(
    version: str, directory: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", version)
    with LLM(directory) as llm:
        stream = llm.stream(PROMPTS[0], LONG)
        next(stream)
        with pytest.raises(EngineDeadError, match=r"stopped after an error \(.*worker process died\)") as raised:
            llm.generate(DEATH)
        assert "\n" not in str(raised.value)
        with pytest.raises(EngineDeadError):
            list(stream)
        with pytest.raises(EngineDeadError):
            llm.generate("later")


def test_what_would_end_the_thread_of_its_loop_ends_the_llm(
    directory: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*args: Any, **kwargs: Any) -> Any:
        raise SystemExit("no more")

    with LLM(directory) as llm:
        monkeypatch.setattr(type(stand_in().STARTED[-1]), "generate_async", leave)
        with pytest.raises(EngineDeadError, match="no more"):
            llm.generate(PROMPTS[0])


def test_who_waits_too_long_for_a_slot_is_told(directory: Path, stand_in: Any) -> None:
    async def wait(llm: AsyncLLM) -> None:
        async for _ in llm.generate(PROMPTS[0], LONG):
            with pytest.raises(QueueTimeoutError, match="timed out in the queue"):
                await anext(llm.generate(PROMPTS[1], queue_timeout=0.05))
            break

    async def serve() -> None:
        async with AsyncLLM(directory, max_batch_size=1) as llm:
            await wait(llm)

    asyncio.run(serve())


def test_shutdown_while_requests_run(directory: Path, stand_in: Any) -> None:
    llm = LLM(directory)
    stream = llm.stream(PROMPTS[0], LONG)
    next(stream)
    worker = stand_in().STARTED[-1]._executor.worker_pid
    llm.shutdown()
    last = list(stream)[-1]
    assert last.outputs[0].finish_reason == "abort"
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_program_that_ends_without_a_shutdown_ends_in_order(directory: Path, stand_in: Any) -> None:
    """tensorrt_llm has itself shut down then too, by the main thread: it must find that done."""
    program = f"""
from fly_trt import LLM, SamplingParams
llm = LLM({str(directory)!r})
stream = llm.stream("Hello", SamplingParams(max_tokens=1500, ignore_eos=True))
next(stream)
print("running")
"""
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "stand_in"), os.environ["PYTHONPATH"]])}
    run = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | paths, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout.strip()) == (0, "running"), run.stderr
    assert "Error" not in run.stderr


def test_several_sequences_of_a_prompt_are_several_requests(make_directory: Any, stand_in: Any) -> None:
    directory = make_directory(speculative_config=SPECULATIVE_CONFIG | {"allow_advanced_sampling": True})
    with LLM(directory) as llm:
        params = SamplingParams(n=3, max_tokens=20, temperature=0.9, top_k=40, top_p=0.8, ignore_eos=True)
        (output,) = llm.generate(PROMPTS[2], params)
        sent = stand_in().STARTED[-1]._executor.sent
    assert [len(completion.token_ids) for completion in output.outputs] == [20] * 3
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert [(params.temperature, params.top_k, params.top_p) for params in sent] == [(0.9, 40, 0.8)] * 3


def test_plain_decoding_needs_nothing_of_fly(
    directory: Path, demo_engine: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "vllm,0.1")  # of somebody else
    params = SamplingParams(max_tokens=60)
    with LLM(directory, speculative_config={"method": None}) as llm:
        outputs = llm.generate(PROMPTS[:4], params)
        assert stand_in().STARTED[-1].speculative is None
    with LLM(demo_engine, speculative_config={"method": None}) as llm:
        expected = llm.generate(PROMPTS[:4], params)
    assert [told(output.outputs[0]) for output in outputs] == [told(output.outputs[0]) for output in expected]
    assert {output.metrics.num_spec_steps for output in outputs} == {0}
    assert os.environ[VARIABLE] == "vllm,0.1"


@pytest.mark.parametrize(
    "asked", [{"preset": "vllm"}, {"fly_entropy_threshold": 0.05}, {"preset": "paper", "fly_window_size": 2}]
)
def test_the_rule_may_be_chosen_when_it_is_loaded(
    asked: dict[str, Any], directory: Path, demo_engine: Path, stand_in: Any
) -> None:
    params = SamplingParams(max_tokens=60)
    with LLM(directory, speculative_config=asked) as llm:
        outputs = llm.generate(PROMPTS[:6], params)
    with LLM(demo_engine, speculative_config=RULE | asked) as llm:
        expected = llm.generate(PROMPTS[:6], params)
    assert [told(output.outputs[0]) for output in outputs] == [told(output.outputs[0]) for output in expected]


def test_one_process_may_load_it_by_one_rule_and_then_by_another(
    directory: Path, own: LLM, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPI's environment is that of its start; what the second LLM says has to reach its workers all the same."""
    for variable in (VARIABLE, STOP_TOKENS_VARIABLE, *FORWARDED.values()):
        monkeypatch.delenv(variable, raising=False)
    params, texts = SamplingParams(max_tokens=120), []
    for asked in ({}, {"acceptance": "exact"}, {}):
        with LLM(directory, speculative_config=asked) as llm:
            texts.append([output.outputs[0].text for output in llm.generate(PROMPTS, params)])
        assert not {VARIABLE, STOP_TOKENS_VARIABLE, *FORWARDED.values()} & set(os.environ)
    assert texts[0] == texts[2] == [output.outputs[0].text for output in own.generate(PROMPTS, params)]
    assert texts[0] != texts[1]


def test_what_was_built_and_what_is_asked_for_are_its_arguments(make_directory: Any, stand_in: Any) -> None:
    directory = make_directory(enable_chunked_prefill=True, cuda_graph_config={"enable_padding": True})
    with LLM(directory, max_batch_size=2, max_seq_len=512, max_num_tokens=64, enable_prefix_caching=False):
        llm = stand_in().STARTED[-1]
    assert (llm.model, llm.revision) == ("org/target", "abc")
    assert {name: llm.kwargs[name] for name in ("max_batch_size", "max_seq_len", "max_num_tokens")} == {
        "max_batch_size": 2,
        "max_seq_len": 512,
        "max_num_tokens": 64,
    }
    assert llm.kwargs["cuda_graph_config"] == {"enable_padding": True}
    assert llm.kwargs["enable_chunked_prefill"] is True
    assert llm.speculative.decoding_type == "Eagle3"


def test_rounds_are_not_counted_where_a_response_has_several(make_directory: Any, stand_in: Any) -> None:
    with LLM(make_directory(stream_interval=4)) as llm:
        (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30))
    assert output.metrics.num_output_tokens > 0
    assert output.metrics.num_spec_steps == 0


def test_a_prompt_that_the_server_refuses_is_one_requests_error(make_directory: Any, stand_in: Any) -> None:
    with LLM(make_directory(), max_num_tokens=64) as llm:
        with pytest.raises(EngineError, match=r"request 0: tensorrt_llm ended it: The sum of prompt length \(70\)"):
            llm.generate({"prompt_token_ids": [5] * 70})
        assert llm.generate({"prompt_token_ids": [5] * 9}, SamplingParams(max_tokens=3))


def test_a_missing_library_is_one_line_with_the_way(directory: Path) -> None:
    with pytest.raises(EngineError, match=r"needs tensorrt_llm, which is not installed.*--no-deps fly-trt") as raised:
        LLM(directory)
    assert "\n" not in str(raised.value)


def test_the_stand_in_has_every_name_that_is_used() -> None:
    findings = check(Tree(Path(__file__).parent / "stand_in"), [name for name in NAMES if name.part == "llm_api"])
    assert findings
    assert {finding.outcome for finding in findings} <= {"ok", "taken by **kwargs"}


def test_processes_that_would_start_without_fly_are_refused(
    directory: Path, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = sys.executable
    without = tmp_path / "python"
    without.write_text(f'#!/bin/sh\nexec {python} -S "$@"\n')  # without site-packages, where fly-trt's .pth may be
    without.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(without))
    with pytest.raises(EngineError, match=r"starts processes without FLy in them: .* pip install --no-deps fly-trt"):
        LLM(directory)
    monkeypatch.setattr(sys, "executable", python)
    with LLM(directory, speculative_config={"acceptance": "exact"}) as llm:
        assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=2))


def test_a_worker_in_this_process_is_refused(
    make_directory: Any, directory: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="gather_generation_logits: TensorRT-LLM's worker would be in this process"):
        LLM(make_directory(gather_generation_logits=True))
    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    with pytest.raises(ConfigError, match="TLLM_WORKER_USE_SINGLE_PROCESS: TensorRT-LLM's worker would be in this"):
        LLM(directory)
