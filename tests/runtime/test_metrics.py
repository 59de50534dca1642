"""Metrics: names that dashboards know, counters that agree with the requests' own numbers, and the log line."""

import itertools
import logging
import re
import time
from pathlib import Path
from types import SimpleNamespace

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from eval_prompts import load_eval_prompts
from fly_trt import LLM, RequestOutput, SamplingParams
from fly_trt.engines.base import Step
from fly_trt.engines.onnxruntime import OnnxRuntimeEngine
from fly_trt.outputs import RoundCounts
from fly_trt.runtime import metrics as metrics_module
from fly_trt.runtime import request as request_module
from fly_trt.runtime.metrics import Metrics

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:6]]
NAMES = (
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    'spec_decode_num_accepted_tokens_per_pos_total{position="0"}',
    "spec_decode_num_loosened_tokens_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    *(
        f"{name}_{part}"
        for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds")
        for part in ("count", "sum", 'bucket{le="+Inf"}')
    ),
)
LOG_LINE = re.compile(
    r"running (\d+), waiting (\d+), ([\d.]+) tokens/s, acceptance length ([\d.]+), KV cache ([\d.]+) %, "
    r"prefix reuse ([\d.]+) %"
)


def values_of(llm: LLM) -> dict[str, float]:
    return {name.removeprefix("fly_trt:"): value for name, value in llm.metrics().items()}


def total(outputs: list[RequestOutput], name: str) -> float:
    return sum(getattr(output.metrics, name) for output in outputs)


def test_every_name_is_there_before_the_first_request(demo_engine: Path) -> None:
    with LLM(demo_engine) as llm:
        values = llm.metrics()
    assert {f"fly_trt:{name}" for name in NAMES} <= values.keys()
    counted = {name: value for name, value in values.items() if "_info{" not in name}
    assert not any(counted.values()), "nothing was counted while it warmed up"


def test_routers_read_the_size_of_the_cache_in_blocks(demo_engine: Path) -> None:
    """As Kubernetes' Gateway API inference extension does: in labels of a gauge that is always 1."""
    with LLM(demo_engine, max_batch_size=2, max_seq_len=100) as llm:
        values = values_of(llm)
    assert values['cache_config_info{block_size="16",num_gpu_blocks="12"}'] == 1


def test_counters_are_the_sums_of_the_requests(demo_engine: Path) -> None:
    params = [SamplingParams(max_tokens=40), SamplingParams(n=3, temperature=1, seed=1, max_tokens=20)] * 3
    with LLM(demo_engine) as llm:
        outputs = llm.generate(PROMPTS, params)
        values = values_of(llm)
    assert values["spec_decode_num_drafts_total"] == total(outputs, "num_spec_steps") > 0
    assert values["spec_decode_num_draft_tokens_total"] == total(outputs, "num_draft_tokens")
    assert values["spec_decode_num_accepted_tokens_total"] == total(outputs, "num_accepted_tokens") > 0
    assert values["spec_decode_num_loosened_tokens_total"] == total(outputs, "num_loosened_tokens")
    assert values["generation_tokens_total"] == total(outputs, "num_output_tokens")
    histograms = [output.metrics.acceptance_histogram for output in outputs]
    for position in range(15):
        want = sum(sum(histogram[position + 1 :]) for histogram in histograms)
        name = f'spec_decode_num_accepted_tokens_per_pos_total{{position="{position}"}}'
        assert values.get(name, 0) == want
    # Each completion has a prompt, a first token and an end of its own.
    each = [len(output.outputs) for output in outputs]
    prompt_tokens = sum(n * len(output.prompt_token_ids) for n, output in zip(each, outputs, strict=True))
    assert values["prompt_tokens_total"] == values["prefix_cache_queries_total"] == prompt_tokens
    assert values["time_to_first_token_seconds_count"] == values["e2e_request_latency_seconds_count"] == sum(each)
    reasons = [completion.finish_reason for output in outputs for completion in output.outputs]
    for reason in set(reasons):
        assert values[f'request_success_total{{finished_reason="{reason}"}}'] == reasons.count(reason)


