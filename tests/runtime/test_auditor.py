"""Audits over a loop: what they find, what they leave alone, and what ends them."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fly_trt.errors import ConfigError, EngineDeadError
from fly_trt.runtime.audit import AuditConfig, AuditResult
from fly_trt.runtime.auditor import MAX_FAILURES, MAX_LOANS, WINDOW_SECONDS, Auditor
from fly_trt.runtime.request import Request
from fly_trt.verification import EXACT
from loop_stack import SHORT_WINDOW, Stack, make_drafter, make_request, make_stack, random_prompt
from table_engine import (
    CERTAIN_LOGIT,
    VOCAB_SIZE,
    Logits,
    TableEngine,
    hashed,
    most_probable,
    sometimes_differs,
    sometimes_uncertain,
    spread_logits,
)

LOOSE = SHORT_WINDOW
TIMES = ("time_to_first_token", "latency")
FAILURE = RuntimeError("out of\n  memory")


class Audited:
    """A stack whose target and draft often agree, with audits of all that ends, and what they found."""

    def __init__(
        self,
        salt: int = 0,
        *,
        config: AuditConfig | None = None,
        has_audits: bool = True,
        num_slots: int = 2,
        **more: Any,
    ) -> None:
        self.logits: Logits = spread_logits(salt)
        target = most_probable(self.logits)
        draft = sometimes_differs(target, salt, 3)
        settings = {"has_spare_slot": True, "logits": self.logits, "entropy": sometimes_uncertain(salt)} | more
        self.stack: Stack = make_stack(
            target, make_drafter("draft_model", draft, num_slots), num_slots=num_slots, **settings
        )
        self.results: list[AuditResult] = []
        self.auditor: Auditor | None = None
        if has_audits:
            config = config or AuditConfig(fraction=1.0, exact_fraction=1.0)
            self.auditor = self.stack.loop.audit(config, self.results.append)

    @property
    def engine(self) -> TableEngine:
        return self.stack.target

    @property
    def left_out(self) -> dict[str, int]:
        assert self.auditor is not None
        return dict(self.auditor.counts.left_out)

    def audit(self) -> list[AuditResult]:
        """Takes all that waits to its end."""
        assert self.auditor is not None
        while self.auditor.has_work:
            self.auditor.step()
            self.stack.check()
        return self.results

    def exact_text(self, request: Request) -> list[int]:
        """What the same request emits under the exact policy, alone."""
        settings = {f.name: getattr(request.params, f.name) for f in fields(request.params) if f.init}
        other = make_request(list(request.prompt_token_ids), policy=EXACT, **settings)
        make_stack(most_probable(self.logits), None, logits=self.logits).run(other)
        return other.output_token_ids


def log_likelihoods(logits: Logits, prompt: list[int], output: list[int]) -> tuple[float, float]:
    """By the definition: of the output, and of the most probable token at each of its positions."""
    total = best = 0.0
    for at, token in enumerate(output):
        scores = logits(tuple(prompt + output[:at])).astype(np.float64)
        log_sum = scores.max() + math.log(np.exp(scores - scores.max()).sum())
        total += scores[token] - log_sum
        best += scores.max() - log_sum
    return total, best


def loose_requests(count: int, **settings: Any) -> list[Request]:
    return [
        make_request(random_prompt(seed, 5 + 9 * seed), policy=LOOSE, request_id=str(seed), max_tokens=60, **settings)
        for seed in range(count)
    ]


@pytest.mark.parametrize("salt", range(3))
@pytest.mark.parametrize("max_num_tokens", [2, 7, 64])
def test_the_likelihood_is_the_targets_by_definition(salt: int, max_num_tokens: int) -> None:
    audited = Audited(salt, max_num_tokens=max_num_tokens)
    requests = loose_requests(6)
    audited.stack.run(*requests)
    by_id = {result.request_id: result for result in audited.audit()}
    assert sum(result.num_loosened for result in by_id.values()) > 0
    for request in requests:
        result, output = by_id[request.request_id], request.output_token_ids
        expected = log_likelihoods(audited.logits, request.prompt_token_ids, output)
        assert (result.log_likelihood, result.best_log_likelihood) == pytest.approx(expected, rel=1e-4)
        assert result.quality == pytest.approx(math.exp((expected[0] - expected[1]) / len(output)), rel=1e-4)
        assert result.num_differing == result.num_loosened == request.metrics.num_loosened_tokens
        assert (result.acceptance, result.num_tokens) == ("fly", len(output))
        assert result.num_prompt_tokens == len(request.prompt_token_ids)
        assert result.token_ids.tolist() == output
        assert result.prompt_token_ids.tolist() == request.prompt_token_ids
        assert result.seconds > 0


@pytest.mark.parametrize("salt", range(4))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stop": ["HD", "EJ", "IC"]},
        {"stop_token_ids": [5]},
        {"ignore_eos": True},
        {"stop": "F", "stop_token_ids": [6]},
    ],
    ids=["plain", "stop strings", "stop tokens", "no end", "both"],
)
def test_the_exact_text_is_what_an_exact_request_emits(salt: int, settings: dict[str, Any]) -> None:
    audited = Audited(salt)
    requests = loose_requests(6, **settings)
    audited.stack.run(*requests)
    by_id = {result.request_id: result for result in audited.audit()}
    for request in requests:
        comparison, exact, output = (
            by_id[request.request_id].exact,
            audited.exact_text(request),
            request.output_token_ids,
        )
        assert comparison is not None
        assert comparison.token_ids.tolist() == exact
        assert comparison.num_tokens == len(exact)
        assert comparison.is_same == (exact == output)
        different = [at for at, pair in enumerate(zip(exact, output, strict=False)) if pair[0] != pair[1]]
        assert comparison.parted_at == (different[0] if different else None)
        assert by_id[request.request_id].parted_at == comparison.parted_at


def test_copies_of_the_output_make_the_exact_text_cheaper() -> None:
    """Where it comes back to the output's way."""
    language = lambda tokens: 2 + len(tokens) % 23  # noqa: E731
    draft = lambda tokens: 28 if len(tokens) == 12 else language(tokens)  # noqa: E731
    stack = make_stack(
        language, make_drafter("draft_model", draft), entropy=lambda tokens: 1.0, has_spare_slot=True, max_seq_len=240
    )
    results: list[AuditResult] = []
    auditor = stack.loop.audit(AuditConfig(fraction=1.0, exact_fraction=1.0), results.append)
    stack.run(make_request(random_prompt(0, 10), policy=LOOSE, max_tokens=100))
    before = stack.target.num_runs
    while auditor.has_work:
        auditor.step()
    (result,) = results
    assert (result.num_differing, result.parted_at) == (1, 2)
    assert result.exact is not None
    assert result.exact.num_tokens == 100
    assert stack.target.num_runs - before < 30


