"""Requests whose output has a form: under every rule, however their rounds are cut and whatever shares their batch."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.acceptance import AcceptanceSettings
from fly_trt.runtime.request import Request
from fly_trt.runtime.rounds import NO_CHOICE
from fly_trt.runtime.sampler import Sampler
from fly_trt.tokens import NO_TOKENS
from fly_trt.verification import (
    EXACT,
    POLICIES,
    PRESETS,
    AcceptancePolicy,
    DraftScores,
    DraftSource,
    Evidence,
    FlyPolicy,
    HeadInfo,
    Limits,
    Verdict,
    decide_each,
)
from loop_stack import DRAFTERS, NUM_DRAFT_TOKENS, SHORT_WINDOW, Stack, make_drafter, make_request, make_stack, text_of
from table_engine import (
    STOP_TOKEN,
    VOCAB_SIZE,
    most_probable,
    sometimes_differs,
    sometimes_uncertain,
    spread_logits,
)

HEAD = HeadInfo(VOCAB_SIZE, 3, has_top_tokens=True)
# Texts of the letters that the language likes ("C" to "J") and of others that it would never say.
FORMS = [
    "(C|D|E)+",
    "[C-J]{3,30}",
    "(X|C[D-J]{2})*",
    "CDE(FGH)*",
    "(Y[C-J]Z){1,9}",
    "XYZ",
    "[A-`]*",
    "(CC|DD|EEE|[F-J]){2,}",
]
LOOSEST: dict[str, dict[str, Any]] = {
    "relaxed": {"relaxed_top_n": 3, "relaxed_delta": 1.0},
    "margin": {"margin_threshold": 50.0},
    "typical": {"typical_threshold": 0.01, "typical_alpha": 0.01},
    "conditional": {"conditional_apply_to": "all", "conditional_floor": 0.0001, "conditional_beta": 0.01},
    "adaptive": {"adaptive_max_distance": 1.0},
    "cactus": {"cactus_delta": 3.0},
}


class Anything(AcceptancePolicy):
    """Lets every draft token stand, whatever the target says."""

    name = "anything"

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        return decide_each(evidence, np.ones(evidence.num_known, np.bool_))


def policies() -> dict[str, AcceptancePolicy]:
    made = {name: AcceptanceSettings(acceptance=name, **LOOSEST.get(name, {})).policy(HEAD) for name in POLICIES}
    made |= {f"fly {name}": preset for name, preset in PRESETS.items()}
    no_gate = FlyPolicy(entropy_threshold=0.0, use_full_entropy=False, window=0, lookahead=0)
    return made | {"fly short": SHORT_WINDOW, "fly no gate, no window": no_gate, "anything": Anything()}


def build(salt: int, drafter: str = "multi_level", **settings: Any) -> Stack:
    logits = spread_logits(salt)
    draft = make_drafter(drafter, sometimes_differs(most_probable(logits), salt), settings.get("num_slots", 4))
    return make_stack(most_probable(logits), draft, logits=logits, entropy=sometimes_uncertain(salt), **settings)


def ask(form: str, policy: AcceptancePolicy = EXACT, **settings: Any) -> Request:
    return make_request(policy=policy.for_request(), structured_outputs={"regex": form}, **settings)


def served(stack: Stack, request: Request) -> Request:
    stack.run(request)
    assert request.error is None
    return request


def assert_has_form(request: Request, form: str) -> None:
    tokens = request.output_token_ids
    if request.finish_reason == "stop":
        assert tokens[-1] == STOP_TOKEN
        assert re.fullmatch(form, text_of(tokens[:-1])), text_of(tokens)
    assert STOP_TOKEN not in tokens[:-1]


lengths = st.lists(st.integers(0, NUM_DRAFT_TOKENS), max_size=5)
temperatures = st.sampled_from([0.0, 0.8, 1.5])


@pytest.mark.parametrize("name", policies())
def test_no_rule_lets_a_token_stand_that_the_form_forbids_and_no_cut_changes_a_token(name: str) -> None:
    @examples(8)
    @given(
        salt=st.integers(0, 50),
        form=st.sampled_from(FORMS),
        seed=st.integers(0, 2**32),
        temperature=temperatures,
        lengths=lengths,
    )
    def check(salt: int, form: str, seed: int, temperature: float, lengths: list[int]) -> None:
        def outcome(draft_lengths: Sequence[int]) -> Request:
            policy = policies()[name]
            return served(
                build(salt, draft_lengths=draft_lengths), ask(form, policy, seed=seed, temperature=temperature)
            )

        want, got = outcome(()), outcome(lengths)
        assert_has_form(want, form)
        assert got.output_token_ids == want.output_token_ids
        assert got.finish_reason == want.finish_reason

    check()


def test_what_a_rule_of_ones_own_loosens_is_allowed_by_the_form() -> None:
    """The rule lets everything stand, so that nothing but the form keeps tokens out."""
    num_loosened = 0
    for salt in range(8):
        for form in FORMS:
            request = served(build(salt), ask(form, Anything(), max_tokens=30))
            assert_has_form(request, form)
            num_loosened += request.metrics.num_loosened_tokens
    assert num_loosened > 20


@examples(20)
@given(salt=st.integers(0, 50), form=st.sampled_from(FORMS), seed=st.integers(0, 2**32), temperature=temperatures)
def test_exact_requests_have_the_tokens_of_plain_decoding(salt: int, form: str, seed: int, temperature: float) -> None:
    want = served(build(salt, "none"), ask(form, seed=seed, temperature=temperature))
    assert_has_form(want, form)
    for drafter in DRAFTERS[1:]:
        got = served(build(salt, drafter), ask(form, seed=seed, temperature=temperature))
        assert got.output_token_ids == want.output_token_ids, drafter


def reference(salt: int, form: str, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy decoding as a loop over the texts that may still become one of the form."""
    logits, tokens = spread_logits(salt), list(prompt)
    partial = {"[C-J]{3,30}": (r"[C-J]{0,30}", "[C-J]{3,30}"), "CDE(FGH)*": (r"C?|CD|CDE(FGH)*(F|FG)?", "CDE(FGH)*")}
    beginning, whole = partial[form]
    while len(tokens) - len(prompt) < num_tokens:
        text = text_of(tokens[len(prompt) :])
        fits = [
            token
            for token in range(VOCAB_SIZE)
            if (re.fullmatch(whole, text) if token == STOP_TOKEN else re.fullmatch(beginning, text + text_of([token])))
        ]
        scores = logits(tuple(tokens))
        tokens.append(max(fits, key=lambda token: (scores[token], -token)))
        if tokens[-1] == STOP_TOKEN:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("form", ["[C-J]{3,30}", "CDE(FGH)*"])
