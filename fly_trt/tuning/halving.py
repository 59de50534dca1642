"""Successive halving: which candidates of a rung go on to the next one, with more prompts, and which are judged.

Pure functions of what was measured, so that a run that is continued decides as it did before. What is decided here
claims nothing: the finalists are judged on other prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fly_trt.tuning.result import PLAIN, Candidate, Outcome

ERROR_RATE = 0.05  # of what is called clear
NORMAL_95 = 1.645  # its one-sided quantile
MIN_BLOCKS = 3  # fewer say nothing of how much speeds vary
MOST_KEPT = 0.75  # of a rung, where half of it is not clearly faster than the rest

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """What is known of a candidate. log_speeds float64 [blocks]: ln of its tokens per second over plain decoding's, in
    each block of prompts that both answered. losses, targets float64 [prompts]: how much lower its score is than the
    target's, and the target's."""

    candidate: Candidate
    log_speeds: Floats
    losses: Floats
    targets: Floats

    @property
    def speed(self) -> float:
        """Over plain decoding."""
        return math.exp(self.log_speeds.mean())

    def loses(self, min_retention: float) -> bool:
        """Whether it seems to keep less of the target's quality."""
        return not self.candidate.is_lossless and self.losses.mean() > self._allowed(min_retention)

    def clearly_loses(self, min_retention: float) -> bool:
        """Whether as much would hardly ever be lost by a setting that keeps `min_retention`: by a binomial test of the
        answers lost, or by a normal bound where many scores are a little lower."""
        if self.candidate.is_lossless:
            return False
        count, allowed = len(self.losses), self._allowed(min_retention)
        by_chance = _binomial_tail(math.floor(self.losses.sum() + 1e-9), count, allowed)
        return by_chance < ERROR_RATE or _lower_bound(self.losses) > allowed

    def is_clearly_slower(self, other: "Standing") -> bool:
        """On the blocks that both have, which are the first ones of each."""
        common = min(len(self.log_speeds), len(other.log_speeds))
        return _lower_bound(other.log_speeds[:common] - self.log_speeds[:common]) > 0

    def _allowed(self, min_retention: float) -> float:
        return (1 - min_retention) * float(self.targets.mean())


def standings(candidates: Mapping[str, Candidate], blocks: Sequence[Sequence[Outcome]]) -> dict[str, Standing]:
    """Of the candidates by name, from the measured blocks of the search in their order."""
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    losses: dict[str, list[float]] = {name: [] for name in candidates}
    targets: dict[str, list[float]] = {name: [] for name in candidates}
    for block in blocks:
        plain = {outcome.prompt_index: outcome for outcome in block if outcome.candidate == PLAIN}
        for name in candidates:
            own = [outcome for outcome in block if outcome.candidate == name]
            if own:
                speeds[name].append(math.log(block_speed(own) / block_speed(list(plain.values()))))
                losses[name] += [plain[outcome.prompt_index].score - outcome.score for outcome in own]
                targets[name] += [plain[outcome.prompt_index].score for outcome in own]
    return {
        name: Standing(candidate, np.array(speeds[name]), np.array(losses[name]), np.array(targets[name]))
        for name, candidate in candidates.items()
        if speeds[name]
    }


def block_speed(outcomes: Sequence[Outcome]) -> float:
    """Tokens per second of a request."""
    return sum(outcome.num_tokens for outcome in outcomes) / sum(outcome.seconds for outcome in outcomes)


@dataclass(frozen=True, slots=True)
class Rung:
    """What became of the candidates of a rung: those that go on, best first, and of the others why not, by name."""

    kept: list[str]
    dropped: dict[str, str]


def halve(known: Mapping[str, Standing], min_retention: float, num_finalists: int) -> Rung:
    """Plain decoding goes on, it is what the others are compared with. Lossless candidates compete among themselves, as
    loose ones do: one that is fast because it loses what nobody has seen yet must not crowd out what needs no claim."""
    others = {name: standing for name, standing in known.items() if name != PLAIN}
    dropped = {
        name: "clearly loses quality" for name, standing in others.items() if standing.clearly_loses(min_retention)
    }
    dropped |= {
        name: "clearly slower than plain decoding"
        for name, standing in others.items()
        if name not in dropped and _lower_bound(-standing.log_speeds) > 0
    }
    lossless = [s for name, s in others.items() if s.candidate.is_lossless and name not in dropped]
    loose = [s for name, s in others.items() if not s.candidate.is_lossless and name not in dropped]
    fastest = max(lossless, key=lambda standing: standing.speed, default=None)
    if fastest is not None:
        useless = [standing for standing in loose if standing.is_clearly_slower(fastest)]
        dropped |= {s.candidate.name: f"clearly slower than {fastest.candidate.name}, lossless" for s in useless}
        loose = [standing for standing in loose if standing not in useless]
    kept = []
    for pool, is_lossless in ((lossless, True), (loose, False)):
        # Half of those that began the rung: what was dropped makes room for what looks slower, and loses nothing.
        num_begun = sum(standing.candidate.is_lossless == is_lossless for standing in others.values())
        ranked = sorted(pool, key=lambda standing: (standing.loses(min_retention), -standing.speed))
        going_on = _best(ranked, max(num_finalists, math.ceil(num_begun / 2)))
        kept += going_on
        dropped |= {s.candidate.name: "slower than others of its kind" for s in pool if s not in going_on}
    names = [standing.candidate.name for standing in sorted(kept, key=lambda standing: -standing.speed)]
    return Rung([PLAIN, *names], dropped)


def choose_finalists(known: Mapping[str, Standing], min_retention: float, count: int) -> list[str]:
    """The fastest lossless candidate, the fastest loose ones that are faster still and seem to keep quality, and where
    these are few, more lossless ones; `count` at most."""
    by_speed = sorted((s for name, s in known.items() if name != PLAIN), key=lambda standing: -standing.speed)
    lossless = [s for s in by_speed if s.candidate.is_lossless]
    least = lossless[0].speed if lossless else 1.0
    loose = [s for s in by_speed if not s.candidate.is_lossless and s.speed > least and not s.loses(min_retention)]
    chosen = [*lossless[:1], *loose, *lossless[1:]][:count]
    return [standing.candidate.name for standing in chosen]


def _best(ranked: Sequence[Standing], count: int) -> list[Standing]:
    """And those behind them that are not clearly slower than the last of them, up to a limit."""
    kept, behind = list(ranked[:count]), ranked[count:]
    limit = math.floor(len(ranked) * MOST_KEPT) - count
    return kept + [standing for standing in behind if not standing.is_clearly_slower(kept[-1])][: max(0, limit)]


def _lower_bound(values: Floats) -> float:
    """One-sided bound of the mean by the normal law, or -inf of few values."""
    if len(values) < MIN_BLOCKS:
        return -math.inf
    return float(values.mean() - NORMAL_95 * values.std(ddof=1) / math.sqrt(len(values)))


def _binomial_tail(least: int, count: int, chance: float) -> float:
    """That `least` or more of `count` happen."""
    return 1 - sum(math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(least))
