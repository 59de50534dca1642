"""fly-tune's candidates without engines: what each would answer is known (tuning_tables.Truth), and so is the time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fly_trt.benchmark.client import Exchange
from fly_trt.text.prompts import Prompt
from fly_trt.tuning.quality import Score
from fly_trt.tuning.result import DEFAULT, PLAIN, Candidate
from fly_trt.tuning.run import Run
from fly_trt.tuning.search import Search, SearchOutcome, split_prompts
from fly_trt.tuning.store import Store
from tuning_tables import Simulated, Truth


class SimulatedTrials:
    """Answers as the truth has it, and each answer takes the seconds that it says. interrupt_after: answers, and then
    Ctrl-C. Prompts are lists of one token, their index."""

    concurrency = 1

    def __init__(self, truth: Truth, interrupt_after: int | None = None) -> None:
        self.seconds = 0.0
        self.answers: list[tuple[str, int]] = []
        self._truth = truth
        self._interrupt_after = interrupt_after
        self._numbers = {one.name: number for number, one in enumerate(truth.simulated)}

    def answer(self, candidate: Candidate, prompts: Sequence[Prompt]) -> list[Exchange]:
        if len(self.answers) == self._interrupt_after:
            raise KeyboardInterrupt
        exchanges = []
        for prompt in prompts:
            (index,) = prompt["prompt_token_ids"]
            self.answers.append((candidate.name, index))
            told = self._truth.outcome(self._numbers[candidate.name], index, "search")
            exchange = Exchange(token_ids=list(told.token_ids), text="right" if told.score else "wrong")
            exchange.chunk_times.append(told.seconds)
            exchange.metrics.num_loosened_tokens = told.num_loosened
            exchanges.append(exchange)
            self.seconds += told.seconds
        return exchanges

    def keep(self, candidates: Sequence[Candidate]) -> None:
        """Nothing is open."""


class Words:
    """Scores what SimulatedTrials say."""

    def scores(self, answers: Sequence[tuple[int, Exchange]]) -> list[Score]:
        return [Score(float(exchange.text == "right")) for _, exchange in answers]


def field(*others: Simulated) -> list[Simulated]:
    """With plain decoding and a default of the engine before them."""
    return [Simulated(PLAIN, 1.0), Simulated(DEFAULT, 1.5, loss=0.0), *others]


def draw(simulated: Sequence[Simulated], num_prompts: int = 240, seed: int = 0) -> Truth:
    return Truth.drawn(simulated, num_prompts, np.random.default_rng(seed))


def search(
    truth: Truth,
    trials: SimulatedTrials | None = None,
    state: Path | None = None,
    *,
    budget: float | None = None,
    num_finalists: int = 3,
) -> tuple[SearchOutcome, Store]:
    """One run, over all prompts of the truth."""
    trials = trials or SimulatedTrials(truth)
    num_prompts = truth.right.shape[1]
    prompts: list[Prompt] = [{"prompt_token_ids": [index]} for index in range(num_prompts)]
    choosing, judging = split_prompts(num_prompts, 0)
    with Store(state, {"seed": 0}) as store:
        run = Run(trials, store, Words(), prompts, budget, lambda progress: None, now=lambda: trials.seconds)
        candidates = [one.candidate for one in truth.simulated]
        return Search(run, candidates, choosing, judging, 0.99, num_finalists).run(), store