def test_the_prompt_is_read_from_the_cache_of_the_request() -> None:
    audited = Audited(max_num_tokens=16)
    request = make_request(random_prompt(0, 150), policy=LOOSE, max_tokens=20)
    audited.stack.run(request)
    positions = audited.stack.positions_of(lambda: audited.audit())
    assert audited.engine.copies == [(0, 2, 150)]
    assert sum(positions) < 100


def outcomes(requests: list[Request], but: tuple[str, ...] = ()) -> list[object]:
    """All that a caller sees but for times, and some metrics."""
    return [
        (
            request.output_token_ids,
            request.finish_reason,
            request.stop_reason,
            request.detokenizer.text,
            {f.name: getattr(request.metrics, f.name) for f in fields(request.metrics) if f.name not in (*TIMES, *but)},
        )
        for request in requests
    ]


History = tuple[int, bool, bool, list[tuple[str, int]]]


@st.composite
def histories(draw: st.DrawFn) -> History:
    """A number of slots, whether there is a spare one, whether the engine shrinks, and what happens: requests come or
    are aborted, and the loop and the audits have steps."""
    actions = st.tuples(st.sampled_from(["add", "add", "abort", "step", "step", "audit"]), st.integers(0, 7))
    return (
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.lists(actions, min_size=10, max_size=30)),
    )


def play(history: History, *, has_audits: bool) -> tuple[list[object], Audited]:
    num_slots, has_spare_slot, shrinks, actions = history
    # Without a slot of its own an audit takes none that keeps something.
    audited = Audited(
        3, has_audits=has_audits, num_slots=num_slots, has_spare_slot=has_spare_slot, prefix_caching=has_spare_slot,
        max_num_tokens=24, trim_block=16 if shrinks else None,
    )  # fmt: skip
    requests: list[Request] = []
    for action, number in actions:
        if action == "add":
            prompt = [*random_prompt(number % 3, 30), *random_prompt(number, 1 + number)]
            policy = EXACT if number == 7 else LOOSE
            requests.append(
                make_request(prompt, policy=policy, request_id=str(len(requests)), max_tokens=5 + 5 * number)
            )
            audited.stack.loop.add(requests[-1:])
        elif action == "abort" and requests:
            audited.stack.loop.abort(requests[number % len(requests)])
        elif action == "step":
            audited.stack.step(1 + number)
        for _ in range(number if action == "audit" else 0):
            if audited.auditor is not None and audited.auditor.has_work:
                audited.auditor.step(is_beside=bool(number % 2))
                audited.stack.check()
    audited.stack.run()
    # An engine that an audit keeps from shrinking may keep more of a prefix.
    return outcomes(requests, but=("num_cached_tokens",) if shrinks else ()), audited


