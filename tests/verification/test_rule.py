"""The acceptance rule on small rows where the right answer can be read off."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt.errors import ConfigError
from fly_trt.verification import EXACT, NOTHING, PRESETS, AcceptancePolicy, Evidence, FlyPolicy, accept, fly_policy

TARGET = np.arange(100, 117)  # the target's choice at 16 draft positions and after them
UNCERTAIN = np.full(17, 1.0)
CERTAIN = np.zeros(17)
STOPS = frozenset({1})
REFERENCE = PRESETS["reference"]


def draft_with_mismatches(*positions: int, n: int = 16) -> np.ndarray:
    draft = TARGET[:n].copy()
    draft[list(positions)] += 50
    return draft


def num_accepted(draft: np.ndarray, gate: np.ndarray = UNCERTAIN, policy: AcceptancePolicy = REFERENCE) -> int:
    return accept(draft, TARGET[: len(draft) + 1], gate, policy, STOPS).num_accepted


def test_a_draft_that_matches_is_accepted_whole_and_the_bonus_token_follows() -> None:
    verdict = accept(draft_with_mismatches(), TARGET, CERTAIN, EXACT, STOPS)
    assert (verdict.num_accepted, verdict.next_token) == (16, 116)


def test_an_empty_draft_yields_the_targets_token() -> None:
    verdict = accept(np.empty(0, np.int64), TARGET[:1], UNCERTAIN[:1], REFERENCE, STOPS)
    assert (verdict.num_accepted, verdict.next_token) == (0, 100)


def test_exact_match_stops_at_the_first_mismatch_with_the_correction() -> None:
    verdict = accept(draft_with_mismatches(4), TARGET, UNCERTAIN, EXACT, STOPS)
    assert (verdict.num_accepted, verdict.next_token) == (4, 104)


def test_fly_loosens_where_the_target_is_uncertain_and_agrees_afterwards() -> None:
    assert num_accepted(draft_with_mismatches(4)) == 16


def test_fly_keeps_the_targets_token_where_the_target_is_certain() -> None:
    assert num_accepted(draft_with_mismatches(4), gate=CERTAIN) == 4


@pytest.mark.parametrize(("entropy", "accepted"), [(0.3, 16), (np.nextafter(np.float32(0.3), np.float32(0)), 4)])
def test_the_threshold_itself_is_uncertain_enough(entropy: float, accepted: int) -> None:
    gate = np.full(17, entropy, np.float32)
    policy = FlyPolicy(float(np.float32(0.3)), use_full_entropy=False, window=6, lookahead=5)
    assert num_accepted(draft_with_mismatches(4), gate, policy) == accepted


def test_not_a_number_is_never_uncertain() -> None:
    assert num_accepted(draft_with_mismatches(4), gate=np.full(17, np.nan)) == 4


def test_a_second_mismatch_within_the_lookahead_forbids_loosening() -> None:
    assert num_accepted(draft_with_mismatches(2, 7)) == 2
    assert num_accepted(draft_with_mismatches(2, 8)) == 16


def test_the_window_must_lie_inside_the_draft() -> None:
    assert num_accepted(draft_with_mismatches(9)) == 16
    assert num_accepted(draft_with_mismatches(10)) == 10


def test_paper_and_vllm_want_one_more_agreeing_token_than_the_reference() -> None:
    for preset in ("paper", "vllm"):
        assert num_accepted(draft_with_mismatches(2, 8), policy=fly_policy(preset, 2)) == 2
        assert num_accepted(draft_with_mismatches(2, 9), policy=fly_policy(preset, 2)) == 16


def test_a_lookahead_beyond_the_window_must_also_lie_inside_the_draft() -> None:
    policy = FlyPolicy(0.3, use_full_entropy=False, window=2, lookahead=8)
    assert num_accepted(draft_with_mismatches(7), policy=policy) == 16
    assert num_accepted(draft_with_mismatches(8), policy=policy) == 8


def test_a_stop_token_is_never_loosened_whoever_proposes_it() -> None:
    proposed = draft_with_mismatches()
    proposed[3] = 1
    assert num_accepted(proposed) == 3
    wanted = TARGET.copy()
    wanted[3] = 1
    verdict = accept(draft_with_mismatches(), wanted, UNCERTAIN, REFERENCE, STOPS)
    assert (verdict.num_accepted, verdict.next_token) == (3, 1)


@st.composite
def whole_rounds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, AcceptancePolicy]:
    """A draft of n tokens that mostly matches, the n + 1 choices and gates, and any policy."""
    n = draw(st.integers(0, 12))
    choices = draw(st.lists(st.integers(1, 9), min_size=n + 1, max_size=n + 1))
    changes = draw(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=n, max_size=n))
    draft = [1 + (token + change) % 9 if change else token for token, change in zip(choices, changes, strict=False)]
    gate = draw(st.lists(st.sampled_from([0.1, 0.3, 1.0, math.nan]), min_size=n + 1, max_size=n + 1))
    policy = draw(
        st.one_of(
            st.sampled_from([EXACT, *PRESETS.values()]),
            st.builds(
                FlyPolicy,
                entropy_threshold=st.sampled_from([0.0, 0.3, math.inf]),
                use_full_entropy=st.just(False),
                window=st.integers(0, 8),
                lookahead=st.integers(0, 8),
            ),
        )
    )
    return np.array(draft, np.int64), np.array(choices, np.int64), np.array(gate, np.float32), policy


@examples(150)
@given(whole_rounds())
def test_a_verdict_on_a_beginning_never_contradicts_the_whole(round_: tuple) -> None:
    draft, choices, gate, policy = round_
    n = len(draft)
    whole = accept(draft, choices, gate, policy, STOPS)
    assert whole.next_token == choices[whole.num_accepted], "the whole is decided"
    for d in range(n + 1):
        furthest = 0
        for v in range(n + 2):
            part = accept(draft[:d], choices[:v], gate[:v], policy, STOPS, num_draft=n)
            assert part.num_accepted <= whole.num_accepted
            assert part.next_token is None or part == whole
            assert part.num_accepted <= min(d, v), "nothing stands that was not compared"
            assert part.num_accepted >= furthest, "more knowledge takes nothing back"
            furthest = part.num_accepted
    assert accept(draft, choices, gate, policy, STOPS, num_draft=n) == whole


def test_a_beginning_decides_as_soon_as_it_can() -> None:
    draft = draft_with_mismatches(2)
    open_after = [
        accept(draft[:d], TARGET[:d], UNCERTAIN[:d], REFERENCE, STOPS, num_draft=16).num_accepted for d in range(17)
    ]
    assert open_after == [0, 1, 2, 2, 2, 2, 2, 2, *range(8, 17)]
    verdict = accept(draft[:3], TARGET[:3], CERTAIN[:3], REFERENCE, STOPS, num_draft=16)
    assert (verdict.num_accepted, verdict.next_token) == (2, 102)
    again = draft_with_mismatches(2, 4)
    verdict = accept(again[:5], TARGET[:5], UNCERTAIN[:5], REFERENCE, STOPS, num_draft=16)
    assert (verdict.num_accepted, verdict.next_token) == (2, 102)


def test_a_beginning_leaves_the_bonus_token_open_until_it_was_chosen() -> None:
    draft = draft_with_mismatches(n=4)
    assert accept(draft, TARGET[:4], CERTAIN[:4], EXACT, STOPS, num_draft=4).next_token is None
    assert accept(draft, TARGET[:5], CERTAIN[:5], EXACT, STOPS, num_draft=4).next_token == 104


def test_loosened_tokens_are_the_accepted_ones_that_differ() -> None:
    draft = draft_with_mismatches(4, 12)
    evidence = Evidence(len(draft), draft=draft, target=NOTHING._replace(choices=TARGET))
    assert evidence.num_loosened(11) == 1
    assert evidence.num_loosened(16) == 2


def test_the_papers_threshold_is_a_fraction_of_the_largest_entropy() -> None:
    assert fly_policy("paper", 128_256).entropy_threshold == pytest.approx(0.3 * math.log(128_256))
    assert fly_policy("paper", 128_256, entropy_threshold=0.1).entropy_threshold == pytest.approx(1.176, abs=1e-3)
    assert fly_policy("reference", 128_256).entropy_threshold == 0.3


def test_another_window_keeps_the_presets_relation_to_the_lookahead() -> None:
    assert (fly_policy("reference", 2, window=4).window, fly_policy("reference", 2, window=4).lookahead) == (4, 3)
    assert fly_policy("vllm", 2, window=4).lookahead == 4
    assert fly_policy("reference", 2, window=0).lookahead == 0


def test_an_unknown_preset_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'strict': expected one of reference, paper, vllm"):
        fly_policy("strict", 2)
