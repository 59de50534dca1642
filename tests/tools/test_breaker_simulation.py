"""The breaker's error rate and the audits that it takes to find a bad setting are what is stated; by simulation."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ASSETS

from breaker_simulation import bad_settings, drawn_from, first_verdict, good_settings, recorded, verdicts
from fly_trt.runtime.breaker import DEFAULT_ERROR_RATE, DEFAULT_MIN_QUALITY
from fly_trt.runtime.quality import ERROR_AUDITS, QualityWatch, audits_to_judge, audits_to_trip, good_quality

RECORDED = recorded(ASSETS / "qualities.json")
EASY_RATE = 0.5  # at which a rule that is not kept would be seen


def verdict_audit_by_audit(qualities, min_quality, error_rate):
    watch = QualityWatch(min_quality, error_rate)
    for number, quality in enumerate(qualities, start=1):
        if (verdict := watch.observe(quality)) is not None:
            return number, verdict
    return None


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_judged_as_a_whole_is_judged_as_audit_by_audit(seed):
    """A good beginning, and something else behind it; with short periods, so that there are several."""
    rng, (min_quality, rate) = np.random.default_rng(seed), (0.8, EASY_RATE)
    mean = rng.uniform(0.74, 0.86)
    begin = np.where(rng.random(rng.integers(0, 400)) < 0.9, 1.0, rng.uniform(0.4, 1))
    stream = np.concatenate([begin, rng.beta(4 * mean, 4 * (1 - mean), 1200)])
    assert first_verdict(stream, min_quality, rate) == verdict_audit_by_audit(stream, min_quality, rate)


def test_both_verdicts_are_among_those_that_were_compared():
    found = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        mean = rng.uniform(0.70, 0.86)
        found.add((first_verdict(rng.beta(4 * mean, 4 * (1 - mean), 1600), 0.8, EASY_RATE) or (0, None))[1])
    assert found == {"dropped", "unproven", None}


def check_good_settings(settings, min_quality, error_rate, num_seeds, num_audits):
    """Not tripped more often than stated, as far as so many seeds can tell: three standard deviations."""
    stated = num_seeds * error_rate * num_audits / ERROR_AUDITS
    for name, draw in settings.items():
        tripped = [each for each in verdicts(draw, num_seeds, num_audits, min_quality, error_rate) if each is not None]
        assert len(tripped) <= stated + 3 * stated**0.5, (name, tripped)


def check_bad_settings(settings, min_quality, error_rate, num_seeds):
    """99 of 100 are tripped by the audit that is stated for their mean."""
    for name, (mean, draw) in settings.items():
        most = audits_to_trip(mean, min_quality, error_rate)
        found = verdicts(draw, num_seeds, most, min_quality, error_rate)
        num_missed = sum(each is None for each in found)
        assert num_missed <= 0.01 * num_seeds + 3 * (0.01 * num_seeds) ** 0.5, (name, most)


def recorded_settings(is_wanted):
    return {name: values for name, values in RECORDED.items() if is_wanted(values.mean())}


def test_good_settings_are_tripped_no_more_often_than_stated():
    hard = {name: draw for name, draw in good_settings(0.8).items() if "margin" in name or "bad" in name}
    check_good_settings(hard, 0.8, EASY_RATE, num_seeds=4, num_audits=10_000)


def test_bad_settings_are_tripped_as_soon_as_stated():
    check_bad_settings(bad_settings(DEFAULT_MIN_QUALITY), DEFAULT_MIN_QUALITY, DEFAULT_ERROR_RATE, num_seeds=50)


def test_recorded_answers_of_planted_bad_settings_are_found_and_those_of_the_presets_pass():
    bad = recorded_settings(lambda mean: mean < DEFAULT_MIN_QUALITY)
    good = recorded_settings(lambda mean: mean >= good_quality(DEFAULT_MIN_QUALITY))
    assert any("threshold 0, window 1" in name for name in bad)
    assert any("reference" in name for name in good)
    check_bad_settings(
        {name: (values.mean(), drawn_from(values)) for name, values in bad.items()},
        DEFAULT_MIN_QUALITY,
        DEFAULT_ERROR_RATE,
        num_seeds=50,
    )
    draws = {name: drawn_from(values) for name, values in good.items()}
    check_good_settings(draws, DEFAULT_MIN_QUALITY, DEFAULT_ERROR_RATE, num_seeds=1, num_audits=10_000)


def test_any_setting_below_min_quality_is_found_by_the_end_of_a_period_nineteen_times_of_twenty():
    least, length = 0.8, audits_to_judge(0.8, EASY_RATE)
    draw = bad_settings(0.95)["1, or 0: 0.80"][1]
    found = verdicts(lambda rng, size: 0.999 * draw(rng, size), 200, length, least, EASY_RATE)
    assert sum(each is not None for each in found) >= 200 * 0.95 - 3 * (200 * 0.05) ** 0.5


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("min_quality", "error_rate"), [(0.8, EASY_RATE), (0.9, 0.1), (0.95, 0.01), (0.99, EASY_RATE)])
def test_100000_audits_of_good_settings_and_many_seeds_of_bad_ones(min_quality, error_rate):
    good = good_settings(min_quality)
    good |= {
        name: drawn_from(values)
        for name, values in recorded_settings(lambda mean: mean >= good_quality(min_quality)).items()
    }
    check_good_settings(good, min_quality, error_rate, num_seeds=30, num_audits=ERROR_AUDITS)
    bad = {name: each for name, each in bad_settings(min_quality).items() if each[0] <= min_quality - 0.05}
    bad |= {
        name: (values.mean(), drawn_from(values))
        for name, values in recorded_settings(lambda mean: mean <= min_quality - 0.05).items()
    }
    check_bad_settings(bad, min_quality, error_rate, num_seeds=300)


def test_the_tool_prints_what_good_and_bad_settings_come_to(tmp_path):
    file = tmp_path / "qualities.json"
    file.write_text(json.dumps({"mine": [0.4, 0.6], "theirs": [1.0, 0.99]}))
    command = [sys.executable, str(ASSETS.parents[1] / "tools" / "breaker_simulation.py")]
    flags = ["--seeds", "2", "--audits", "2000", "--min-quality", "0.7", "--recorded", str(file)]
    said = subprocess.run([*command, *flags], capture_output=True, text=True, check=True).stdout
    rows = {line[:36].strip(): line[36:].split() for line in said.splitlines()}
    assert rows["theirs"] == ["0"]
    assert rows["mine"][0] == "0.500"
    assert int(rows["mine"][2]) <= int(rows["mine"][3]) == audits_to_trip(0.5, 0.7, 0.01)
