"""The loss budget in the loop: it holds for the tokens that are emitted, counted one by one, under every policy, way to
draft, sampling, grammar and cut; and what the metrics say of loosening is what a recount says."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.acceptance import AcceptanceSettings
from fly_trt.outputs import RequestMetrics, TokenTrace
from fly_trt.runtime.request import Request
from fly_trt.verification import (
    EXACT,
    PRESETS,
    AcceptancePolicy,
    DraftSource,
    Evidence,
    Guards,
    GuardSettings,
    HeadInfo,
    Positions,
    Verdict,
)
from loop_stack import DRAFTERS, NUM_DRAFT_TOKENS, PROMPT, SHORT_WINDOW, Stack, make_drafter, make_request, make_stack
from table_engine import (
    FULL_ENTROPY,
    STOP_TOKEN,
    VOCAB_SIZE,
    NextToken,
    greedy,
    most_probable,
    sometimes_uncertain,
    spread_logits,
)
from toy_policy import LikelyPolicy

TOP_K = 3
NUM_TOKENS = 130  # more than a budget looks back
HEAD = HeadInfo(VOCAB_SIZE, TOP_K, has_top_tokens=True)
RULES: dict[str, AcceptancePolicy] = {"short window": SHORT_WINDOW, "own": LikelyPolicy()} | {
    f"fly {name}": policy for name, policy in PRESETS.items()
}
SETTINGS: dict[str, dict[str, Any]] = {
    "margin": {"margin_threshold": 1.5},
    "conditional": {"conditional_apply_to": "all"},
    "adaptive": {"adaptive_max_distance": 1.0},
}
RULES |= {
    name: AcceptanceSettings(acceptance=name, **SETTINGS.get(name, {})).policy(HEAD)
    for name in ("relaxed", "margin", "typical", "conditional", "adaptive", "cactus")
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9},
    "two completions": {"temperature": 1.1, "n": 2},
    "grammar": {"structured_outputs": {"regex": "([C-J]{1,4}X?)*"}},
}
budgets = st.builds(
    GuardSettings,
    exact_first=st.sampled_from([0, 0, 1, 9, 50]),
    exact_token_ids=st.sampled_from([frozenset(), frozenset({5}), frozenset({4, 6})]),
    max_loosened_per_100=st.none() | st.integers(0, 6),
)
cuts = st.lists(st.integers(0, NUM_DRAFT_TOKENS), max_size=4)


def build(salt: int, drafter: str, cut: Sequence[int] = (), **settings: Any) -> Stack:
    logits = spread_logits(salt)
    draft = make_drafter(drafter, draft_of(salt))
    entropy = sometimes_uncertain(salt)
    return make_stack(most_probable(logits), draft, logits=logits, entropy=entropy, draft_lengths=cut, **settings)


def draft_of(salt: int) -> NextToken:
    """The target's choice, but at one prefix in eight the token that comes second."""
    logits = spread_logits(salt)

    def draft(tokens: tuple[int, ...]) -> int:
        first, second = np.argsort(-logits(tokens), kind="stable")[:2].tolist()
        return first if hash((salt, tokens)) % 8 else second

    return draft


def guarded(guards: GuardSettings, **settings: Any) -> Request:
    request = make_request(max_tokens=NUM_TOKENS, speculation_trace=True, **settings)
    request.guards = None if guards.is_empty else Guards(guards, str)
    return request


def assert_holds(guards: GuardSettings, tokens: Sequence[int], is_loosened: Sequence[bool], choices: list[int]) -> None:
    """Counted token by token, on what was emitted."""
    if guards.max_loosened_per_100 is not None:
        for end in range(len(tokens) + 1):
            assert sum(is_loosened[max(0, end - 100) : end]) <= guards.max_loosened_per_100
    assert not any(is_loosened[: guards.exact_first])
    for token, choice, loosened in zip(tokens, choices, is_loosened, strict=True):
        assert not (loosened and guards.exact_token_ids & {token, choice})


def saved_tokens(trace: list[TokenTrace]) -> int:
    """Of each round those draft tokens that come with and after the first loosened one."""
    saved = 0
    for _, of_round in groupby(trace, key=lambda of_token: of_token.round):
        kinds = [of_token.kind for of_token in of_round if of_token.source is not None]
        saved += len(kinds) - kinds.index("loosened") if "loosened" in kinds else 0
    return saved