@given(histories())
def test_requests_do_not_notice_audits(history: History) -> None:
    without, _ = play(history, has_audits=False)
    with_audits, audited = play(history, has_audits=True)
    assert with_audits == without
    for result in audited.audit():
        prompt, output = result.prompt_token_ids.tolist(), result.token_ids.tolist()
        expected = log_likelihoods(audited.logits, prompt, output)
        assert (result.log_likelihood, result.best_log_likelihood) == pytest.approx(expected, rel=1e-4)
    assert audited.auditor is not None
    counts = audited.auditor.counts
    assert counts.num_drawn == counts.num_finished == counts.num_audited + sum(counts.left_out.values())


def test_beside_requests_no_audit_makes_the_caches_longer_than_these_need() -> None:
    audited = Audited(num_slots=1, max_num_tokens=64, trim_block=16)
    auditor, engine = audited.auditor, audited.engine
    assert auditor is not None
    for number, length in enumerate([20, 180, 30]):  # each has the slot of the one before
        audited.stack.run(make_request(random_prompt(number, length), policy=LOOSE, request_id=str(number)))
    running = make_request(random_prompt(7, 20), policy=LOOSE, request_id="3", max_tokens=90, ignore_eos=True)
    audited.stack.loop.add([running])
    while len(audited.results) < 2:
        audited.stack.step()
        assert not running.is_finished
        for _ in range(10):
            auditor.step(is_beside=True)
            audited.stack.check()
            assert len(engine.slots[1]) < 150
    assert [result.request_id for result in audited.results] == ["2", "0"]
    num_runs = engine.num_runs
    auditor.step(is_beside=True)
    assert (engine.num_runs, auditor.counts.num_waiting) == (num_runs, 1)
    audited.stack.run()
    assert [result.request_id for result in audited.audit()][2:] == ["3", "1"]


def test_a_long_audit_makes_way_for_requests_and_goes_on_when_nothing_runs() -> None:
    audited = Audited(num_slots=1, max_num_tokens=64, trim_block=16)
    auditor, engine = audited.auditor, audited.engine
    assert auditor is not None
    audited.stack.run(make_request(random_prompt(1, 180), policy=LOOSE, request_id="long"))
    audited.stack.run(make_request(random_prompt(2, 10), policy=LOOSE, request_id="short", max_tokens=5))
    while len(engine.slots[1]) < 120:
        auditor.step()
    num_trims = len(engine.trims)
    auditor.make_way()
    assert max(len(slot) for slot in engine.slots) <= 32
    auditor.make_way()
    assert len(engine.trims) == num_trims + 1, "there was nothing to give back"
    outputs = {result.request_id: result for result in audited.audit()}
    for result in outputs.values():
        expected = log_likelihoods(audited.logits, result.prompt_token_ids.tolist(), result.token_ids.tolist())
        assert (result.log_likelihood, result.best_log_likelihood) == pytest.approx(expected, rel=1e-4)
    assert sorted(outputs) == ["long", "short"]


def test_a_request_gets_the_slot_at_once_and_the_audit_goes_on_later() -> None:
    audited = Audited(num_slots=1, has_spare_slot=False, prefix_caching=False, max_num_tokens=8)
    assert audited.auditor is not None
    first, second = loose_requests(2)
    audited.stack.run(first)
    audited.auditor.step()
    audited.auditor.step()
    audited.stack.loop.add([second])
    audited.stack.step()
    assert second.slot == 0
    assert not audited.auditor.has_work
    audited.stack.run()
    assert [result.request_id for result in audited.audit()] == ["0", "1"]
    assert audited.results[0].token_ids.tolist() == first.output_token_ids


def test_an_audit_that_loses_its_slot_again_and_again_is_dropped() -> None:
    audited = Audited(num_slots=1, has_spare_slot=False, prefix_caching=False, max_num_tokens=8)
    assert audited.auditor is not None
    audited.stack.run(make_request(random_prompt(1, 60), policy=LOOSE))
    for number in range(MAX_LOANS + 1):
        audited.auditor.step()
        audited.stack.run(make_request([3 + number], max_tokens=1))
    assert audited.left_out == {"dropped": 1, "exact": MAX_LOANS + 1}
    assert not audited.auditor.has_work