def test_times_agree_with_the_requests(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still but for a second a step, so that it does not matter who looks at it when."""
    start, num_steps, run = time.perf_counter(), itertools.count(1), OnnxRuntimeEngine.run
    clock = SimpleNamespace(perf_counter=lambda: clock.now, now=start)

    def run_for_a_second(engine: OnnxRuntimeEngine, step: Step) -> None:
        run(engine, step)
        clock.now = start + next(num_steps)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", run_for_a_second)
    for module in (metrics_module, request_module):
        monkeypatch.setattr(module, "time", clock)
    with LLM(demo_engine, speculative_config={"method": None}) as llm:
        (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30, ignore_eos=True))
        values = values_of(llm)
    metrics = output.metrics
    assert values["time_to_first_token_seconds_sum"] == pytest.approx(metrics.time_to_first_token)
    assert values["e2e_request_latency_seconds_sum"] == pytest.approx(metrics.latency)
    assert values["inter_token_latency_seconds_count"] == 29
    assert values["inter_token_latency_seconds_sum"] == pytest.approx(29)
    assert metrics.latency - metrics.time_to_first_token == pytest.approx(29)


@pytest.mark.usefixtures("slow_steps")
def test_an_aborted_request_counts_what_it_emitted(demo_engine: Path) -> None:
    with LLM(demo_engine) as llm:
        for output in llm.stream(PROMPTS[0], SamplingParams(max_tokens=1500, ignore_eos=True)):
            llm.abort(output.request_id)
        values = values_of(llm)
    assert output.outputs[0].finish_reason == "abort"
    assert values["generation_tokens_total"] == len(output.outputs[0].token_ids)
    assert values['request_success_total{finished_reason="abort"}'] == 1
    assert values["num_requests_running"] == values["num_requests_waiting"] == values["kv_cache_usage_perc"] == 0


@pytest.mark.usefixtures("slow_steps")
def test_gauges_show_the_load_and_are_zero_when_idle(demo_engine: Path) -> None:
    params = SamplingParams(max_tokens=1500, ignore_eos=True)
    with LLM(demo_engine, max_batch_size=1, speculative_config={"method": None}) as llm:
        stream = llm.stream(PROMPTS[0], params)
        output, values = next(stream), values_of(llm)
        while not values["num_requests_running"]:  # the step that made the first output ends
            output, values = next(stream), values_of(llm)
        assert values["num_requests_running"] == 1
        num_tokens = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
        assert (num_tokens - 2) / 2048 <= values["kv_cache_usage_perc"] < 0.99
        stream.close()
        llm.generate(PROMPTS, SamplingParams(max_tokens=4))
        values = values_of(llm)
    assert values["num_requests_running"] == values["num_requests_waiting"] == values["kv_cache_usage_perc"] == 0


def test_a_repeated_prompt_is_read_from_the_cache(demo_engine: Path) -> None:
    prompt = {"prompt_token_ids": list(range(2, 302))}
    params = SamplingParams(max_tokens=2)
    with LLM(demo_engine) as llm:
        first, second = (llm.generate(prompt, params)[0] for _ in range(2))
        values = values_of(llm)
    assert values["prefix_cache_queries_total"] == 600
    assert 280 <= values["prefix_cache_hits_total"] <= 299
    assert (first.metrics.num_cached_tokens, second.metrics.num_cached_tokens) == (0, values["prefix_cache_hits_total"])
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_prefix_caching_can_be_turned_off(demo_engine: Path) -> None:
    prompt = {"prompt_token_ids": list(range(2, 302))}
    with LLM(demo_engine, enable_prefix_caching=False) as llm:
        outputs = [llm.generate(prompt, SamplingParams(max_tokens=2))[0] for _ in range(2)]
        assert values_of(llm)["prefix_cache_hits_total"] == 0
    assert [output.metrics.num_cached_tokens for output in outputs] == [0, 0]


def test_a_line_is_logged_every_few_seconds_of_service(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_module, "LOG_SECONDS", 0.1)
    caplog.set_level(logging.INFO, logger="fly_trt.runtime.metrics")
    with LLM(demo_engine) as llm:
        llm.generate(PROMPTS * 2, SamplingParams(max_tokens=150, ignore_eos=True))
    found = [LOG_LINE.fullmatch(record.getMessage()) for record in caplog.records]
    assert len(found) >= 2
    assert all(found), caplog.messages
    assert any(int(match[1]) == 8 and int(match[2]) > 0 for match in found)
    assert all(float(match[3]) > 0 for match in found)
    assert all(1 <= float(match[4]) <= 16 for match in found)
    assert all(0 <= float(match[5]) <= 100 and 0 <= float(match[6]) <= 100 for match in found)


def test_the_line_has_the_rates_of_its_window_and_idle_time_is_no_window(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    caplog.set_level(logging.INFO, logger="fly_trt.runtime.metrics")
    metrics = Metrics()

    def step_at(seconds: float, num_tokens: int) -> list[str]:
        clock.now = 1000.0 + seconds
        metrics.record_tokens(num_tokens, 0.5, is_first=False)
        metrics.record_round(RoundCounts(15, num_tokens - 1, 0, {"model": 15}, {"model": num_tokens - 1}), "fly")
        caplog.clear()
        metrics.set_load(num_running=1, num_waiting=3, cache_usage=0.375)
        return caplog.messages

    assert step_at(0, 4) == []
    assert step_at(9, 5) == []
    assert step_at(10, 7) == [
        "running 1, waiting 3, 1.2 tokens/s, acceptance length 6.00, KV cache 37.5 %, prefix reuse 0.0 %"
    ]
    assert step_at(19, 9) == []
    assert step_at(45, 9) == [], "nothing ran for so long that the rates would mean nothing"
    assert step_at(56, 11) == [
        "running 1, waiting 3, 1.0 tokens/s, acceptance length 11.00, KV cache 37.5 %, prefix reuse 0.0 %"
    ]


def test_nothing_is_logged_in_less_time_than_that(demo_engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fly_trt.runtime.metrics")
    with LLM(demo_engine) as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=10))
    assert caplog.records == []


def test_every_llm_has_a_registry_of_its_own(demo_engine: Path) -> None:
    with LLM(demo_engine) as first, LLM(demo_engine) as second:
        first.generate(PROMPTS[0], SamplingParams(max_tokens=5))
        assert first.registry is not second.registry
        assert first.registry is not prometheus_client.REGISTRY
        assert values_of(first)["generation_tokens_total"] == 5
        assert values_of(second)["generation_tokens_total"] == 0
    public = {sample.name for family in prometheus_client.REGISTRY.collect() for sample in family.samples}
    assert not any("fly_trt" in name for name in public)


def test_the_registry_is_exported_as_prometheus_reads_it(demo_engine: Path) -> None:
    with LLM(demo_engine) as llm:
        llm.generate(PROMPTS[0], SamplingParams(max_tokens=20))
        text = prometheus_client.generate_latest(llm.registry).decode()
        values = llm.metrics()
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("fly_trt:")
        assert family.documentation.endswith(".")
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    assert samples.items() >= values.items()