@pytest.mark.parametrize(("rule", "number"), [("fly reference", 3), *((rule, at % 4) for at, rule in enumerate(RULES))])
def test_the_budget_is_exact_on_what_is_emitted(rule: str, number: int) -> None:
    way, drafter = list(WAYS)[number], ("multi_level", "ngram", "draft_model", "hybrid")[number]
    guards = GuardSettings(exact_first=(0, 9)[number % 2], exact_token_ids=frozenset({5}), max_loosened_per_100=number)
    check_budget(rule, way, number, drafter, [(), (3, 1), (0, 7, 2), (1,)][number], guards)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_the_budget_is_exact_whatever_it_is(rule: str, way: str) -> None:
    @examples(20)
    @given(salt=st.integers(0, 30), drafter=st.sampled_from(DRAFTERS[1:]), cut=cuts, guards=budgets)
    def check(salt: int, drafter: str, cut: list[int], guards: GuardSettings) -> None:
        check_budget(rule, way, salt, drafter, cut, guards)

    check()


def check_budget(rule: str, way: str, salt: int, drafter: str, cut: Sequence[int], guards: GuardSettings) -> None:
    """Serves the same beside another request, with rounds in one piece and cut."""
    served = []
    for lengths in ((), cut):
        settings: dict[str, Any] = {"seed": salt, "ignore_eos": way != "grammar"} | WAYS[way]
        count = settings.get("n", 1)
        rules = [{"policy": RULES[rule].for_request()} for _ in range(count)]
        requests = [guarded(guards, index=index, **settings, **rules[index]) for index in range(count)]
        stack = build(salt, drafter, lengths, num_slots=1 + count)
        stack.run(make_request([9, 8, 7], request_id="mate", policy=EXACT, max_tokens=20), *requests)
        for request in requests:
            assert request.error is None
            trace, tokens = request.trace, request.output_token_ids
            is_loosened = [of_token.choice != token for of_token, token in zip(trace, tokens, strict=True)]
            if way == "greedy":
                text, language = [*PROMPT, *tokens], most_probable(spread_logits(salt))
                own = [language(tuple(text[: len(PROMPT) + at])) for at in range(len(tokens))]
                assert is_loosened == [token != choice for token, choice in zip(tokens, own, strict=True)]
            assert_holds(guards, tokens, is_loosened, [of_token.choice for of_token in trace])
            assert request.metrics.num_loosened_tokens == sum(is_loosened)
            assert request.metrics.num_saved_tokens == saved_tokens(trace)
            refused = Counter(of_token.guard for of_token in trace if of_token.guard is not None)
            assert request.metrics.num_refused_loosenings_by_guard == refused
        served.append([(request.output_token_ids, counts_of(request.metrics)) for request in requests])
        assert_counts_agree(stack, [request.metrics for request in requests])
    assert served[0] == served[1], "however rounds are cut"


def counts_of(metrics: RequestMetrics) -> tuple[int, int, dict[str, int]]:
    return metrics.num_loosened_tokens, metrics.num_saved_tokens, metrics.num_refused_loosenings_by_guard


def assert_counts_agree(stack: Stack, of_requests: list[RequestMetrics]) -> None:
    """The service's counters are the sum of the requests', of which exact ones have none."""
    total = of_requests[0].merged(of_requests[1:])
    assert stack.counted("spec_decode_num_loosened_tokens_total") == total.num_loosened_tokens
    assert stack.counted("spec_decode_num_saved_tokens_total") == total.num_saved_tokens
    for guard in ("exact_first", "exact_token_ids", "exact_within", "max_loosened_per_100"):
        counted = stack.counted(f'spec_decode_num_refused_loosenings_total{{guard="{guard}"}}')
        assert counted == total.num_refused_loosenings_by_guard.get(guard, 0)


