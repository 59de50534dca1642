"""When a request opens FLy's windows: by its own rounds and fixed costs, and so always alike."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.drafting import ModelDrafter
from fly_trt.runtime.loosening import MAX_PAUSE_TOKENS, TRY_SHARE, Loosening, StepCosts, WindowCounts
from fly_trt.runtime.request import Request
from fly_trt.runtime.rounds import Round
from fly_trt.verification import EXACT, PRESETS, AcceptancePolicy, Evidence, Limits, Positions
from loop_stack import NUM_DRAFT_TOKENS, PROMPT, SHORT_WINDOW, Stack, make_drafter, make_request, make_stack
from table_engine import VOCAB_SIZE, TableEngine, greedy, hashed, sometimes_differs, sometimes_uncertain

K, L = 15, 5
GPU = StepCosts(draft_token=0.13, verification_token=0.015)  # an 8B draft of a 70B target
DEAR = StepCosts(draft_token=0.22, verification_token=0.02)
HALF = StepCosts(draft_token=0.5, verification_token=0.1)  # half of the target's layers, on a CPU

FITS = WindowCounts(num_agreed=14, num_differed=1, num_stood=1, num_failed=0)
FAILS = WindowCounts(num_agreed=1, num_differed=1, num_stood=0, num_failed=1)
MISSES = WindowCounts(num_agreed=0, num_differed=1, num_stood=0, num_failed=0)


def after(costs: StepCosts, *rounds: WindowCounts, length: int = 100) -> Loosening:
    loosening = Loosening(costs, L, K, length)
    for evidence in rounds:
        loosening.observe(evidence, length)
    return loosening


# --- the decision -----------------------------------------------------------------------------------------------------


def test_where_long_drafts_pay_windows_are_open_from_the_first_round_on() -> None:
    assert after(GPU).is_open
    assert after(StepCosts(0.03, 0.01)).is_open


def test_where_they_pay_only_for_a_draft_that_fits_it_is_looked_at_first() -> None:
    first = after(DEAR)
    assert (first.is_open, first.resume_at) == (False, 100)
    assert after(DEAR, FITS).is_open
    missed = after(DEAR, MISSES, MISSES)
    assert not missed.is_open
    assert missed.resume_at > 100


@pytest.mark.parametrize("costs", [HALF, StepCosts(1.0, 0.01)])
def test_without_hope_or_with_a_draft_too_dear_to_read_a_prompt_nothing_is_looked_at(costs: StepCosts) -> None:
    first = after(costs)
    assert not first.is_open
    assert first.resume_at > 100


@pytest.mark.parametrize("costs", [GPU, DEAR, StepCosts(0.07, 0.06), StepCosts(0.0, 0.0)])
def test_windows_that_stand_stay_open(costs: StepCosts) -> None:
    assert after(costs, *[FITS] * 20).is_open
    assert after(costs, *[FITS] * 20).resume_at == after(costs).resume_at  # not paused again


@pytest.mark.parametrize("costs", [GPU, DEAR])
def test_windows_that_fail_are_paused_until_their_cost_is_made_up_for(costs: StepCosts) -> None:
    loosening = after(costs, *[FAILS] * 6)
    assert not loosening.is_open
    pause = loosening.resume_at - 100
    # What a window of five tokens costs at most, and what plain steps of that time bring at least.
    assert 0 < pause <= 1.5 * costs.of_round(L) / TRY_SHARE
    assert pause > costs.draft_token / TRY_SHARE


def test_a_draft_that_misses_is_looked_at_more_often_than_windows_that_fail() -> None:
    misses, fails = (after(DEAR, *[evidence] * 6).resume_at for evidence in (MISSES, FAILS))
    assert 100 < misses < fails


def test_a_draft_model_that_reads_as_long_as_it_may_cost_is_left_alone_for_long() -> None:
    assert after(HALF, MISSES, MISSES).resume_at == 100 + MAX_PAUSE_TOKENS


def test_no_cost_is_too_high() -> None:
    for costs in (StepCosts(1e307, 0.0), StepCosts(0.0, 1e307)):
        assert not after(costs, FAILS, MISSES).is_open
        assert after(costs, FAILS, MISSES).resume_at <= 100 + MAX_PAUSE_TOKENS


def test_a_draft_that_fits_again_opens_windows_again() -> None:
    loosening = after(DEAR, *[FAILS] * 6)
    rounds = 0
    while not loosening.is_open:
        loosening.observe(WindowCounts(num_agreed=15, num_differed=0, num_stood=0, num_failed=0), 500)
        rounds += 1
        assert rounds < 60
    assert rounds > 1


@given(
    st.lists(st.tuples(*[st.integers(0, 15)] * 3, st.integers(0, 1)), max_size=30),
    st.floats(0, 3),
    st.floats(0, 3),
)
def test_it_is_a_function_of_rounds_and_costs_and_never_pauses_without_end(
    rounds: list[tuple[int, int, int, int]], draft_token: float, verification_token: float
) -> None:
    costs = StepCosts(draft_token, verification_token)
    first, second = (after(costs, *(WindowCounts(*counts) for counts in rounds)) for _ in range(2))
    assert (first.is_open, first.resume_at) == (second.is_open, second.resume_at)
    assert 100 <= first.resume_at <= 100 + MAX_PAUSE_TOKENS


# --- in the loop ------------------------------------------------------------------------------------------------------

LANGUAGE = hashed(12, 3)


def served(
    out_of: int,
    costs: StepCosts | None,
    cut: tuple[int, ...] = (),
    *,
    neighbours: int = 0,
    policy: AcceptancePolicy = SHORT_WINDOW,
    **params: object,
) -> tuple[Request, Stack]:
    """A request whose draft model misses one prefix in `out_of`, with a target that is mostly uncertain."""
    request = make_request(PROMPT, policy=policy, request_id="loose", **({"max_tokens": 200} | params))
    others = [make_request([7 + i, 8, 9], request_id=str(i), max_tokens=150) for i in range(neighbours)]
    drafter = make_drafter("draft_model", sometimes_differs(LANGUAGE, 1, out_of))
    stack = make_stack(
        LANGUAGE,
        drafter,
        num_slots=1 + neighbours,
        draft_lengths=cut,
        entropy=sometimes_uncertain(9),
        step_costs=costs,
    )
    stack.run(request, *others)
    return request, stack


CUTS = [(0,), (1,), (2,), (5,), (0, 7), (3, 0, 1)]


@pytest.mark.parametrize("out_of", [2, 3, 6])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("neighbours", [0, 3])
def test_tokens_depend_on_neither_cut_nor_company(out_of: int, cut: tuple[int, ...], neighbours: int) -> None:
    whole, _ = served(out_of, DEAR)
    request, _ = served(out_of, DEAR, cut, neighbours=neighbours)
    assert request.output_token_ids == whole.output_token_ids
    assert request.metrics.num_loosened_tokens == whole.metrics.num_loosened_tokens


def test_those_requests_open_and_pause_windows() -> None:
    """What the tests above run through."""
    always, _ = served(3, None)
    sometimes, _ = served(3, DEAR)
    assert 0 < sometimes.metrics.num_loosened_tokens < always.metrics.num_loosened_tokens


@examples(60)
@given(
    out_of=st.integers(2, 6),
    cuts=st.lists(st.integers(0, K), min_size=1, max_size=5),
    draft_token=st.sampled_from([0.05, 0.15, 0.3]),
    asked=st.sampled_from([None, 3, 8]),
    temperature=st.sampled_from([0.0, 0.8]),
)
def test_tokens_do_not_depend_on_the_cut_whatever_is_asked_for(
    out_of: int, cuts: list[int], draft_token: float, asked: int | None, temperature: float
) -> None:
    costs = StepCosts(draft_token, 0.02)
    params = {"num_speculative_tokens": asked, "temperature": temperature, "seed": 5, "max_tokens": 120}
    outputs = [served(out_of, costs, cut, **params)[0].output_token_ids for cut in ((), tuple(cuts))]
    assert outputs[0] == outputs[1]


def test_without_costs_every_window_is_opened() -> None:
    published, _ = served(2, None)
    assert published.loosening is None
    paused, _ = served(2, StepCosts(1.0, 0.1))
    assert paused.metrics.num_loosened_tokens == 0
    assert paused.output_token_ids == greedy(LANGUAGE, PROMPT, 200) != published.output_token_ids


def test_a_window_is_verified_in_one_step() -> None:
    """One token at a time was asked for; the mismatch at the second token opens a window of five."""
    language = lambda tokens: 2 + (len(tokens) * 3) % 20  # noqa: E731
    differs_at = len(PROMPT) + 1
    draft = lambda tokens: 25 if len(tokens) == differs_at else language(tokens)  # noqa: E731
    request = make_request(policy=PRESETS["reference"], max_tokens=8)
    drafter = ModelDrafter(TableEngine(draft), VOCAB_SIZE)
    stack = make_stack(language, drafter, entropy=lambda tokens: 1.0, draft_lengths=(1,))
    stack.run(request)
    assert request.metrics.num_loosened_tokens == 1
    lengths = [tokens for _, _, tokens in stack.target.shapes]
    assert lengths[0] == len(PROMPT) + 1
    assert lengths[1] == L
    assert len(lengths) <= 4


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("ends_after", [3, 7, 9, 12])
def test_a_draft_that_ends_for_want_of_tokens_decides_alike_however_it_is_cut(
    cut: tuple[int, ...], ends_after: int
) -> None:
    """The draft model's vocabulary is padded, and it proposes a token that the target has not."""
    language = lambda tokens: 2 + (len(tokens) * 3) % 20  # noqa: E731

    def draft(tokens: tuple[int, ...]) -> int:
        place = (len(tokens) - len(PROMPT)) % 16
        return VOCAB_SIZE + 1 if place == ends_after else 25 if place in (1, 5) else language(tokens)

    outputs = []
    for lengths in ((), cut):
        request = make_request(policy=PRESETS["reference"], max_tokens=60)
        drafter = ModelDrafter(TableEngine(draft, vocab_size=VOCAB_SIZE + 8), VOCAB_SIZE)
        stack = make_stack(
            language, drafter, entropy=lambda tokens: 1.0, draft_lengths=lengths, num_draft_tokens=NUM_DRAFT_TOKENS
        )
        stack.run(request)
        outputs.append((request.output_token_ids, request.metrics.num_loosened_tokens))
    assert outputs[0] == outputs[1]


def test_exact_requests_and_free_drafts_never_pause() -> None:
    exact, _ = served(3, DEAR, policy=EXACT)
    assert exact.loosening is None
    request = make_request(policy=SHORT_WINDOW)
    make_stack(LANGUAGE, make_drafter("ngram", LANGUAGE), step_costs=HALF).run(request)
    assert request.loosening is None


def test_evidence_is_what_was_decided() -> None:
    choices = np.array([0, 9, 2, 3, 4, 9, 6, 9, 8, 9, 5])
    said = Positions(choices, *np.ones((4, 11), np.float32))
    evidence = Evidence(10, draft=np.arange(10), sources=np.zeros(10, np.uint8), target=said)
    round_ = Round(0, evidence, SHORT_WINDOW, Limits(frozenset()))
    verdict = round_.policy.verdict(round_.evidence, frozenset())
    assert (verdict.num_accepted, verdict.next_token) == (5, 9)  # 1 is loosened, the window of 5 fails at 7
    round_.num_committed = verdict.num_accepted
    assert round_.window_counts() == WindowCounts(num_agreed=4, num_differed=2, num_stood=1, num_failed=1)
    round_.limits = Limits(frozenset({9}))
    assert round_.window_counts().num_failed == 0  # a stop token opens no window