def test_no_slot_that_keeps_something_is_taken() -> None:
    audited = Audited(num_slots=2, has_spare_slot=False)
    assert audited.auditor is not None
    audited.stack.run(*loose_requests(2))
    assert not audited.auditor.has_work


@pytest.mark.parametrize("num_audit_steps", range(4))
def test_a_step_that_fails_ends_the_audit_and_no_request(num_audit_steps: int) -> None:
    sizes: dict[str, Any] = {"num_slots": 3, "max_num_tokens": 16, "draft_lengths": [1]}  # rounds in many steps
    audited = Audited(4, **sizes)
    auditor = audited.auditor
    assert auditor is not None
    alone = loose_requests(4)
    Audited(4, has_audits=False, **sizes).stack.run(*alone)
    audited.stack.run(make_request(random_prompt(9, 40), policy=LOOSE, request_id="audited"))
    requests = loose_requests(4)
    audited.stack.loop.add(requests)
    audited.stack.step(3 + num_audit_steps)
    for _ in range(num_audit_steps):
        auditor.step()
    assert any(request.round is not None for request in requests)
    run = audited.engine.run

    def fail_once(step: object) -> None:
        audited.engine.run = run  # type: ignore[method-assign]
        audited.engine.slots = [[0] * len(slot) for slot in audited.engine.slots]
        raise FAILURE

    audited.engine.run = fail_once  # type: ignore[method-assign]
    auditor.step(is_beside=True)
    assert audited.left_out == {"faulty": 1}
    audited.stack.run()
    assert [request.error for request in requests] == [None] * 4
    assert [request.output_token_ids for request in requests] == [request.output_token_ids for request in alone]
    assert len(audited.audit()) == 4


def test_steps_that_always_fail_end_all_audits() -> None:
    audited = Audited()
    audited.stack.run(*loose_requests(MAX_FAILURES + 2))
    run = audited.engine.run
    audited.engine.run = broken  # type: ignore[method-assign]
    assert audited.audit() == []
    audited.engine.run = run  # type: ignore[method-assign]
    audited.stack.run(*loose_requests(1))
    assert audited.audit() == []
    assert audited.left_out == {"faulty": MAX_FAILURES, "dropped": 2}


def broken(step: object) -> None:
    raise FAILURE


def test_an_engine_that_is_dead_says_so() -> None:
    audited = Audited()
    assert audited.auditor is not None
    audited.stack.run(*loose_requests(1))

    def die(step: object) -> None:
        raise EngineDeadError("rank 1 was killed")

    audited.engine.run = die  # type: ignore[method-assign]
    with pytest.raises(EngineDeadError, match="rank 1"):
        audited.auditor.step()


def test_numbers_that_are_none_are_a_fault_of_the_audit() -> None:
    spoilt = False

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        bad = spoilt and len(tokens) == 30
        return np.full(VOCAB_SIZE, np.nan, np.float32) if bad else spread_logits(0)(tokens)

    audited = Audited(logits=logits)
    first, second = loose_requests(2)
    audited.stack.run(first)
    spoilt = True
    assert audited.audit() == []
    assert audited.left_out == {"faulty": 1}
    spoilt = False
    audited.stack.run(second)
    assert [result.request_id for result in audited.audit()] == ["1"]  # in a slot that was cleared


def test_a_token_that_cannot_come_counts_as_little_as_a_number_can() -> None:
    language = hashed(VOCAB_SIZE, 3)

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        scores = np.full(VOCAB_SIZE, -np.inf, np.float32)
        scores[language(tokens)] = CERTAIN_LOGIT
        return scores

    audited = Audited(logits=logits)
    drafter = make_drafter("draft_model", sometimes_differs(language, 0))
    stack = make_stack(language, drafter, logits=logits, entropy=lambda tokens: 1.0, has_spare_slot=True)
    auditor = stack.loop.audit(AuditConfig(fraction=1.0), audited.results.append)
    stack.run(*loose_requests(2))
    while auditor.has_work:
        auditor.step()
    for result in audited.results:
        assert result.log_likelihood == -100.0 * result.num_differing < 0
        assert 0 < result.quality < 1