@dataclass
class Recount:
    """Greedy decoding with a draft model, round by round, from the policy's own verdict and guards that count what was
    emitted so far."""

    salt: int
    policy: AcceptancePolicy
    guards: GuardSettings
    tokens: list[int] = field(default_factory=list)
    is_loosened: list[bool] = field(default_factory=list)
    num_saved: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def run(self, num_tokens: int) -> None:
        while len(self.tokens) < num_tokens:
            self._round(num_tokens - len(self.tokens))

    def _round(self, room: int) -> None:
        prefix = [*PROMPT, *self.tokens]
        draft = greedy(draft_of(self.salt), prefix, NUM_DRAFT_TOKENS)
        seen = self._evidence(prefix, draft)
        verdict = self.policy.verdict(seen, frozenset({STOP_TOKEN}))
        choices, end, refused_by = seen.choices.tolist(), verdict.num_accepted, None
        for at in range(end + (end < len(draft))):
            if draft[at] == choices[at]:
                continue
            is_wanted = at < end or self.policy.opens_window(seen, at, frozenset({STOP_TOKEN}))
            if not is_wanted or STOP_TOKEN in (draft[at], choices[at]):
                end = at
                break
            before = [draft[i] != choices[i] for i in range(at)]
            if (refused_by := self._refusal(before, draft[at], choices[at])) is not None:
                end = at
                break
            if at == verdict.num_accepted:
                break
        emitted = [*draft[:end], choices[end]][:room]
        kept = min(end, len(emitted))
        differs = [draft[at] != choices[at] for at in range(kept)]
        self.num_saved += kept - differs.index(True) if any(differs) else 0
        self.is_loosened += [*differs, False][: len(emitted)]
        self.tokens += emitted
        if refused_by is not None and len(emitted) > end:
            self.refused[refused_by] += 1

    def _refusal(self, before: list[bool], token: int, choice: int) -> str | None:
        guards = self.guards
        if len(self.tokens) + len(before) < guards.exact_first:
            return "exact_first"
        if guards.exact_token_ids & {token, choice}:
            return "exact_token_ids"
        budget = guards.max_loosened_per_100
        is_spent = budget is not None and sum([*self.is_loosened, *before][-99:]) >= budget
        return "max_loosened_per_100" if is_spent else None

    def _evidence(self, prefix: list[int], draft: list[int]) -> Evidence:
        """What the target says of the whole draft."""
        prefixes = [tuple(prefix + draft[:at]) for at in range(len(draft) + 1)]
        logits = np.stack([spread_logits(self.salt)(tokens) for tokens in prefixes]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        entropy = np.array([sometimes_uncertain(self.salt)(tokens) for tokens in prefixes], np.float32)
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
        of_draft = np.append(logprobs[np.arange(len(draft)), draft], np.nan)
        said = Positions(
            logits.argmax(axis=1),
            FULL_ENTROPY * entropy,
            entropy,
            logprobs.max(axis=1).astype(np.float32),
            of_draft.astype(np.float32),
            ids,
            np.take_along_axis(logprobs, ids, axis=1).astype(np.float32),
        )
        sources = np.full(len(draft), DraftSource.MODEL, np.uint8)
        return Evidence(len(draft), True, np.array(draft), sources, target=said)


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("adaptive", "cactus")])
def test_loosened_saved_and_refused_tokens_are_what_a_recount_says(rule: str) -> None:
    """Of rules that read no draft scores and loosen greedy requests."""
    seen: Counter[str] = Counter()

    @examples(20)
    @given(salt=st.integers(0, 30), cut=cuts, guards=budgets)
    def check(salt: int, cut: list[int], guards: GuardSettings) -> None:
        policy = RULES[rule]
        want = Recount(salt, policy, guards)
        want.run(NUM_TOKENS)
        stack = build(salt, "draft_model", cut)
        request = guarded(guards, policy=policy, ignore_eos=True)
        stack.run(request)
        assert request.output_token_ids == want.tokens
        assert counts_of(request.metrics) == (sum(want.is_loosened), want.num_saved, dict(want.refused))
        seen.update({"loosened": sum(want.is_loosened), "refused": want.refused.total()})

    check()
    assert seen["loosened"], "there was something to count"
    assert seen["refused"]


def test_a_refusal_behind_the_end_of_a_request_is_none() -> None:
    """The round would have come to it, the request did not."""
    for salt in range(2):
        policy, guards = RULES["typical"], GuardSettings(max_loosened_per_100=1)
        want = Recount(salt, policy, guards)
        want.run(40)
        for length in range(1, 40, 2):
            part = Recount(salt, policy, guards)
            part.run(length)
            request = guarded(guards, policy=policy, ignore_eos=True)
            request.max_tokens = length
            build(salt, "draft_model").run(request)
            assert request.output_token_ids == want.tokens[:length]
            assert counts_of(request.metrics) == (sum(part.is_loosened), part.num_saved, dict(part.refused))


def test_requests_without_guards_are_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is an engine's own verdict looked at again."""

    def never(*_: object) -> Verdict:
        raise AssertionError("nobody asked for guards")

    monkeypatch.setattr("fly_trt.verification.guards.Guards.that_forbids", never)
    monkeypatch.setattr("fly_trt.verification.guards.Limits.guard_that_forbids", never)
    monkeypatch.setattr("fly_trt.verification.guards.Limits.apply", never)
    request = make_request(policy=SHORT_WINDOW, ignore_eos=True)
    build(1, "draft_model").run(request)
    assert request.metrics.num_loosened_tokens > 0
    assert request.metrics.guards == {}
