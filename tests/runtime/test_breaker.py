"""The circuit breaker: which settings it trips and for whom, and how they are loose again."""

import threading
import time

import pytest

from fly_trt.errors import ConfigError, RequestError
from fly_trt.runtime.breaker import (
    DEFAULT_SETTING,
    MAX_SETTINGS,
    OTHER_SETTINGS,
    Breaker,
    BreakerConfig,
    BreakerState,
)

BAD, GOOD = 0.2, 1.0


class Clock:
    def __init__(self):
        self.now = 0.0  # as a machine's that has just started

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def changes():
    return []


@pytest.fixture
def breaker(clock, changes):
    return Breaker(BreakerConfig(reset_seconds=60), changes.append, clock)


def trip(breaker, setting=DEFAULT_SETTING):
    """Returns how many audits it takes."""
    for number in range(1, 50):
        if breaker.record(setting, BAD) is not None:
            return number
    raise AssertionError("not tripped")


def state_of(breaker, setting=DEFAULT_SETTING) -> BreakerState:
    return next(state for state in breaker.state() if state.setting == setting)


def test_a_bad_setting_is_tripped_once_and_says_why(breaker, changes):
    number = trip(breaker)
    assert breaker.is_tripped(DEFAULT_SETTING)
    assert [(change.setting, change.is_tripped) for change in changes] == [(DEFAULT_SETTING, True)]
    state = state_of(breaker)
    assert (state.num_audits, state.num_trips, state.is_tripped) == (number, 1, True)
    assert state.mean == pytest.approx(BAD)
    assert state.lower <= BAD < state.upper <= 0.98
    assert state.why == changes[0].why
    assert state.why == f"mean quality 0.200 of {number} audits, certainly below min_quality 0.98"


def test_audits_of_requests_that_ran_when_their_setting_was_tripped_change_nothing(breaker, changes):
    trip(breaker)
    before = state_of(breaker)
    assert all(breaker.record(DEFAULT_SETTING, quality) is None for quality in (BAD, GOOD) * 50)
    assert state_of(breaker) == before
    assert len(changes) == 1


def test_requests_that_finished_before_a_reset_are_not_held_against_what_runs_since(breaker, changes):
    finished_at = time.time() - 1
    trip(breaker)
    breaker.reset()
    for _ in range(100):
        breaker.record(DEFAULT_SETTING, BAD, finished_at)
    assert state_of(breaker).num_audits == 0
    assert not breaker.is_tripped(DEFAULT_SETTING)
    breaker.record(DEFAULT_SETTING, BAD, time.time() + 1)
    assert state_of(breaker).num_audits == 1


def test_a_good_setting_is_not_tripped(breaker, changes):
    assert all(breaker.record(DEFAULT_SETTING, GOOD) is None for _ in range(900))
    assert not breaker.is_tripped(DEFAULT_SETTING)
    assert not changes
    assert state_of(breaker).lower > 0.98


def test_one_clients_bad_setting_makes_nobody_else_exact(breaker):
    for _ in range(30):
        breaker.record(DEFAULT_SETTING, GOOD)
        breaker.record("fly_window_size=2", GOOD)
    trip(breaker, "fly_window_size=1")
    assert breaker.is_tripped("fly_window_size=1")
    assert not breaker.is_tripped(DEFAULT_SETTING)
    assert not breaker.is_tripped("fly_window_size=2")
    assert not breaker.is_tripped("never asked for")


def test_settings_beyond_those_that_are_kept_share_one_and_the_default_is_never_among_them(breaker):
    for number in range(3 * MAX_SETTINGS):
        breaker.record(f"fly_entropy_threshold={number}", GOOD)
    assert len(breaker.state()) == MAX_SETTINGS + 1
    trip(breaker, "one more")
    assert breaker.is_tripped(OTHER_SETTINGS)
    assert breaker.is_tripped("and another that nobody has asked for")
    assert not breaker.is_tripped(DEFAULT_SETTING)
    assert not breaker.is_tripped("fly_entropy_threshold=1")
    breaker.reset(setting=OTHER_SETTINGS)
    assert not breaker.is_tripped("one more")


def test_a_setting_that_is_shared_with_others_stays_so(breaker):
    """Asking for more settings does not get a bad one a fresh start."""
    for number in range(MAX_SETTINGS):
        breaker.record(f"fly_entropy_threshold={number}", GOOD)
    audits = [breaker.record(f"bad {number}", BAD) for number in range(60)]
    assert sum(change is not None for change in audits) == 1


def test_a_person_resets_one_setting_or_all_and_statistics_begin_anew(breaker, changes):
    for setting in (DEFAULT_SETTING, "a", "b"):
        trip(breaker, setting)
    assert [change.setting for change in breaker.reset("person", "a")] == ["a"]
    assert [breaker.is_tripped(setting) for setting in (DEFAULT_SETTING, "a", "b")] == [True, False, True]
    assert [change.setting for change in breaker.reset()] == [DEFAULT_SETTING, "b"]
    state = state_of(breaker)
    assert (state.is_tripped, state.why, state.num_audits, state.mean, state.num_trips) == (False, "person", 0, None, 1)
    assert breaker.reset() == []
    assert [change.why for change in changes[3:]] == ["person"] * 3
    assert trip(breaker) > 1


def test_a_reset_of_a_setting_that_no_audit_knows_is_refused(breaker):
    with pytest.raises(RequestError, match=r"setting 'c': no audit knows it: expected one of default"):
        breaker.reset(setting="c")


def test_a_timer_resets_when_its_time_is_over_and_not_before(breaker, clock, changes):
    trip(breaker)
    clock.now = 30.0
    trip(breaker, "later")
    clock.now = 59.9
    assert breaker.is_tripped(DEFAULT_SETTING)
    clock.now = 60.0
    assert not breaker.is_tripped(DEFAULT_SETTING)
    assert breaker.is_tripped("later")
    clock.now = 90.0
    assert not state_of(breaker, "later").is_tripped  # whoever looks
    assert [change.why for change in changes[2:]] == ["timer", "timer"]
    assert state_of(breaker).num_audits == 0


def test_without_a_timer_a_trip_lasts(clock):
    breaker = Breaker(BreakerConfig(), clock=clock)
    trip(breaker)
    clock.now = 1e9
    assert breaker.is_tripped(DEFAULT_SETTING)


def test_it_may_be_asked_and_reset_while_audits_come(changes):
    breaker = Breaker(BreakerConfig(), changes.append)
    is_over, asked = threading.Event(), []

    def ask():
        while not is_over.is_set():
            asked.append(breaker.is_tripped(DEFAULT_SETTING))
            breaker.reset()
            breaker.state()

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        breaker.record(DEFAULT_SETTING, BAD)
    is_over.set()
    for thread in threads:
        thread.join()
    breaker.reset()
    trips = [change.is_tripped for change in changes]
    assert trips.count(True) == trips.count(False) == state_of(breaker).num_trips
    assert not breaker.is_tripped(DEFAULT_SETTING)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_quality": 1.0}, "min_quality 1.0: expected a number from 0, no breaker, to below 1"),
        ({"min_quality": "high"}, "min_quality 'high': expected a number"),
        ({"error_rate": 0}, "breaker_error_rate 0: expected a number from 1e-6 to 0.5"),
        ({"reset_seconds": -1}, "breaker_reset_seconds -1: expected seconds, above 0, or None"),
    ],
)
def test_what_no_breaker_can_be_made_of_is_refused_by_its_name(settings, said):
    with pytest.raises(ConfigError, match=said):
        BreakerConfig(**settings)
