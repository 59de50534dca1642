"""Audits of an engine directory that is served: the demo pair with the draft that is often wrong."""

from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, SamplingParams
from fly_trt.benchmark.likelihood import Likelihood
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import ConfigError
from fly_trt.outputs import RequestOutput
from fly_trt.runtime.audit import AuditResult
from fly_trt.service.config import ServiceConfig

SECONDS = 60.0
PROMPTS = [record["prompt"] for record in load_eval_prompts()[::40]]
LOOSE = SamplingParams(max_tokens=40, acceptance=AcceptanceParams(fly_entropy_threshold=0.0, fly_window_size=1))
EXACT = SamplingParams(max_tokens=40, acceptance=AcceptanceParams(acceptance="exact"))
AUDITS: dict[str, Any] = {"audit_fraction": 1.0, "audit_exact_fraction": 1.0}


def serve(llm: LLM, queue: "SimpleQueue[AuditResult]") -> tuple[list[RequestOutput], dict[str, AuditResult]]:
    """The outputs of the prompts, and what audits found."""
    outputs = llm.generate(PROMPTS, LOOSE)
    results = [queue.get(timeout=SECONDS) for _ in outputs]
    return outputs, {result.request_id: result for result in results}


def test_every_answer_is_read_as_a_likelihood_reads_it_and_its_exact_text_is_the_exact_one(weak_engine: Path) -> None:
    queue: SimpleQueue[AuditResult] = SimpleQueue()
    with LLM(weak_engine, on_audit=queue.put, **AUDITS) as llm:  # as many slots as were built, and one more
        outputs, results = serve(llm, queue)
        exact = llm.generate(PROMPTS, EXACT)
        assert llm.audits is not None
        assert llm.audits.num_audited == len(PROMPTS)
        assert llm.audits.left_out == {"exact": len(PROMPTS)}
    with LLM(weak_engine) as llm:
        assert llm.audits is None
        unaudited = llm.generate(PROMPTS, LOOSE)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in unaudited]
    assert [o.metrics.num_cached_tokens for o in outputs] == [o.metrics.num_cached_tokens for o in unaudited]
    assert sum(output.metrics.num_loosened_tokens for output in outputs) > 10
    with LoadedEngines(weak_engine, max_batch_size=1) as engines:
        likelihood = Likelihood(engines)
        for output, other in zip(outputs, exact, strict=True):
            result, tokens = results[output.request_id], output.outputs[0].token_ids
            found = likelihood.log_likelihood(output.prompt_token_ids, tokens)
            assert result.log_likelihood == pytest.approx(found, rel=1e-4, abs=1e-4)
            assert result.num_differing == output.metrics.num_loosened_tokens
            assert (result.quality < 1) == (result.num_differing > 0)
            assert result.exact is not None
            assert result.exact.token_ids.tolist() == other.outputs[0].token_ids
            assert result.exact.is_same == (tokens == other.outputs[0].token_ids)


def test_those_who_share_engines_audit_in_free_slots(weak_engine: Path) -> None:
    queue: SimpleQueue[AuditResult] = SimpleQueue()
    with LoadedEngines(weak_engine, max_batch_size=2) as engines:
        audited = LLM(engines, enable_prefix_caching=False, on_audit=queue.put, **AUDITS)
        other = LLM(engines, enable_prefix_caching=False)
        for llm in (audited, other, audited):
            outputs = llm.generate(PROMPTS[:3], LOOSE)
        results = [queue.get(timeout=SECONDS) for _ in range(2 * len(outputs))]
        by_tokens = {tuple(output.outputs[0].token_ids): output for output in outputs}
        for result in results:
            output = by_tokens[tuple(result.token_ids.tolist())]
            assert result.num_differing == output.metrics.num_loosened_tokens
        audited.shutdown()
        other.shutdown()


def test_asked_for_settings_become_those_of_audits() -> None:
    config = ServiceConfig(audit_fraction=0.5, audit_share=0.1, audit_seed=7, audit_max_queue_size=9)
    audits = config.audit_config()
    assert (audits.fraction, audits.share, audits.seed, audits.max_queue_size) == (0.5, 0.1, 7, 9)
    assert ServiceConfig().audit_config().fraction == 0
    with pytest.raises(ConfigError, match="audit_fraction 2: expected a number from 0 to 1"):
        ServiceConfig(audit_fraction=2)
    with pytest.raises(ConfigError, match=r"audit_share 0\.1: has no effect without audit_fraction"):
        ServiceConfig(audit_share=0.1)
