"""Results of audits are counted, written down and judged; texts are nowhere but where they are asked for."""

import json
import logging

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from fly_trt.runtime.audit import AuditCounts, AuditResult, ExactComparison
from fly_trt.runtime.audit_log import AuditLogConfig
from fly_trt.runtime.audit_reports import AuditReports
from fly_trt.runtime.breaker import BreakerConfig

PROMPT, OUTPUT, EXACT = np.array([1, 2, 3]), np.array([4, 5, 6, 7]), np.array([4, 5, 9])


def result(*, quality=1.0, parted_at=None, exact=None, **more):
    settings = {
        "request_id": "cmpl-7",
        "acceptance": "fly",
        "num_prompt_tokens": 3,
        "num_tokens": 4,
        "num_loosened": 1,
        "finished_at": 1000.5,
        "num_differing": 0 if parted_at is None else 1,
        "log_likelihood": -1.0 + 4 * float(np.log(quality)),
        "best_log_likelihood": -1.0,
        "seconds": 0.25,
        "prompt_token_ids": PROMPT,
        "token_ids": OUTPUT,
    }
    return AuditResult(parted_at=parted_at, exact=exact, **(settings | more))


def words(token_ids):
    return " ".join(f"word{token}" for token in token_ids)


class Reported:
    """AuditReports with a file and a registry, and what is in them."""

    def __init__(self, folder, *, has_text=False, breaker=None):
        self.registry, self.path = CollectorRegistry(), folder / "audit.jsonl"
        log = AuditLogConfig(path=str(self.path), has_text=has_text)
        self.reports = AuditReports(breaker, log, self.registry, words)

    def value(self, name, **labels):
        return self.registry.get_sample_value(f"fly_trt:{name}", labels)

    def lines(self):
        self.reports.close()
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def test_an_audit_is_one_line_without_text(tmp_path):
    reported = Reported(tmp_path)
    reported.reports(result(quality=0.9, parted_at=2, exact=ExactComparison(3, 2, EXACT)))
    (line,) = reported.lines()
    assert line.pop("quality") == pytest.approx(0.9)
    assert line == {
        "request_id": "cmpl-7",
        "index": 0,
        "acceptance": "fly",
        "setting": "default",
        "num_prompt_tokens": 3,
        "num_tokens": 4,
        "num_loosened": 1,
        "finished_at": 1000.5,
        "num_differing": 1,
        "parted_at": 2,
        "log_likelihood": round(-1.0 + 4 * float(np.log(0.9)), 6),
        "best_log_likelihood": -1.0,
        "seconds": 0.25,
        "exact": {"num_tokens": 3, "parted_at": 2},
        "breaker": None,
    }


def test_texts_are_in_it_where_they_are_asked_for(tmp_path):
    reported = Reported(tmp_path, has_text=True)
    reported.reports(result(exact=ExactComparison(3, 2, EXACT)))
    reported.reports(result())
    first, second = reported.lines()
    assert (first["prompt"], first["output"]) == ("word1 word2 word3", "word4 word5 word6 word7")
    assert (first["exact_text"], second["exact_text"]) == ("word4 word5 word9", None)


def test_metrics_say_what_audits_found_and_what_they_cost(tmp_path):
    reported = Reported(tmp_path)
    counts = AuditCounts(num_drawn=9, num_audited=3, num_waiting=2, seconds=1.5, seconds_beside=0.5)
    counts.left_out["sampled"] = 4
    reported.reports.show_counts(counts)
    reported.reports(result())
    reported.reports(result(quality=0.97, parted_at=3, exact=ExactComparison(4, 3, EXACT)))
    reported.reports(result(exact=ExactComparison(4, None, OUTPUT)))
    reported.lines()
    value = reported.value
    assert value("audit_requests_drawn_total") == 9
    assert value("audits_waiting") == 2
    assert (value("audit_seconds_total"), value("audit_seconds_beside_total")) == (1.5, 0.5)
    assert value("audits_left_out_total", reason="sampled") == 4
    assert (value("audits_total", outcome="same"), value("audits_total", outcome="parted")) == (2, 1)
    assert (value("audit_exact_texts_total", outcome="same"), value("audit_exact_texts_total", outcome="parted")) == (
        1,
        1,
    )
    assert value("audit_tokens_total") == 12
    assert (value("audit_quality_count"), value("audit_quality_bucket", le="0.96")) == (3, 0)
    assert value("audit_quality_bucket", le="0.97") == 1
    assert value("audit_quality_sum") == pytest.approx(2.97)
    assert value("audit_regret_nats_bucket", le="0.0") == 2
    assert value("audit_regret_nats_sum") == pytest.approx(-np.log(0.97))
    assert (value("audit_parted_at_tokens_count"), value("audit_parted_at_tokens_bucket", le="4.0")) == (1, 1)
    assert value("audit_log_lines_total", outcome="written") == 3
    assert value("breaker_tripped", setting="default") is None, "without a breaker"
    assert b"fly_trt:audit_quality_bucket" in generate_latest(reported.registry)


def test_a_trip_and_a_reset_are_a_metric_a_warning_and_a_line_of_the_log(tmp_path, caplog):
    reported = Reported(tmp_path, breaker=BreakerConfig())
    with caplog.at_level(logging.INFO):
        while not reported.reports.breaker.is_tripped("fly_window_size=1"):
            reported.reports(result(quality=0.3, parted_at=0, setting="fly_window_size=1"))
        reported.reports(result(quality=0.3, parted_at=0, setting="fly_window_size=1"))
        labels = {"setting": "fly_window_size=1"}
        assert reported.value("breaker_tripped", **labels) == 1
        assert reported.value("breaker_quality_mean", **labels) == pytest.approx(0.3)
        assert (
            reported.value("breaker_quality_lower", **labels) < 0.3 < reported.value("breaker_quality_upper", **labels)
        )
        assert reported.value("breaker_tripped", setting="default") == 0
        assert reported.value("breaker_quality_mean", setting="default") is None
        reported.reports.breaker.reset()
    assert reported.value("breaker_tripped", **labels) == 0
    assert reported.value("breaker_audits", **labels) == 0
    assert reported.value("breaker_changes_total", change="tripped", **labels) == 1
    assert reported.value("breaker_changes_total", change="person", **labels) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [warning[:45] for warning in warnings] == [
        "breaker: setting 'fly_window_size=1' is exact",
        "breaker: setting 'fly_window_size=1' is loose",
    ]
    lines = reported.lines()
    assert [line["breaker"] is not None for line in lines] == [False] * (len(lines) - 2) + [True, False]
    assert lines[-2]["breaker"] in warnings[0]


def test_a_log_that_cannot_be_written_keeps_no_audit_from_being_judged(tmp_path):
    reported = Reported(tmp_path / "gone", breaker=BreakerConfig())
    for _ in range(30):
        reported.reports(result(quality=0.3, parted_at=0))
    reported.reports.close()
    assert reported.value("breaker_tripped", setting="default") == 1
    assert reported.value("audit_log_lines_total", outcome="lost") == 30
    assert reported.value("audits_total", outcome="parted") == 30
