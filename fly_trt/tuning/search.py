"""The search: rungs of successive halving on the prompts that choose, then the finalists on the prompts that judge.

It says which candidates answer which prompts, and until when; it reads what was measured from the store, so that a run
that is continued makes the same choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fly_trt.tuning.halving import Standing, choose_finalists, halve, standings
from fly_trt.tuning.result import DEFAULT, PLAIN, Candidate, Outcome, Stage
from fly_trt.tuning.run import Run
from fly_trt.tuning.store import Plan

SEARCH_SHARE = 0.25  # of the prompts, to choose by
MOST_SEARCH_PROMPTS = 60
MOST_RUNGS = 4
LEAST_FOR_SEARCH = 0.4  # of the budget
FIRST_RUNG = 0.4  # of the search, at most: many candidates are worth more than many prompts
MIN_CANDIDATES = 4  # plain decoding, the default, and something to compare them with
SEARCH: Stage = "search"
JUDGE: Stage = "judge"


def split_prompts(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the prompts that choose and of those that judge, each in the order of the seed."""
    order = [int(index) for index in np.random.default_rng(seed).permutation(count)]
    num_search = min(MOST_SEARCH_PROMPTS, max(1, math.ceil(count * SEARCH_SHARE)))
    return order[:num_search], order[num_search:]


def rung_prompts(prompts: Sequence[int]) -> list[list[int]]:
    """Shares for the rungs, each about twice the one before."""
    num_rungs = max(1, min(MOST_RUNGS, int(math.log2(len(prompts) + 1))))
    ends = [round(len(prompts) * (2 ** (rung + 1) - 1) / (2**num_rungs - 1)) for rung in range(num_rungs)]
    return [list(prompts[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(slots=True)
class SearchOutcome:
    """search_prompts, judge_prompts: that chose the finalists, and that judged them. dropped: why a candidate was not
    judged, by name. was_complete: all that was planned was measured."""

    search_prompts: list[int] = field(default_factory=list)
    judge_prompts: list[int] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    was_complete: bool = True


class Search:
    """One search with `candidates` by name, in the order in which they are dropped last where time is short."""

    def __init__(
        self,
        run: Run,
        candidates: Sequence[Candidate],
        search_prompts: Sequence[int],
        judge_prompts: Sequence[int],
        min_retention: float,
        num_finalists: int,
    ) -> None:
        self._run = run
        self._candidates = {candidate.name: candidate for candidate in candidates}
        self._shares = rung_prompts(search_prompts)
        self._judge_prompts = judge_prompts
        self._min_retention = min_retention
        self._num_finalists = num_finalists

    def run(self) -> SearchOutcome:
        store, found = self._run.store, SearchOutcome()
        names, until = self._begin()
        found.dropped = {name: "not tried for lack of time" for name in self._candidates if name not in names}
        known: dict[str, Standing] = {}
        for number, prompts in enumerate(self._shares):
            if number and len(names) <= self._num_finalists + 1:
                break  # with plain decoding: all of them can be judged
            plan = self._plan(f"{SEARCH} {number}", names, prompts)
            is_over = any(name in store.plans for name in (f"{SEARCH} {number + 1}", JUDGE))
            rung_until = self._rung_until(until, len(self._shares) - number)
            found.was_complete &= self._run.measure(plan, self._candidates, SEARCH, rung_until, is_over)
            known = self._standings(plan.candidates, number + 1)
            rung = halve(known, self._min_retention, self._num_finalists)
            found.dropped |= rung.dropped
            names = rung.kept
        left = {name: known[name] for name in names}
        finalists = choose_finalists(left, self._min_retention, self._num_finalists)
        found.dropped |= dict.fromkeys(names, "not among the finalists")
        found.was_complete &= len(store.plans[f"{SEARCH} 0"].candidates) == len(self._candidates)
        found.search_prompts = _prompts(store.outcomes(), SEARCH)
        # What the search left unread may judge, too.
        unread = [index for share in self._shares for index in share if index not in found.search_prompts]
        plan = self._plan(JUDGE, list(dict.fromkeys((PLAIN, DEFAULT, *finalists))), [*self._judge_prompts, *unread])
        found.was_complete &= self._run.measure(
            plan, self._candidates, JUDGE, self._run.clock.budget, is_over=store.is_finished
        )
        store.finish()
        found.judge_prompts = _prompts(store.outcomes(), JUDGE)
        return found

    def _begin(self) -> tuple[list[str], float | None]:
        """Which candidates there is time for, and when the search must end, in seconds of the run's clock."""
        clock, names = self._run.clock, list(self._candidates)
        plans = self._run.store.plans
        first = plans.get(f"{SEARCH} 0")
        if clock.budget is None or JUDGE in plans:  # no end, or past it
            return names if first is None else list(first.candidates), clock.budget
        usual = [self._candidates[name] for name in (PLAIN, DEFAULT)]
        opening, answering = self._run.probe(usual, self._shares[0])
        num_blocks = math.ceil(len(self._judge_prompts) / self._run.block_size)
        judging = answering * num_blocks * (self._num_finalists + len(usual))
        until = max(clock.budget * LEAST_FOR_SEARCH, clock.budget - judging)
        if first is not None:
            return list(first.candidates), until
        count = int(FIRST_RUNG * (until - clock.elapsed) / (opening + answering))
        return names[: max(MIN_CANDIDATES, count)], until

    def _plan(self, name: str, candidates: Sequence[str], prompts: Sequence[int]) -> Plan:
        """The one in the store, where there is one."""
        if name not in self._run.store.plans:
            self._run.store.add_plan(Plan(name, list(candidates), list(prompts)))
        return self._run.store.plans[name]

    def _rung_until(self, until: float | None, num_rungs: int) -> float | None:
        """An equal share of what is left of the search's time."""
        elapsed = self._run.clock.elapsed
        return None if until is None else elapsed + max(0.0, until - elapsed) / num_rungs

    def _standings(self, names: Sequence[str], num_rungs: int) -> dict[str, Standing]:
        blocks = self._run.store.blocks(f"{SEARCH} {number}" for number in range(num_rungs))
        return standings({name: self._candidates[name] for name in names}, blocks)


def _prompts(outcomes: Sequence[Outcome], stage: Stage) -> list[int]:
    """Those that a stage has read, in the order of the file."""
    return sorted({outcome.prompt_index for outcome in outcomes if outcome.stage == stage})
