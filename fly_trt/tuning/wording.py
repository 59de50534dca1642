"""A verdict in plain words, for the terminal, the page and the manifest. It knows results and decides nothing.

Bounds are cut and never rounded up, so that nobody reads more than was shown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fly_trt.tuning.quality import KINDS
from fly_trt.tuning.result import DEFAULT, PLAIN, CandidateResult, RetentionBound, SpeedRatio, VerdictKind


def percent(share: float) -> str:
    """Cut to a tenth: 0.98999 is 98.9 %."""
    return f"{math.floor(1000 * share + 1e-9) / 10:g} %"


def factor(ratio: float) -> str:
    return f"{ratio:.2f}x"


@dataclass(frozen=True, slots=True)
class Wording:
    """kind: of the judge. num_that_chose: prompts that cannot judge."""

    kind: str
    min_retention: float
    num_that_chose: int
    verdict: VerdictKind
    chosen: str
    results: Sequence[CandidateResult]

    def of_candidate(self, result: CandidateResult) -> str:
        """In a few words."""
        name, bound = result.candidate.name, result.retention
        if name == self.chosen:
            return "chosen"
        if name == PLAIN:
            return "the baseline"
        if result.stage == "search":
            return "left in the search"
        if not result.is_faster_than_plain:
            return "not surely faster than plain"
        if result.qualifies(self.min_retention):
            return "qualifies, not the fastest"
        if bound is None:
            return "nothing to keep"
        return "loses too much" if self._loses_too_much(bound) else "too few prompts"

    def sentences(self) -> list[str]:
        chosen = next(one for one in self.results if one.candidate.name == self.chosen)
        return [*self._finding(chosen), *self._claim(chosen), *self._others(chosen), *self._emptiness(chosen)]

    def _finding(self, chosen: CandidateResult) -> list[str]:
        keeps = f"keeps {percent(self.min_retention)} of the target's {KINDS[self.kind].quality}"
        name, speeds = chosen.candidate.name, _speeds(chosen)
        match self.verdict:
            case "found":
                return [f"{name} is the fastest setting of which it is shown that it {keeps}: {speeds}."]
            case "default_stays":
                return [f"The engine's default {keeps}, and no setting that does is surely faster: {speeds}."]
            case "too_few_prompts":
                return [f"Too few prompts judge to claim of any faster setting that it {keeps}: plain decoding stays."]
            case "nothing_qualifies":
                return [f"No setting that is faster than plain decoding {keeps}: plain decoding stays."]
            case "nothing_pays":
                return [self._slowness()]

    def _slowness(self) -> str:
        others = [one for one in self.results if one.over_plain is not None]
        if not others:
            return "No speculation was tried: plain decoding stays."
        best = max(others, key=lambda one: one.speed)
        finding = "No speculation surely pays here"
        if best.over_plain is not None and not best.over_plain.lower:
            finding = "Too few prompts judge to say that speculation pays here"
        return (
            f"{finding}: {best.candidate.name}, the fastest that was tried, has "
            f"{_ratio(best.over_plain)} the speed of plain decoding, which stays."
        )

    def _claim(self, chosen: CandidateResult) -> list[str]:
        bound = chosen.retention
        if chosen.candidate.name == PLAIN:
            return []
        if bound is None:
            return [self._by_construction(chosen)]
        looks = f"; {bound.num_looks} loose settings were judged, and the confidence is for all of them at once"
        claim = (
            f"It keeps at least {percent(bound.lower)} of the target's {KINDS[self.kind].quality} with "
            f"{percent(bound.confidence)} confidence, judged on {bound.num_prompts} prompts that did not choose it: "
            f"{_changes(bound)}{looks if bound.num_looks > 1 else ''}."
        )
        return [claim, *KINDS[self.kind].caveats]

    def _by_construction(self, chosen: CandidateResult) -> str:
        own = "Its greedy answers are the target's own by construction, so that nothing is claimed of them"
        num_others = round((1 - chosen.same_answers) * chosen.num_prompts)
        if not num_others:
            return f"{own}; all {chosen.num_prompts} were so, token by token."
        return (
            f"{own}; here {num_others} of {chosen.num_prompts} were others, as happens where the engine rounds several "
            "tokens at once in another way than one, and two tokens are as probable."
        )

    def _others(self, chosen: CandidateResult) -> list[str]:
        """Faster ones of which nothing can be claimed, and the engine's default where it does not qualify."""
        return [
            self._why_not(one, one.retention)
            for one in self.results
            if one.retention is not None
            and not one.qualifies(self.min_retention)
            and (one.candidate.name == DEFAULT or (one.is_faster_than_plain and one.speed > chosen.speed))
        ]

    def _emptiness(self, chosen: CandidateResult) -> list[str]:
        """Most likely the file is not fit, and not the model."""
        if chosen.target_quality > 0:
            return []
        return [
            f"The target itself scores 0 on all {chosen.num_prompts} prompts, so that nothing can be claimed of what "
            "is loose: see whether prompts are as the model knows them (--chat), answers have room (--max-tokens), and "
            "what scores them is right."
        ]

    def _why_not(self, result: CandidateResult, bound: RetentionBound) -> str:
        name = "The engine's default" if result.candidate.name == DEFAULT else result.candidate.name
        speed = f"{_ratio(result.over_plain)} the speed of plain decoding"
        seen = f"{name} has {speed} and keeps {percent(bound.estimate)} as seen"
        least = percent(self.min_retention)
        if self._loses_too_much(bound):
            return f"{seen}, less than the {least} that were asked for: {_changes(bound)}."
        wanted = f"{self._number(bound.num_prompts_without_loss)} without a loss"
        if bound.num_lost:
            wanted += f", and {self._number(bound.num_prompts_needed)} at the loss that was seen"
        return (
            f"{seen}, but {bound.num_prompts} prompts show no more than {percent(bound.lower)} ({_changes(bound)}): to "
            f"claim {least} takes {wanted}."
        )

    def _number(self, judging: int | None) -> str:
        """Of prompts that judge, and in the file with those that choose."""
        if judging is None:
            return "more than can be had"
        return f"{judging:,} (with those that choose {judging + self.num_that_chose:,})"

    def _loses_too_much(self, bound: RetentionBound) -> bool:
        return bound.estimate < self.min_retention


def _changes(bound: RetentionBound) -> str:
    return f"{bound.num_lost} of them scored lower than the target and {bound.num_gained} higher"


def _ratio(ratio: SpeedRatio | None) -> str:
    if ratio is None:
        return ""
    interval = f"{factor(ratio.lower)} to {factor(ratio.upper)}" if ratio.lower else "of too few prompts to be sure"
    return f"{factor(ratio.estimate)} ({interval})"


def _speeds(result: CandidateResult) -> str:
    over = ((result.over_plain, "the speed of plain decoding"), (result.over_default, "that of the engine's default"))
    return " and ".join(f"{_ratio(ratio)} {name}" for ratio, name in over if ratio is not None)
