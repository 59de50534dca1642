"""Requests of a tripped setting are exact from their next round on, and nobody else's."""

import math
from functools import cache

import pytest

from fly_trt.runtime.audit import AuditConfig, AuditResult
from fly_trt.runtime.audit_reports import AuditReports
from fly_trt.runtime.breaker import DEFAULT_SETTING, Breaker, BreakerConfig
from fly_trt.runtime.loosening import StepCosts
from fly_trt.verification import EXACT, FlyPolicy, GuardSettings, HeadInfo, make_guards
from fly_trt.verification.margin import MarginPolicy
from loop_stack import PROMPT, SHORT_WINDOW, make_drafter, make_request, make_stack, random_prompt
from table_engine import VOCAB_SIZE, most_probable, sometimes_differs, sometimes_uncertain, spread_logits

MARGIN = MarginPolicy.make({"margin_threshold": 5.0}, HeadInfo(VOCAB_SIZE, 4, True))
FULL = FlyPolicy(entropy_threshold=0.1, use_full_entropy=True, window=2, lookahead=2)
LOGITS = spread_logits(1)
TARGET = most_probable(LOGITS)
DRAFT = sometimes_differs(TARGET, 1, 3)


def stack_with_breaker(num_slots=1, **settings):
    stack = make_stack(
        TARGET,
        make_drafter("draft_model", DRAFT, num_slots),
        num_slots=num_slots,
        entropy=sometimes_uncertain(1),
        logits=LOGITS,
        **settings,
    )
    stack.loop.speculation.breaker = breaker = Breaker(BreakerConfig())
    return stack, breaker


def trip(breaker, setting=DEFAULT_SETTING):
    while not breaker.is_tripped(setting):
        breaker.record(setting, 0.1)


def loose(policy=SHORT_WINDOW, setting=DEFAULT_SETTING, prompt=PROMPT, **settings):
    request = make_request(prompt, policy=policy, **({"max_tokens": 40, "ignore_eos": True} | settings))
    request.setting = setting
    return request


@cache
def tokens_of(policy, **settings):
    """What the request emits without a breaker."""
    stack, _ = stack_with_breaker()
    request = loose(policy, setting=None, **settings)
    stack.run(request)
    return request.output_token_ids


@pytest.mark.parametrize("policy", [SHORT_WINDOW, FULL, MARGIN], ids=["fly", "full_entropy", "margin"])
@pytest.mark.parametrize("step_costs", [None, StepCosts(0.01, 0.01)], ids=["published", "adaptive"])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.8, "seed": 3, "max_tokens": 12}, {"speculation_trace": True}], ids=str
)
def test_a_request_of_a_tripped_setting_is_plain_decoding_and_says_so(policy, step_costs, settings):
    stack, breaker = stack_with_breaker(step_costs=step_costs)
    trip(breaker)
    request = loose(policy, **settings)
    stack.run(request)
    assert request.output_token_ids == tokens_of(EXACT, **settings)
    assert request.metrics.num_loosened_tokens == 0
    assert request.metrics.num_accepted_tokens > 0, "it is still speculative"
    assert request.metrics.exact_because == "breaker"
    assert stack.counted("requests_made_exact_total") == 1
    assert all(trace.kind != "loosened" for trace in request.trace)
    if policy is SHORT_WINDOW and not settings:
        assert request.output_token_ids != tokens_of(policy), "it would have been another text"


def test_a_request_that_runs_is_exact_from_its_next_round_on():
    stack, breaker = stack_with_breaker()
    request = loose()
    stack.loop.add([request])
    while not request.metrics.num_loosened_tokens:
        stack.step()
    kept = list(request.output_token_ids)
    num_loosened = request.metrics.num_loosened_tokens
    trip(breaker)
    stack.run()
    assert request.metrics.num_loosened_tokens == num_loosened
    assert request.metrics.exact_because == "breaker"
    assert request.output_token_ids[: len(kept)] == kept
    rest = loose(EXACT, prompt=PROMPT + kept, max_tokens=40 - len(kept))
    stack.run(rest)
    assert request.output_token_ids[len(kept) :] == rest.output_token_ids


def test_after_a_reset_requests_are_loose_again_those_that_run_too():
    stack, breaker = stack_with_breaker()
    trip(breaker)
    running = loose(max_tokens=150)
    stack.loop.add([running])
    stack.step(4)
    assert running.metrics.num_loosened_tokens == 0
    breaker.reset()
    stack.run()
    assert running.metrics.num_loosened_tokens > 0
    assert running.metrics.exact_because == "breaker", "a part of it was"
    later = loose()
    stack.run(later)
    assert later.output_token_ids == tokens_of(SHORT_WINDOW)
    assert later.metrics.exact_because is None


def test_requests_of_other_settings_and_those_that_nobody_judges_are_as_they_were():
    stack, breaker = stack_with_breaker(num_slots=4)
    trip(breaker, "fly_window_size=1")
    requests = [loose(), loose(setting="fly_window_size=3"), loose(setting=None), loose(setting="fly_window_size=1")]
    stack.run(*requests)
    for request in requests[:3]:
        assert request.output_token_ids == tokens_of(SHORT_WINDOW)
        assert request.metrics.exact_because is None
    assert requests[3].output_token_ids == tokens_of(EXACT)


def test_an_exact_request_has_nothing_to_say_of_a_breaker():
    stack, breaker = stack_with_breaker()
    trip(breaker)
    request = loose(EXACT)
    stack.run(request)
    assert request.metrics.exact_because is None
    assert stack.counted("requests_made_exact_total") == 0


def test_guards_hold_for_what_is_loose_after_a_reset():
    """Their count of the output goes on through exact rounds."""
    stack, breaker = stack_with_breaker()
    trip(breaker)
    request = loose(max_tokens=150)
    request.guards = make_guards(GuardSettings(max_loosened_per_100=2), str)
    stack.loop.add([request])
    stack.step(4)
    breaker.reset()
    stack.run()
    assert 0 < request.metrics.num_loosened_tokens <= 2 * math.ceil(150 / 100)


def test_audits_of_a_bad_setting_make_its_own_requests_exact():
    """The way round: requests, audits, breaker, requests."""
    stack, _ = stack_with_breaker(num_slots=2, has_spare_slot=True)
    reports = AuditReports(BreakerConfig(min_quality=0.9), None, stack.metrics.registry, str)
    found: list[AuditResult] = []

    def take(result):
        found.append(result)
        reports(result)

    auditor = stack.loop.audit(AuditConfig(fraction=1.0), take)
    reports.show_counts(auditor.counts)
    stack.loop.speculation.breaker = reports.breaker
    for number in range(100):
        settings = {"prompt": random_prompt(number, 6), "max_tokens": 12}
        request, good = loose(request_id=str(number), **settings), loose(EXACT, request_id=f"e{number}", **settings)
        stack.run(request, good)
        assert good.metrics.exact_because is None
        if request.metrics.exact_because is not None:
            assert request.output_token_ids == good.output_token_ids
            break
        while auditor.has_work:
            auditor.step()
    assert number < 100
    assert sum(result.quality for result in found) / len(found) < 0.9
    assert stack.counted('breaker_tripped{setting="default"}') == 1
    assert stack.counted('audits_left_out_total{reason="exact"}') == number + 2, "what was exact says nothing of loose"
