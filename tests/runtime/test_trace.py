"""speculation_trace: how each output token came to be. It agrees with the tokens, with the metrics and with what the
target says by itself, under every policy and cut, and it changes no token."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.acceptance import AcceptanceSettings
from fly_trt.outputs import RequestOutput, TokenTrace
from fly_trt.params import RequestOutputKind, SamplingParams
from fly_trt.runtime.group import RequestGroup
from fly_trt.runtime.loop import GenerationLoop, LoopConfig
from fly_trt.runtime.loosening import StepCosts
from fly_trt.runtime.request import Request
from fly_trt.verification import (
    EXACT,
    POLICIES,
    PRESETS,
    AcceptancePolicy,
    GuardSettings,
    HeadInfo,
    UniformStream,
    make_guards,
    sampling,
)
from loop_stack import (
    DRAFTERS,
    NUM_DRAFT_TOKENS,
    PROMPT,
    SHORT_WINDOW,
    Stack,
    letters,
    make_drafter,
    make_request,
    make_stack,
)
from table_engine import (
    FULL_ENTROPY,
    VOCAB_SIZE,
    Logits,
    TableEngine,
    greedy,
    most_probable,
    sometimes_differs,
    sometimes_uncertain,
    spread_logits,
)

TOP_K = 3
HEAD = HeadInfo(VOCAB_SIZE, TOP_K, has_top_tokens=True)
RULES: dict[str, AcceptancePolicy] = {"short window": SHORT_WINDOW} | {
    f"fly {name}": policy for name, policy in PRESETS.items()
}
RULES |= {name: AcceptanceSettings(acceptance=name).policy(HEAD) for name in POLICIES if name != "fly"}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9},
    "truncated": {"temperature": 1.2, "top_k": 5, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.5, "logit_bias": {4: 1.0}},
}
ENDS: list[dict[str, Any]] = [{"ignore_eos": True}, {}, {"stop": ["GE"]}, {"stop_token_ids": [4]}, {"max_tokens": 7}]
lengths = st.lists(st.integers(0, NUM_DRAFT_TOKENS), max_size=5)
OWN = ("correction", "bonus", "plain")


def build(salt: int, drafter: str, cut: Sequence[int] = (), **settings: Any) -> Stack:
    logits = spread_logits(salt)
    language = most_probable(logits)
    draft = make_drafter(drafter, sometimes_differs(language, salt))
    return make_stack(language, draft, logits=logits, entropy=sometimes_uncertain(salt), draft_lengths=cut, **settings)


def serve(stack: Stack, *others: Request, **settings: Any) -> Request:
    request = make_request(**settings)
    stack.run(*others, request)
    assert request.error is None
    return request


def counts_of(request: Request) -> tuple[Any, ...]:
    metrics = request.metrics
    return (
        request.output_token_ids,
        request.finish_reason,
        request.stop_reason,
        metrics.acceptance_histogram,
        metrics.acceptance_by_draft_length,
        metrics.num_loosened_tokens,
        metrics.num_accepted_tokens_by_source,
        metrics.num_draft_tokens_by_source,
    )


def assert_agrees_with_metrics(trace: list[TokenTrace], tokens: list[int], request: Request) -> None:
    metrics = request.metrics
    assert len(trace) == len(tokens)
    by_kind = Counter(of_token.kind for of_token in trace)
    assert by_kind["loosened"] == metrics.num_loosened_tokens
    assert by_kind["matched"] + by_kind["loosened"] == metrics.num_accepted_tokens
    by_source = Counter(of_token.source for of_token in trace if of_token.source is not None)
    assert dict(by_source) == metrics.num_accepted_tokens_by_source
    for of_token, token in zip(trace, tokens, strict=True):
        assert (of_token.source is None) == (of_token.kind in OWN)
        assert (of_token.choice != token) == (of_token.kind == "loosened")


def assert_has_the_rounds(trace: list[TokenTrace], request: Request) -> None:
    """Each round has draft tokens and then the target's own, but perhaps the last one; rounds with a draft are those
    that the metrics have, in order."""
    metrics = request.metrics
    rounds = [list(of_round) for _, of_round in groupby(trace, key=lambda of_token: of_token.round)]
    assert [of_round[0].round for of_round in rounds] == list(range(len(rounds)))
    for of_round in rounds[:-1]:
        assert of_round[-1].kind in OWN
    for of_round in rounds:
        assert not any(of_token.kind in OWN for of_token in of_round[:-1])
        assert len(of_round) == 1 or of_round[-1].kind != "plain"
    drafted = [of_round for of_round in rounds if of_round[0].kind != "plain"]
    accepted = [sum(of_token.kind not in OWN for of_token in of_round) for of_round in drafted]
    assert accepted == metrics.per_step_accepted
    assert metrics.per_step_drafted is not None
    for of_round, num_accepted, num_drafted in zip(drafted, accepted, metrics.per_step_drafted, strict=True):
        if of_round[-1].kind == "bonus":
            assert num_accepted == num_drafted
        if of_round[-1].kind == "correction":
            assert num_accepted < num_drafted


def assert_agrees_with_rounds(request: Request) -> None:
    """What is kept of whole rounds, beside the tokens and the metrics."""
    metrics, rounds = request.metrics, request.rounds
    assert [round_.number for round_ in rounds] == list(range(request.trace[-1].round + 1))
    drafted = [round_ for round_ in rounds if round_.num_draft]
    assert {round_.asked for round_ in rounds} == {request.policy.name}
    assert [round_.num_draft for round_ in drafted] == metrics.per_step_drafted
    assert [round_.num_accepted for round_ in drafted] == metrics.per_step_accepted
    assert sum(round_.num_loosened for round_ in rounds) == metrics.num_loosened_tokens
    assert all(round_.num_steps >= 1 and round_.verification_seconds > 0 for round_ in rounds)
    assert all(round_.num_rows >= 1 and round_.draft_seconds >= 0 for round_ in rounds)
    for of_token in request.trace:
        assert (of_token.rejected is not None) == (of_token.kind == "correction")
        assert of_token.reason.startswith(f"{of_token.kind}:")
        if of_token.rejected is not None:
            assert of_token.rejected == rounds[of_token.round].rejected[0] != of_token.choice


def assert_agrees_with_the_target(trace: list[TokenTrace], request: Request, salt: int) -> None:
    """What the target says of each prefix, computed here without rounds."""
    logits, table_entropy = spread_logits(salt), sometimes_uncertain(salt)
    uses_full_entropy = request.policy.use_full_entropy
    params, tokens = request.params, [*PROMPT, *request.output_token_ids]
    uniforms = UniformStream(params.seed or 0, request.index)
    for at, of_token in enumerate(trace):
        prefix = tuple(tokens[: len(PROMPT) + at])
        if request.sampler is None:
            entropy = table_entropy(prefix) * (FULL_ENTROPY if uses_full_entropy else 1)
            choice = int(logits(prefix).argmax())
            shares = sampling.distribution(logits(prefix)[None])
        else:
            output = np.array(tokens[len(PROMPT) : len(prefix)], np.int64)
            scores = logits(prefix)[None]
            if request.sampler.processor.changes_scores:
                processor = make_request(**WAYS["penalised"]).sampler.processor  # type: ignore[union-attr]
                scores = processor.process(scores, output, np.empty(0, np.int64))
            shares = sampling.distribution(
                scores, temperature=params.temperature or 1.0, top_k=params.top_k, top_p=params.top_p
            )
            entropies = sampling.gate_entropy(shares, TOP_K)
            entropy = float(entropies[0 if uses_full_entropy else 1][0])
            sampled = sampling.sample(shares, uniforms.at(at, 1)) if params.temperature else sampling.greedy(scores)
            choice = int(sampled[0])
        assert of_token.choice == choice, (at, of_token)
        assert of_token.top is not None
        assert sorted(of_token.top, key=lambda top: -top[1]) == of_token.top
        for token, logprob in of_token.top:
            assert math.exp(logprob) == pytest.approx(shares[0, token], rel=1e-4)
        assert math.exp(of_token.top[0][1]) == pytest.approx(shares.max(), rel=1e-4)
        if of_token.entropy is None:
            assert of_token.kind == "correction", "a draft token that must not come"
            assert request.sampler is not None
        else:
            assert of_token.entropy == pytest.approx(entropy, rel=1e-5, abs=1e-6), (at, of_token)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_it_agrees_with_tokens_metrics_and_target_and_changes_nothing(rule: str, way: str) -> None:
    @examples(15)
    @given(
        salt=st.integers(0, 30),
        drafter=st.sampled_from(DRAFTERS),
        cut=lengths,
        end=st.sampled_from(ENDS),
        mates=st.integers(0, 2),
    )
    def check(salt: int, drafter: str, cut: list[int], end: dict[str, Any], mates: int) -> None:
        settings = {"policy": RULES[rule], "seed": salt} | WAYS[way] | end
        served = []
        for asked in ({}, {"speculation_trace": True, "detailed_metrics": True}):
            others = [make_request([5 + i, 3, 4], request_id=f"n{i}", max_tokens=20) for i in range(mates)]
            stack = build(salt, drafter, cut, num_slots=1 + mates)
            served.append(serve(stack, *others, **settings, **asked))
        plain, traced = served
        assert counts_of(traced) == counts_of(plain)
        assert plain.trace == []
        assert plain.metrics.per_step_accepted is plain.completion().trace is None
        trace = traced.completion().trace
        assert trace is not None
        assert_agrees_with_metrics(trace, traced.output_token_ids, traced)
        assert_has_the_rounds(trace, traced)
        assert_agrees_with_rounds(traced)
        assert plain.rounds == []
        assert_agrees_with_the_target(trace, traced, salt)

    check()


def test_it_says_the_same_however_rounds_are_cut_and_beside_whom() -> None:
    """Also while a request pauses its windows. Where an exact round is shorter, its tokens are the same and their kinds
    may not be."""

    @examples(20)
    @given(salt=st.integers(0, 30), cut=lengths, preset=st.sampled_from(sorted(PRESETS)))
    def check(salt: int, cut: list[int], preset: str) -> None:
        traces = []
        for lengths_, costs in (((), None), (cut, None), ((), StepCosts(0.2, 0.1)), (cut, StepCosts(0.2, 0.1))):
            stack = build(salt, "draft_model", lengths_, num_slots=2, step_costs=costs)
            mate = make_request([9, 8, 7], request_id="mate", policy=PRESETS["paper"] if lengths_ else EXACT)
            request = serve(stack, mate, policy=PRESETS[preset], ignore_eos=True, speculation_trace=True)
            assert_agrees_with_the_target(request.trace, request, salt)
            assert all(of_token.entropy is not None for of_token in request.trace)
            traces.append(request.trace)
        assert traces[0] == traces[1]
        assert [(t.choice, t.entropy) for t in traces[2]] == [(t.choice, t.entropy) for t in traces[3]]

    check()


def numbers_along(text: list[int], logits: Logits) -> Logits:
    """Logits that are numbers only along one text."""

    def spoilt(tokens: tuple[int, ...]) -> np.ndarray:
        is_on_course = list(tokens) == [*PROMPT, *text][: len(tokens)]
        return logits(tokens) if is_on_course else np.full(VOCAB_SIZE, np.nan, np.float32)

    return spoilt


@pytest.mark.parametrize("rule", ["fly reference", "typical"])
def test_a_draft_token_that_spoils_its_row_leaves_no_gap(rule: str) -> None:
    """Logits that are no numbers behind some draft tokens: such a round goes on carefully."""
    for salt in range(8):
        language = most_probable(spread_logits(salt))
        text = greedy(language, PROMPT, 60)
        draft = make_drafter("draft_model", sometimes_differs(language, salt))
        stack = make_stack(language, draft, logits=numbers_along(text, spread_logits(salt)))
        request = make_request(policy=RULES[rule], ignore_eos=True, speculation_trace=True, detailed_metrics=True)
        stack.run(request)
        assert request.error is None
        assert request.output_token_ids == text[:40]
        assert_agrees_with_metrics(request.trace, request.output_token_ids, request)
        assert_has_the_rounds(request.trace, request)
        assert all(of_token.entropy is not None and math.isfinite(of_token.entropy) for of_token in request.trace)


@pytest.mark.parametrize("is_traced", [True, False])
def test_deltas_put_together_are_the_whole_trace(is_traced: bool) -> None:
    def outputs(kind: RequestOutputKind) -> list[RequestOutput]:
        stack, seen = build(3, "multi_level", (2, 0, 5), num_slots=2), []
        requests = [
            make_request(index=i, temperature=0.8, policy=SHORT_WINDOW, speculation_trace=is_traced) for i in range(2)
        ]
        group = RequestGroup("0", None, PROMPT, kind, requests, seen.append)  # type: ignore[arg-type]
        stack.loop.add(requests)
        while stack.loop.has_requests():
            group.update(stack.loop.step())
        return [output for output in seen if isinstance(output, RequestOutput)]

    (whole,) = outputs(RequestOutputKind.FINAL_ONLY)
    for kind in (RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA):
        for index, want in enumerate(whole.outputs):
            parts = [c for output in outputs(kind) for c in output.outputs if c.index == index]
            if not is_traced:
                assert all(part.trace is None for part in [*parts, want])
                continue
            assert want.trace is not None
            for part in parts:
                assert part.trace is not None
                assert part.rounds is not None
                assert len(part.trace) == len(part.token_ids)
            last = [parts[-1]] if kind is RequestOutputKind.CUMULATIVE else parts
            assert [of_token for part in last for of_token in part.trace or ()] == want.trace
            rounds = [round_ for part in last for round_ in part.rounds or ()]
            assert [round_[:7] for round_ in rounds] == [round_[:7] for round_ in want.rounds or ()]


def test_a_request_that_does_not_ask_never_makes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> list[TokenTrace]:
        raise AssertionError("nobody asked")

    told = ("request.token_traces", "request.round_trace", "round_records.explain")
    for name in (*told, "rounds.RoundCosts.add_draft", "rounds.RoundCosts.add_step"):
        monkeypatch.setattr(f"fly_trt.runtime.{name}", never)
    monkeypatch.setattr("fly_trt.verification.sampling.gate_entropy", never)
    for way in ({}, {"temperature": 0.9}):
        stack = build(1, "multi_level")
        assert serve(stack, policy=EXACT, **way).output_token_ids
        assert stack.target.top_shapes == []
    assert SamplingParams().speculation_trace is False


def test_a_guard_is_named_where_it_turned_a_loosening_down() -> None:
    """Also where the rule's window would have failed. Without the guard, the first such place is loosened."""
    num_named = 0
    for salt in range(12):
        served = []
        for settings in (GuardSettings(), GuardSettings(exact_first=12)):
            request = make_request(policy=SHORT_WINDOW, ignore_eos=True, speculation_trace=True)
            request.guards = make_guards(settings, str)
            stack = build(salt, "draft_model")
            stack.run(request)
            served.append(request)
        loose, guarded = served
        assert all(of_token.guard is None for of_token in loose.trace)
        named = [at for at, of_token in enumerate(guarded.trace) if of_token.guard is not None]
        first = next((at for at, of_token in enumerate(loose.trace) if of_token.kind == "loosened"), 99)
        assert first >= 12 or first in named
        assert not any(of_token.kind == "loosened" for of_token in guarded.trace[:12])
        for at in named:
            assert at < 12
            assert guarded.trace[at].kind == "correction"
            assert guarded.trace[at].guard == "exact_first"
            assert "exact_first wants it exact" in guarded.trace[at].reason
        num_named += len(named)
    assert num_named


def test_an_engine_that_does_not_name_tokens_leaves_them_out() -> None:
    language = most_probable(spread_logits(1))
    engine = TableEngine(language, logits=spread_logits(1), has_top_tokens=False)
    config = LoopConfig(1, 240, NUM_DRAFT_TOKENS, max_num_tokens=64, max_queue_size=10)
    loop = GenerationLoop(engine, make_drafter("draft_model", language), config, letters())
    request = make_request(policy=SHORT_WINDOW, speculation_trace=True)
    loop.add([request])
    while loop.has_requests():
        loop.step()
    assert {of_token.top for of_token in request.trace} == {None}
    assert all(of_token.reason for of_token in request.trace)


def test_a_share_of_a_batch_is_said_as_one() -> None:
    stack = build(2, "draft_model", num_slots=3)
    requests = [make_request(request_id=str(i), ignore_eos=True, speculation_trace=True) for i in range(3)]
    stack.run(*requests)
    assert {round_.num_rows for request in requests for round_ in request.rounds} >= {3}
    alone = serve(build(2, "draft_model"), ignore_eos=True, speculation_trace=True)
    assert {round_.num_rows for round_ in alone.rounds} == {1}
