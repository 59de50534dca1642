"""Tables of outcomes as fly-tune would have measured them, from candidates whose true quality and speed are known."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fly_trt.tuning.result import DEFAULT, PLAIN, Candidate, Outcome, Stage

TOKENS = 20  # of an answer
SAME, OTHER = [1, 2], [1, 3]  # as the target's or not; a few stand for all


@dataclass(frozen=True)
class Simulated:
    """speed: over plain decoding, in truth. loss: share of the target's right answers that are lost; gain: of its wrong
    ones that are mended; lossless where both are None."""

    name: str
    speed: float
    loss: float | None = None
    gain: float = 0.0

    @property
    def candidate(self) -> Candidate:
        if self.name == PLAIN:
            return Candidate(PLAIN, {"method": None}, is_lossless=True)
        is_lossless = self.loss is None
        policy = "exact" if is_lossless else "fly"
        settings = {} if self.name == DEFAULT else {"method": "draft_model", "acceptance": policy}
        return Candidate(self.name, settings, drafter="draft_model", policy=policy, is_lossless=is_lossless)

    def retention(self, share_right: float) -> float:
        """In truth, where the target gets this share of the prompts right."""
        return 1 - (self.loss or 0.0) + self.gain * (1 - share_right) / share_right


@dataclass(frozen=True)
class Truth:
    """What each candidate would answer to each prompt: right bool [candidates, prompts], seconds [same]."""

    simulated: Sequence[Simulated]
    right: np.ndarray
    seconds: np.ndarray

    @classmethod
    def drawn(
        cls, simulated: Sequence[Simulated], num_prompts: int, random: np.random.Generator, share_right: float = 1.0
    ) -> "Truth":
        """Plain decoding is the first of `simulated`. Candidates lose prompts independently of each other."""
        target = random.random(num_prompts) < share_right
        changes = random.random((len(simulated), num_prompts))
        chance = np.where(target, [[one.loss or 0.0] for one in simulated], [[one.gain] for one in simulated])
        work = random.uniform(0.5, 1.5, num_prompts)  # of a prompt, the same for all
        noise = random.normal(1, 0.02, changes.shape)
        return cls(simulated, target ^ (changes < chance), work * noise / [[one.speed] for one in simulated])

    def outcome(self, number: int, prompt: int, stage: Stage) -> Outcome:
        is_right, of = bool(self.right[number, prompt]), bool(self.right[0, prompt])
        return Outcome(
            candidate=self.simulated[number].name,
            prompt_index=prompt,
            stage=stage,
            repetition=0,
            num_tokens=TOKENS,
            seconds=float(self.seconds[number, prompt]),
            num_loosened=0 if is_right == of else 2,
            token_ids=SAME if is_right == of else OTHER,
            score=float(is_right),
        )

    def outcomes(self, names: Sequence[str], prompts: Sequence[int], stage: Stage) -> list[Outcome]:
        """By turns."""
        numbers = [number for number, one in enumerate(self.simulated) if one.name in names]
        return [self.outcome(number, prompt, stage) for prompt in prompts for number in numbers]