def test_what_is_left_out_is_counted_by_reason() -> None:
    audited = Audited(config=AuditConfig(fraction=1.0, max_tokens=50))
    aborted = make_request(policy=LOOSE, request_id="aborted")
    unreadable = make_request(policy=LOOSE, bad_word_ids=[[token] for token in range(VOCAB_SIZE)])
    audited.stack.run(
        make_request(),
        make_request(policy=LOOSE, temperature=1.0),
        make_request(policy=LOOSE, structured_outputs={"choice": ["AB", "CD"]}),
        make_request(policy=LOOSE, logit_bias={3: 1.0}),
        make_request(policy=LOOSE, min_tokens=3),
        make_request(policy=LOOSE, max_tokens=60, ignore_eos=True),
        unreadable,
    )
    audited.stack.loop.add([aborted])
    audited.stack.step()
    audited.stack.loop.abort(aborted)
    assert unreadable.error is not None
    assert audited.left_out == {
        "exact": 1, "sampled": 1, "structured": 1, "changed_scores": 2, "too_long": 1, "failed": 1, "aborted": 1
    }  # fmt: skip
    assert audited.audit() == []


def test_of_a_full_queue_one_at_random_is_dropped() -> None:
    config = AuditConfig(fraction=1.0, max_queue_size=20)
    audited = Audited(config=config)
    assert audited.auditor is not None
    audited.stack.run(*(make_request([3, 4], policy=LOOSE, request_id=str(i), max_tokens=1) for i in range(200)))
    assert audited.auditor.counts.num_waiting == 20
    left = sorted(int(result.request_id) for result in audited.audit())
    assert len(left) == 20
    assert left[0] < 190
    assert audited.left_out == {"dropped": 180}


def test_what_waits_has_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fly_trt.runtime.auditor.MAX_QUEUED_TOKENS", 100)
    audited = Audited()
    audited.stack.run(*loose_requests(6))
    assert sum(result.num_prompt_tokens + result.num_tokens for result in audited.audit()) <= 100


def test_a_sample_is_as_large_as_asked_for_and_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[int]:
        config = AuditConfig(fraction=0.1, exact_fraction=0.5, seed=seed)
        return [number for number in range(10_000) if config.draws(number)]

    assert 900 < len(drawn(0)) < 1100
    assert drawn(0) == drawn(0) != drawn(1)
    exact = [number for number in drawn(0) if AuditConfig(exact_fraction=0.5).draws_exact(number)]
    assert 0.4 < len(exact) / len(drawn(0)) < 0.6
    assert not any(AuditConfig().draws(number) for number in range(100))


def test_beside_requests_an_audit_has_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("fly_trt.runtime.auditor.time.perf_counter", lambda: now)
    audited = Audited(config=AuditConfig(fraction=1.0, share=0.2), max_num_tokens=2)
    auditor, run = audited.auditor, audited.engine.run
    assert auditor is not None

    def take_time(step: Any) -> None:
        nonlocal now
        now += 3.0
        run(step)

    audited.stack.run(*loose_requests(6))
    audited.engine.run = take_time  # type: ignore[method-assign]
    assert not auditor.has_share
    served = 0.0
    for _ in range(1000):
        auditor.earn(1.0)
        served += 1.0
        if auditor.has_share and auditor.has_work:
            auditor.step(is_beside=True)
    spent = auditor.counts.seconds_beside
    assert spent == pytest.approx(0.2 * (served + spent), abs=3.0)
    for _ in range(1000):
        auditor.earn(1.0)
    assert auditor._credit == pytest.approx(0.2 * WINDOW_SECONDS)


def test_without_a_share_audits_run_only_when_nothing_else_does() -> None:
    audited = Audited(config=AuditConfig(fraction=1.0, share=0.0))
    assert audited.auditor is not None
    audited.auditor.earn(1000.0)
    assert not audited.auditor.has_share


def test_whoever_takes_results_ends_nothing_by_failing() -> None:
    stack = make_stack(hashed(VOCAB_SIZE, 1), has_spare_slot=True)

    def refuse(result: AuditResult) -> None:
        raise FAILURE

    auditor = stack.loop.audit(AuditConfig(fraction=1.0), refuse)
    stack.run(*loose_requests(3))
    while auditor.has_work:
        auditor.step()
    assert auditor.counts.num_audited == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 1.5}, r"audit_fraction 1\.5: expected a number from 0 to 1"),
        ({"exact_fraction": -1}, r"audit_exact_fraction -1: expected a number from 0 to 1"),
        ({"share": 0.9}, r"audit_share 0\.9: expected a number from 0 to 0\.5"),
        ({"share": "much"}, "audit_share 'much': expected"),
        ({"seed": -1}, "audit_seed -1: expected"),
        ({"max_queue_size": 0}, "audit_max_queue_size 0: expected"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AuditConfig(**settings)
