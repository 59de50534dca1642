"""From a table of outcomes to the setting, in words that claim no more than was shown."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from fly_trt.tuning.result import DEFAULT, PLAIN, CandidateResult, Outcome, Verdict
from fly_trt.tuning.verdict import Rules, conclude
from fly_trt.tuning.wording import percent
from tuning_tables import Simulated, Truth

BASELINE = Simulated(PLAIN, 1.0)
RULES = Rules("checks", num_resamples=200)


def judged(
    *others: Simulated, num_prompts: int = 400, lost: dict[str, int] | None = None, rules: Rules = RULES
) -> tuple[dict[str, CandidateResult], Verdict]:
    """Everything is judged on all prompts but 40, which chose. lost: prompts that a candidate gets wrong; it gets the
    others right, as the target does."""
    simulated = [BASELINE, *others]
    truth = Truth.drawn(
        [dataclasses.replace(one, loss=None) for one in simulated], num_prompts, np.random.default_rng(0)
    )
    for number, one in enumerate(simulated):
        truth.right[number, 40 : 40 + (lost or {}).get(one.name, 0)] = False
    names = [one.name for one in simulated]
    outcomes = [*truth.outcomes(names, range(40), "search"), *truth.outcomes(names, range(40, num_prompts), "judge")]
    results, verdict = conclude([one.candidate for one in simulated], outcomes, rules)
    return {one.candidate.name: one for one in results}, verdict


def says(verdict: Verdict) -> str:
    return " ".join(verdict.sentences)


def test_the_fastest_that_surely_keeps_enough_is_found_and_the_claim_is_the_bound() -> None:
    results, verdict = judged(
        Simulated("exact", 1.5), Simulated("loose", 2, 0), Simulated("fast", 3, 0.1), num_prompts=540, lost={"fast": 50}
    )
    assert (verdict.kind, verdict.chosen) == ("found", "loose")
    bound = results["loose"].retention
    assert bound is not None
    assert 0.99 <= bound.lower < 0.993
    assert f"keeps at least {percent(bound.lower)} of the target's right answers with 95 % confidence" in says(verdict)
    assert "judged on 500 prompts that did not choose it: 0 of them scored lower" in says(verdict)
    assert "2 loose settings were judged" in says(verdict)
    assert "fast has 3" in says(verdict)
    assert "keeps 90 % as seen, less than the 99 % that were asked for" in says(verdict)
    assert [results[name].verdict for name in ("loose", "exact", "fast", PLAIN)] == [
        "chosen",
        "qualifies, not the fastest",
        "loses too much",
        "the baseline",
    ]


def test_what_is_lossless_needs_no_claim() -> None:
    results, verdict = judged(Simulated("exact", 1.5), num_prompts=60)
    assert (verdict.kind, verdict.chosen) == ("found", "exact")
    assert results["exact"].retention is None
    assert "are the target's own by construction" in says(verdict)
    assert "all 20 were so, token by token" in says(verdict)
    assert "confidence" not in says(verdict)


def test_lossless_answers_that_rounding_has_changed_are_counted() -> None:
    """A graphics card that reads eight tokens at once rounds otherwise than one that reads them one by one."""
    _, verdict = judged(Simulated("exact", 1.5), num_prompts=90, lost={"exact": 3})
    assert verdict.chosen == "exact"
    assert "here 3 of 50 were others" in says(verdict)
    assert "token by token" not in says(verdict)


def test_too_few_prompts_are_told_with_the_number_that_would_do() -> None:
    results, verdict = judged(Simulated("loose", 2, 0), num_prompts=200)
    assert (verdict.kind, verdict.chosen) == ("too_few_prompts", PLAIN)
    bound = results["loose"].retention
    assert bound is not None
    assert bound.lower < 0.99
    assert f"160 prompts show no more than {percent(bound.lower)}" in says(verdict)
    assert "takes 309 (with those that choose 349) without a loss." in says(verdict)
    assert results["loose"].verdict == "too few prompts"


def test_a_lossless_setting_is_found_beside_a_faster_one_with_too_few_prompts() -> None:
    _, verdict = judged(Simulated("exact", 1.5), Simulated("loose", 2, 0), num_prompts=200, lost={"loose": 1})
    assert (verdict.kind, verdict.chosen) == ("found", "exact")
    assert "loose has 2.0" in says(verdict)
    assert "without a loss, and 2," in says(verdict)  # thousand and more, at 1 of 160


def test_nothing_that_loses_too_much_is_chosen() -> None:
    _, verdict = judged(Simulated("loose", 2, 0.1), lost={"loose": 36})
    assert (verdict.kind, verdict.chosen) == ("nothing_qualifies", PLAIN)
    assert "No setting that is faster than plain decoding keeps 99 %" in says(verdict)
    assert "keeps 90 % as seen" in says(verdict)


def test_nothing_slower_than_plain_decoding_is_chosen_however_little_it_loses() -> None:
    results, verdict = judged(Simulated("exact", 0.8), Simulated("loose", 0.9, 0), Simulated("even", 1.0))
    assert (verdict.kind, verdict.chosen) == ("nothing_pays", PLAIN)
    assert "No speculation surely pays here" in says(verdict)
    assert results["exact"].verdict == "not surely faster than plain"


def test_speeds_of_a_few_prompts_are_told_as_such() -> None:
    _, verdict = judged(Simulated("exact", 2), num_prompts=44)
    assert verdict.kind == "nothing_pays"
    assert "Too few prompts judge to say that speculation pays here" in says(verdict)
    assert "(of too few prompts to be sure) the speed of plain decoding" in says(verdict)


def test_under_a_load_a_block_of_prompts_is_one_observation_of_speed() -> None:
    """Every other block met a slow machine; the 16 prompts of each say so 16 times."""
    simulated = [BASELINE, Simulated("exact", 1.2)]
    truth = Truth.drawn(simulated, 96, np.random.default_rng(0))
    blocks = [list(range(first, first + 16)) for first in range(0, 96, 16)]
    for block in blocks[::2]:
        truth.seconds[1, block] *= 1.3
    outcomes = truth.outcomes([PLAIN, "exact"], range(96), "judge")
    candidates = [one.candidate for one in simulated]
    for known, is_sure in ((), True), (blocks, False):
        (exact,) = [one for one in conclude(candidates, outcomes, RULES, known)[0] if one.candidate.name == "exact"]
        assert exact.over_plain is not None
        assert exact.over_plain.estimate > 1
        assert exact.is_faster_than_plain == is_sure


def test_the_default_stays_where_nothing_is_surely_faster() -> None:
    _, verdict = judged(Simulated(DEFAULT, 2), Simulated("other", 2.0001))
    assert (verdict.kind, verdict.chosen) == ("default_stays", DEFAULT)
    _, verdict = judged(Simulated(DEFAULT, 2), Simulated("other", 2.2))
    assert (verdict.kind, verdict.chosen) == ("found", "other")
    assert "the engine's default" in says(verdict)


def test_a_default_that_looks_faster_stays_where_it_varies_too_much_to_be_surely_faster_than_plain() -> None:
    simulated = [BASELINE, Simulated(DEFAULT, 2), Simulated("steady", 1.3)]
    truth = Truth.drawn(simulated, 20, np.random.default_rng(0))
    truth.seconds[1] *= np.where(np.arange(20) < 4, 6, 0.1)
    outcomes = truth.outcomes([one.name for one in simulated], range(20), "judge")
    results, verdict = conclude([one.candidate for one in simulated], outcomes, RULES)
    default = next(one for one in results if one.candidate.name == DEFAULT)
    assert default.speed > 1.3
    assert not default.is_faster_than_plain
    assert (verdict.kind, verdict.chosen) == ("default_stays", DEFAULT)


def test_a_default_that_loses_too_much_is_named_however_slow_it_is() -> None:
    _, verdict = judged(Simulated("exact", 2), Simulated(DEFAULT, 1.5, 0.1), lost={DEFAULT: 36})
    assert verdict.chosen == "exact"
    assert "The engine's default has 1.5" in says(verdict)
    assert "keeps 90 % as seen" in says(verdict)


def test_what_was_only_searched_is_not_judged() -> None:
    simulated = [BASELINE, Simulated("exact", 2), Simulated("left", 3, 0)]
    truth = Truth.drawn(simulated, 60, np.random.default_rng(0))
    outcomes = truth.outcomes([PLAIN, "exact", "left"], range(10), "search")
    outcomes += truth.outcomes([PLAIN, "exact"], range(10, 60), "judge")
    candidates = [one.candidate for one in simulated] + [Simulated("never run", 1).candidate]
    results, verdict = conclude(candidates, outcomes, RULES)
    assert [one.candidate.name for one in results] == ["exact", PLAIN, "left"]
    assert (results[-1].stage, results[-1].num_prompts, results[-1].retention) == ("search", 10, None)
    assert results[-1].verdict == "left in the search"
    assert verdict.chosen == "exact"


def test_figures_are_of_the_same_prompts_and_of_all_repetitions() -> None:
    """The slow second half was answered by plain decoding alone."""

    def outcome(
        name: str, prompt: int, repetition: int, seconds: float, tokens: Sequence[int], score: float
    ) -> Outcome:
        return Outcome(name, prompt, "judge", repetition, len(tokens), seconds, 1, tokens, score, -2.0 * len(tokens))

    outcomes = [
        outcome(PLAIN, prompt, repetition, 1 if prompt < 10 else 100, [1, 2, 3, 4], 1)
        for repetition in range(2)
        for prompt in range(20)
    ]
    outcomes += [
        outcome("loose", prompt, repetition, 0.5, [1, 2] if prompt else [1, 2, 3, 4], prompt % 2)
        for repetition in range(2)
        for prompt in reversed(range(10))
    ]
    candidates = [BASELINE.candidate, Simulated("loose", 2, 0).candidate]
    (loose, _), _ = conclude(candidates, outcomes, RULES)
    assert loose.candidate.name == "loose"
    assert (loose.num_prompts, loose.num_tokens) == (10, 2 * (9 * 2 + 4))
    assert loose.tokens_per_second == pytest.approx(44 / 10)
    assert loose.speed == pytest.approx((44 / 10) / (80 / 20))
    assert (loose.quality, loose.target_quality) == (0.5, 1)
    assert loose.loosened_per_100 == pytest.approx(100 * 20 / 44)
    assert (loose.same_answers, loose.common_prefix) == (0.1, pytest.approx(0.1 + 0.9 * 0.5))
    assert loose.perplexity_ratio == pytest.approx(1)


def test_in_agreement_the_claim_says_what_it_does_not_say() -> None:
    _, verdict = judged(Simulated("loose", 2, 0), rules=dataclasses.replace(RULES, kind="agreement"))
    assert verdict.chosen == "loose"
    assert "of the target's likelihood per token with 95 % confidence" in says(verdict)
    assert "not whether they are right" in says(verdict)


def test_a_target_that_gets_nothing_right_leaves_nothing_to_claim() -> None:
    results, verdict = judged(Simulated("loose", 2, 0), lost={PLAIN: 360, "loose": 360})
    assert results["loose"].retention is None
    assert (verdict.kind, verdict.chosen) == ("nothing_qualifies", PLAIN)
    assert results["loose"].verdict == "nothing to keep"
    assert "The target itself scores 0 on all 360 prompts" in says(verdict)


def test_percentages_are_cut_and_never_rounded_up() -> None:
    assert [percent(share) for share in (0.98999, 0.99, 0.995, 1.0)] == ["98.9 %", "99 %", "99.5 %", "100 %"]
