"""LLM on a TensorRT engine directory, on the simulated GPU: token for token what the demo pair's ONNX Runtime engines
generate, in batches, in every mode of speculation, greedy and sampled, with prompts that are read in chunks.
"""

from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, EngineError, SamplingParams
from fly_trt.runtime.audit import AuditResult
from simulated_cuda import Error, SimulatedCuda

RECORDS = load_eval_prompts()
PROMPTS = [record["prompt"] for record in RECORDS[::20]]
SHORT = {"max_tokens": 48}
CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "exact": ("multi_level", {"acceptance": "exact"}),
    "FLy": ("multi_level", {"acceptance": "fly"}),
    "FLy without a lookup": ("draft_model", {"acceptance": "fly"}),
    "n-gram": ("ngram", {"acceptance": "exact"}),
    "sampled": ("multi_level", {"acceptance": "exact", "temperature": 0.9, "top_p": 0.95, "seed": 5, "logprobs": 2}),
    "sampled FLy": ("multi_level", {"acceptance": "fly", "temperature": 0.7, "seed": 6}),
}


def generate(directory: Path, prompts: list[str], method: str | None, settings: dict[str, Any]) -> list[Any]:
    acceptance = AcceptanceParams(acceptance=settings["acceptance"]) if "acceptance" in settings else None
    sampling = {name: value for name, value in settings.items() if name != "acceptance"}
    with LLM(directory, speculative_config={"method": method}, max_batch_size=4, max_seq_len=300) as llm:
        return llm.generate(prompts, SamplingParams(**SHORT | sampling, acceptance=acceptance))


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_onnxruntime(
    case: str, demo_engine: Path, simulated_engine: Path, gpu: SimulatedCuda
) -> None:
    want = generate(demo_engine, PROMPTS, *CASES[case])
    got = generate(simulated_engine, PROMPTS, *CASES[case])
    assert len(PROMPTS) == 12
    assert gpu.calls["cudaGraphLaunch"] > 20
    assert [output.outputs[0].token_ids for output in got] == [output.outputs[0].token_ids for output in want]
    if "FLy" in case:
        assert sum(output.metrics.num_loosened_tokens for output in got) > 0
    if "logprobs" in CASES[case][1]:
        for ours, theirs in zip(got, want, strict=True):
            for a, b in zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
                assert [entry.logprob for entry in a.values()] == pytest.approx(
                    [entry.logprob for entry in b.values()], abs=1e-3
                )


def test_long_prompts_are_read_in_chunks(demo_engine: Path, simulated_engine: Path, gpu: SimulatedCuda) -> None:
    """Longer than a step may be, beside short ones, and with a slot that is copied for the one that begins alike."""
    long = "".join(record["prompt"] for record in RECORDS[:4])
    prompts = [PROMPTS[0], long, PROMPTS[1], long, PROMPTS[2]]
    want = generate(demo_engine, prompts, *CASES["FLy"])
    got = generate(simulated_engine, prompts, *CASES["FLy"])
    assert len(want[1].prompt_token_ids) > 100
    assert [output.outputs[0].token_ids for output in got] == [output.outputs[0].token_ids for output in want]


def test_audits_find_what_they_find_on_onnxruntime(
    demo_engine: Path, simulated_engine: Path, gpu: SimulatedCuda
) -> None:
    """In a slot beyond those that were built for."""
    params = SamplingParams(max_tokens=40, acceptance=AcceptanceParams(fly_entropy_threshold=0.0, fly_window_size=1))
    found: list[list[tuple[Any, ...]]] = []
    for directory in (demo_engine, simulated_engine):
        results: SimpleQueue[AuditResult] = SimpleQueue()
        with LLM(directory, audit_fraction=1.0, audit_exact_fraction=1.0, on_audit=results.put) as llm:
            outputs = llm.generate(PROMPTS[:3], params)
            audits = sorted((results.get(timeout=60) for _ in outputs), key=lambda result: result.request_id)
        found.append([(audit.num_differing, audit.parted_at, audit.exact) for audit in audits])
        assert [audit.num_differing for audit in audits] == [o.metrics.num_loosened_tokens for o in outputs]
    assert found[0] == found[1]
    assert sum(num_differing for num_differing, *_ in found[0]) > 0


def test_shutting_down_frees_the_gpu(simulated_engine: Path, gpu: SimulatedCuda) -> None:
    generate(simulated_engine, PROMPTS[:2], *CASES["FLy"])
    assert gpu.calls["cudaMalloc"] > 0
    assert not [found for found in gpu.allocations.values() if found.is_device]
    assert not gpu.executables
    assert not gpu.contexts


def test_a_gpu_that_fails_ends_the_requests_and_both_engines(simulated_engine: Path, gpu: SimulatedCuda) -> None:
    with LLM(simulated_engine, max_batch_size=2) as llm:
        gpu.fatal_error = Error.cudaErrorIllegalAddress
        with pytest.raises(EngineError, match="CUDA: cudaErrorIllegalAddress"):
            llm.generate(PROMPTS[:3])
    assert not gpu.executables
    assert not gpu.contexts
