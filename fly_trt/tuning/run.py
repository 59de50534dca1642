"""The measuring of a run: plans of candidates and prompts, block by block, within a budget of time, into a store.

Candidates of a plan answer the prompts by turns, so that a slow minute of the machine hits all of them. A block is one
prompt, or under a load several; it is stored when all candidates have answered it, and what is in the store is not
measured again. This module knows time and turns; which candidates there are and what follows from it is decided above.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fly_trt.benchmark.client import Exchange
from fly_trt.benchmark.likelihood import Likelihood
from fly_trt.engines.turn import Turn
from fly_trt.text.prompts import Prompt
from fly_trt.tuning.quality import Judge, Score
from fly_trt.tuning.result import Candidate, Outcome, Stage
from fly_trt.tuning.store import Plan, Store
from fly_trt.tuning.trials import Trials

PROMPTS_PER_SLOT = 2  # of a block under a load


@dataclass(frozen=True, slots=True)
class Progress:
    """what: the plan at work. done, total: blocks of it. num_candidates: that are left. seconds_left: of the budget,
    None without one."""

    what: str
    done: int
    total: int
    num_candidates: int
    seconds_left: float | None


Report = Callable[[Progress], None]


class Clock:
    """Seconds that a run took, those of earlier processes included, and what is left of its budget in minutes."""

    def __init__(self, elapsed: float, budget: float | None, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self._started = now() - elapsed
        self.budget = None if budget is None else budget * 60

    @property
    def elapsed(self) -> float:
        return self.now() - self._started

    @property
    def left(self) -> float | None:
        return None if self.budget is None else self.budget - self.elapsed


class Assessor:
    """Has answers scored by a judge, while nobody else runs the engines that it may read with."""

    def __init__(self, judge: Judge, likelihood: Likelihood, turn: Turn) -> None:
        self._judge = judge
        self._likelihood = likelihood
        self._turn = turn

    def scores(self, answers: Sequence[tuple[int, Exchange]]) -> list[Score]:
        """Of answers to prompts by index; those of the same prompt are neighbours, which reads them quicker."""
        with self._turn.held():
            self._likelihood.forget()  # candidates have written to the caches since
            return self._judge.scores(answers)


class Run:
    """Measures what is asked for and not yet in the store. prompts: as the file has them, each an index. budget: in
    minutes. now: a clock's seconds."""

    def __init__(
        self,
        trials: Trials,
        store: Store,
        assessor: Assessor,
        prompts: Sequence[Prompt],
        budget: float | None,
        report: Report,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.store = store
        self.clock = Clock(store.elapsed, budget, now)
        self._trials = trials
        self._assessor = assessor
        self._prompts = prompts
        self.block_size = 1 if trials.concurrency == 1 else PROMPTS_PER_SLOT * trials.concurrency
        self._report = report

    def probe(self, candidates: Sequence[Candidate], prompts: Sequence[int]) -> tuple[float, float]:
        """Seconds that one of the candidates takes on average to be opened, and to answer the first block of `prompts`.
        What is measured here is forgotten."""
        given = [self._prompts[index] for index in prompts[: self.block_size]]

        def seconds() -> float:
            started = self.clock.now()
            for candidate in candidates:
                self._trials.answer(candidate, given)
            return (self.clock.now() - started) / len(candidates)

        seconds()  # loads the engines
        answering = seconds()
        self._trials.keep([])
        opening = max(0.0, seconds() - answering)
        self._trials.keep([])
        return opening, answering

    def measure(
        self, plan: Plan, candidates: Mapping[str, Candidate], stage: Stage, until: float | None, is_over: bool
    ) -> bool:
        """Every block of the plan that was not measured yet, but the first one until the clock shows `until` seconds,
        and none where it `is_over`: a later plan was begun. Returns whether all of it is measured."""
        order = [candidates[name] for name in plan.candidates]
        blocks = [plan.prompts[at : at + self.block_size] for at in range(0, len(plan.prompts), self.block_size)]
        for number, block in enumerate(blocks):
            self._say(plan, number, len(blocks))
            if self.store.has(plan.name, number):
                continue
            is_late = until is not None and number > 0 and self.clock.elapsed > until
            if is_over or is_late:
                return False
            self._trials.keep(order)
            turn = number % len(order)

            def say(done: int = number) -> None:
                self._say(plan, done, len(blocks))

            outcomes = self._block(order[turn:] + order[:turn], block, stage, say)
            self.store.add_outcomes(plan.name, number, outcomes, self.clock.elapsed)
        self._say(plan, len(blocks), len(blocks))
        return True

    def _block(
        self, candidates: Sequence[Candidate], block: Sequence[int], stage: Stage, say: Callable[[], None]
    ) -> list[Outcome]:
        """Every candidate's answers, the first prompt's first."""
        prompts = [self._prompts[index] for index in block]
        answered: list[tuple[int, str, Exchange]] = []
        for candidate in candidates:
            exchanges = self._trials.answer(candidate, prompts)
            answered += [(index, candidate.name, exchange) for index, exchange in zip(block, exchanges, strict=True)]
            say()
        answered.sort(key=lambda one: block.index(one[0]))
        scores = self._assessor.scores([(index, exchange) for index, _, exchange in answered])
        return [
            Outcome(
                candidate=name,
                prompt_index=index,
                stage=stage,
                repetition=0,
                num_tokens=len(exchange.token_ids),
                seconds=exchange.latency,
                num_loosened=exchange.metrics.num_loosened_tokens,
                token_ids=exchange.token_ids,
                score=score.value,
                log_likelihood=score.log_likelihood,
            )
            for (index, name, exchange), score in zip(answered, scores, strict=True)
        ]

    def _say(self, plan: Plan, done: int, total: int) -> None:
        self._report(Progress(plan.name, done, total, len(plan.candidates), self.clock.left))
