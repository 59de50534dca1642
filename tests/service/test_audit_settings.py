"""Settings of audits, their log and the breaker: what is refused, and what is left out where there is nothing to do."""

from pathlib import Path

import pytest

from fly_trt import LLM
from fly_trt.errors import ConfigError
from fly_trt.service.config import ServiceConfig


def test_they_become_those_of_the_log_and_of_the_breaker():
    config = ServiceConfig(
        audit_fraction=0.1,
        audit_log="a.jsonl",
        audit_log_max_bytes=10,
        audit_log_backups=0,
        audit_log_text=True,
        min_quality=0.9,
        breaker_error_rate=0.1,
        breaker_reset_seconds=60,
    )
    log, breaker = config.audit_log_config(), config.breaker_config()
    assert (log.path, log.max_bytes, log.backups, log.has_text) == ("a.jsonl", 10, 0, True)
    assert (breaker.min_quality, breaker.error_rate, breaker.reset_seconds) == (0.9, 0.1, 60)


def test_without_a_path_there_is_no_log_and_with_min_quality_0_no_breaker():
    config = ServiceConfig(audit_fraction=0.1, min_quality=0)
    assert config.audit_log_config() is None
    assert config.breaker_config() is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"audit_log": "a"}, "audit_log 'a': has no effect without audit_fraction"),
        ({"min_quality": 0.9}, "min_quality 0.9: has no effect without audit_fraction"),
        ({"breaker_reset_seconds": 60}, "breaker_reset_seconds 60: has no effect without audit_fraction"),
        ({"audit_fraction": 1.0, "audit_log_text": True}, "audit_log_text True: has no effect without audit_log"),
        (
            {"audit_fraction": 1.0, "min_quality": 0, "breaker_reset_seconds": 60},
            "breaker_reset_seconds 60: has no effect without min_quality",
        ),
        ({"audit_fraction": 1.0, "min_quality": 2}, "min_quality 2: expected a number"),
        ({"audit_fraction": 1.0, "audit_log": "a", "audit_log_text": 1}, "audit_log_text 1: expected True or False"),
    ],
    ids=str,
)
def test_what_cannot_be_or_has_no_effect_is_refused_by_its_name(settings, said):
    with pytest.raises(ConfigError, match=said):
        ServiceConfig(**settings)


def test_who_takes_results_of_audits_that_are_not_made_is_told(demo_engine: Path):
    with pytest.raises(ConfigError, match="on_audit: has no effect without audit_fraction"):
        LLM(demo_engine, on_audit=print)


def test_without_audits_there_is_no_breaker_to_ask_or_to_reset_and_no_metric_of_one(demo_engine: Path):
    with LLM(demo_engine, max_batch_size=1) as llm:
        assert llm.breaker_state() == []
        with pytest.raises(ConfigError, match="there is no breaker to reset: serve with audit_fraction"):
            llm.reset_breaker()
        assert not [name for name in llm.metrics() if "audit" in name or "breaker" in name]
