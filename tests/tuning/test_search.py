"""The search for a setting: who goes on, who judges whom, and that a run which was stopped makes the same choice."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fly_trt.tuning.result import DEFAULT, PLAIN
from fly_trt.tuning.search import rung_prompts, split_prompts
from simulated_trials import SimulatedTrials, draw, field, search
from tuning_tables import Simulated

MANY = field(
    *(Simulated(f"exact {number}", 1.0 + 0.1 * number) for number in range(8)),
    *(Simulated(f"good {number}", 1.2 + 0.1 * number, loss=0.0) for number in range(8)),
    *(Simulated(f"lossy {number}", 2.5 + 0.1 * number, loss=0.3) for number in range(12)),
)


def judged(store: object) -> list[str]:
    return list(store.plans["judge"].candidates)


def test_the_fastest_settings_without_loss_are_judged_beside_plain_decoding_and_the_default() -> None:
    _, store = search(draw(MANY))
    plain, default, *finalists = judged(store)
    assert (plain, default) == (PLAIN, DEFAULT)
    assert finalists[0] == "exact 7"
    assert set(finalists[1:]) <= {"good 7", "good 6"}
    assert "good 7" in finalists


def test_settings_that_lose_or_are_slow_cost_little() -> None:
    truth = draw(MANY)
    trials = SimulatedTrials(truth)
    search(truth, trials)
    searched, judge = split_prompts(240, 0)
    chosen_by = Counter(name for name, index in trials.answers if index in searched)
    assert chosen_by[PLAIN] == len(searched)
    for name in ("lossy 0", "lossy 11", "exact 0"):
        assert chosen_by[name] <= len(searched) // 3
    assert not [name for name, index in trials.answers if index in judge and name.startswith("lossy")]


def test_a_setting_that_is_slower_than_plain_decoding_is_not_judged() -> None:
    slow = field(Simulated("exact", 0.8), Simulated("loose", 0.7, loss=0.0), Simulated("exact too", 0.9))
    found, store = search(draw(slow))
    assert judged(store) == [PLAIN, DEFAULT]
    assert found.dropped["exact"] == "clearly slower than plain decoding"


def test_no_prompt_judges_what_it_chose() -> None:
    found, store = search(draw(MANY))
    assert not set(found.search_prompts) & set(found.judge_prompts)
    assert sorted((*found.search_prompts, *found.judge_prompts)) == list(range(240))
    stages = {(outcome.prompt_index, outcome.stage) for outcome in store.outcomes()}
    assert len(stages) == 240


def test_all_candidates_of_a_rung_answer_a_prompt_before_the_next_one_and_take_turns_at_being_first() -> None:
    trials = SimulatedTrials(draw(MANY))
    search(draw(MANY), trials)
    firsts: dict[int, str] = {}
    order = [index for _, index in trials.answers]
    for name, index in trials.answers:
        firsts.setdefault(index, name)
    assert len(set(firsts.values())) > 5
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes == 240 - 1


def test_few_candidates_are_not_searched_longer_than_it_takes_to_judge_them_all() -> None:
    found, store = search(draw(field(Simulated("exact", 1.5))))
    assert list(store.plans) == ["search 0", "judge"]
    assert len(found.judge_prompts) > 200


@given(st.integers(1, 2000), st.integers(0, 5))
def test_every_prompt_chooses_or_judges_in_the_order_of_the_seed(count: int, seed: int) -> None:
    choosing, judging = split_prompts(count + 1, seed)
    assert sorted(choosing + judging) == list(range(count + 1))
    assert choosing
    assert judging
    shares = rung_prompts(choosing)
    assert [index for share in shares for index in share] == choosing
    assert all(shares)


@settings(max_examples=10)
@given(st.integers(1, 80))
def test_a_run_that_is_killed_at_any_moment_goes_on_and_makes_the_same_choice(
    tmp_path_factory: pytest.TempPathFactory, answers: int
) -> None:
    truth = draw(MANY, num_prompts=20)
    state = tmp_path_factory.mktemp("state") / "state.jsonl"
    with pytest.raises(KeyboardInterrupt):
        search(truth, SimulatedTrials(truth, interrupt_after=answers), state)
    with state.open("r+b") as file:  # the last line is half written
        size = file.seek(0, 2)
        file.truncate(size - answers)
    found, store = search(truth, SimulatedTrials(truth), state)
    expected, whole = search(truth)
    assert judged(store) == judged(whole)
    assert found == expected
    assert store.outcomes() == whole.outcomes()


def test_a_run_that_was_finished_measures_nothing_again(tmp_path: Path) -> None:
    truth = draw(MANY)
    found, _ = search(truth, state=tmp_path / "state.jsonl", budget=10)
    trials = SimulatedTrials(truth)
    again, _ = search(truth, trials, tmp_path / "state.jsonl", budget=10)
    assert trials.answers == []
    assert again == found


@pytest.mark.parametrize("minutes", [1, 3, 10])
def test_a_budget_is_kept_and_leaves_time_to_judge(minutes: float) -> None:
    """An answer takes a second in plain decoding, so that everything would take a quarter of an hour."""
    truth = draw(MANY)
    trials = SimulatedTrials(truth)
    found, store = search(truth, trials, budget=minutes)
    longest = len(store.plans["search 0"].candidates) * 1.5
    assert trials.seconds <= 60 * minutes + longest
    judging = sum(outcome.seconds for outcome in store.outcomes() if outcome.stage == "judge")
    assert judging > 0.3 * 60 * minutes
    assert not found.was_complete


def test_with_little_time_fewer_candidates_are_tried_the_usual_ones_first() -> None:
    truth = draw(MANY)
    found, store = search(truth, budget=2)
    tried = store.plans["search 0"].candidates
    assert 4 <= len(tried) < len(MANY)
    assert list(tried) == [one.name for one in MANY][: len(tried)]
    assert found.dropped[MANY[-1].name] == "not tried for lack of time"


def test_a_continued_run_has_what_is_left_of_its_budget(tmp_path: Path) -> None:
    truth = draw(MANY)
    state = tmp_path / "state.jsonl"
    with pytest.raises(KeyboardInterrupt):
        search(truth, SimulatedTrials(truth, interrupt_after=60), state, budget=3)
    spent = max(json.loads(line).get("elapsed", 0) for line in state.read_text().splitlines())
    trials = SimulatedTrials(truth)
    search(truth, trials, state, budget=3)
    assert spent > 10
    assert trials.seconds <= 180 - spent + len(MANY) * 1.5