def test_greedy_tokens_are_the_most_probable_ones_that_fit(form: str) -> None:
    for salt in range(10):
        request = served(build(salt), ask(form, max_tokens=40))
        assert request.output_token_ids == reference(salt, form, list(request.prompt_token_ids), 40)


@examples(8)
@given(salt=st.integers(0, 50), seed=st.integers(0, 2**32), lengths=lengths)
def test_requests_with_forms_share_a_batch_with_others_and_nobody_notices(
    salt: int, seed: int, lengths: list[int]
) -> None:
    def requests() -> list[Request]:
        loose = PRESETS["reference"]
        return [
            ask(FORMS[0], temperature=0.8, seed=seed, request_id="0"),
            make_request(policy=loose, request_id="1", max_tokens=25),
            ask(FORMS[1], loose, request_id="2", max_tokens=25),
            ask(FORMS[2], Anything(), temperature=1.0, seed=seed, request_id="3"),
            make_request(temperature=0.8, seed=seed, request_id="4"),
            ask(FORMS[0], temperature=0.8, seed=seed + 1, index=1, request_id="5"),
        ]

    alone = [served(build(salt), request) for request in requests()]
    together = requests()
    build(salt, num_slots=4, draft_lengths=lengths).run(*together)
    assert [request.output_token_ids for request in together] == [request.output_token_ids for request in alone]


def test_a_form_that_other_settings_leave_no_token_ends_its_request_and_no_other() -> None:
    request, other = ask("XYZ", bad_word_ids=[[ord("Y") - ord("A")]]), ask("XYZ", request_id="1")
    build(3, num_slots=2).run(request, other)
    assert request.error is not None
    assert re.search("structured_outputs leave no token", str(request.error))
    assert text_of(other.output_token_ids) == "XYZB"


def test_a_form_beyond_its_limits_ends_its_request_and_no_other() -> None:
    costly = ask("X|C(D|F|[G-J]){1000000}", max_tokens=60, bad_word_ids=[[ord("X") - ord("A")]])
    other = ask("[C-J]{20}", request_id="1")
    build(3, num_slots=2).run(costly, other)
    assert other.error is None
    assert len(other.output_token_ids) == 21
    if costly.error is not None:
        assert re.fullmatch(r"structured_outputs\.regex: [^\n]*: make it simpler", str(costly.error))


def test_a_form_changes_what_is_reported_of_no_token() -> None:
    """Log-probabilities are the model's own."""
    request = served(build(4), ask("(X|C[D-J]{2}){3}", logprobs=2))
    plain = spread_logits(4)
    tokens = list(request.prompt_token_ids)
    for token, entry in zip(request.output_token_ids, request.logprobs, strict=True):
        scores = plain(tuple(tokens)).astype(np.float64)
        want = scores[token] - np.log(np.exp(scores).sum())
        assert entry[token].logprob == pytest.approx(want, abs=1e-4)
        tokens.append(token)


@pytest.mark.parametrize("policy", [EXACT, PRESETS["reference"]], ids=["exact", "fly"])
def test_a_trace_changes_no_token_of_a_form(policy: AcceptancePolicy) -> None:
    for form in FORMS:
        plain = served(build(5), ask(form, policy))
        traced = served(build(5), ask(form, policy, speculation_trace=True))
        assert traced.output_token_ids == plain.output_token_ids
        assert len(traced.trace) == len(traced.output_token_ids)


def test_a_text_token_may_end_a_request_only_where_its_form_does() -> None:
    stop = ord("C") - ord("A")
    request = served(build(2), ask("[C-F]{2,12}", stop_token_ids=[stop], ignore_eos=True))
    tokens = request.output_token_ids
    assert request.finish_reason == "stop"
    assert tokens[-1] == stop
    assert re.fullmatch("[D-F]{2,12}", text_of(tokens[:-1]))


def test_more_than_the_most_tokens_are_cut_where_they_are() -> None:
    request = served(build(2), ask("[C-J]{30}", max_tokens=7))
    assert (len(request.output_token_ids), request.finish_reason) == (7, "length")


def test_sequences_of_one_prompt_stand_where_they_stand_each_by_itself() -> None:
    both = [ask("(C|D|E)+", temperature=1.0, seed=5, index=index, request_id=str(index)) for index in range(2)]
    build(1, num_slots=2).run(*both)
    assert both[0].output_token_ids != both[1].output_token_ids
    for request in both:
        assert_has_form(request, "(C|D|E)+")


def sampler_of(form: str, policy: AcceptancePolicy, **settings: Any) -> Sampler:
    sampler = ask(form, policy, **settings).sampler
    assert sampler is not None
    return sampler


@pytest.mark.parametrize("name", policies())
@examples(60)
@given(seed=st.integers(0, 2**32), form=st.sampled_from(FORMS), temperature=temperatures, cut=st.integers(0, 8))
def test_a_draft_token_that_the_form_forbids_never_stands_even_where_drafts_do_not_end_there(
    name: str, seed: int, form: str, temperature: float, cut: int
) -> None:
    """Drafts of any tokens, most of them what the form allows; verified at once or in two steps."""
    rng = np.random.default_rng(seed)
    policy = policies()[name].for_request()
    sampler, allows = sampler_of(form, policy, temperature=temperature, seed=seed), sampler_of(form, policy).grammar
    assert allows is not None
    draft: list[int] = []
    for _ in range(8):
        fits = np.flatnonzero(allows.masks(NO_TOKENS, np.array(draft, np.int64), len(draft)).allowed(0))
        draft.append(int(rng.choice(fits if len(fits) and rng.random() < 0.8 else VOCAB_SIZE)))
    logits = rng.normal(size=(9, VOCAB_SIZE)).astype(np.float32) * rng.choice([0.01, 2.0])
    tokens = np.array(draft, np.int64)
    scores = DraftScores(
        *np.abs(rng.normal(size=(2, 8))).astype(np.float32) * [[1], [-1]],
        rng.permuted(np.tile(np.arange(VOCAB_SIZE), (8, 1)), axis=1)[:, :3],
        np.full((8, 3), -1.2, np.float32),
    )
    sources = rng.choice([DraftSource.MODEL, DraftSource.LOOKUP], 8).astype(np.uint8)
    evidence = Evidence(8, True, tokens, sources, scores)
    evidence.add(sampler.choose(logits[: cut + 1], NO_TOKENS, NO_TOKENS, tokens))
    if len(evidence.choices) == cut + 1 < 9 and evidence.choices[-1] != NO_CHOICE:
        evidence.add(sampler.choose(logits[cut + 1 :], NO_TOKENS, tokens[: cut + 1], tokens[cut + 1 :]))
    limits = Limits(frozenset({STOP_TOKEN}))
    verdict = limits.apply(policy.verdict(evidence, limits.never_loosened), evidence)
    emitted = [*draft[: verdict.num_accepted], *([] if verdict.next_token is None else [verdict.next_token])]
    if NO_CHOICE in emitted:
        emitted = emitted[: emitted.index(NO_CHOICE)]
    assert allows.follow(NO_TOKENS, NO_TOKENS, np.array(emitted, np.int64))[0] == len(emitted), emitted
