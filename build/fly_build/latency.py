"""How fast a stack of models is, each of which drafts for the next, and which stack is the fastest: arithmetic alone.

The lowest model decodes token by token; each one above verifies N tokens of the one below in a step of N + 1. Where a
token of the one below stands with probability a, independently of the others, that step brings E(a, N) tokens:

    E(a, N) = 1 + a + ... + a^N
    t(0) = c_0(1)
    t(i) = (N t(i-1) + c_i(N + 1)) / E(a, N)

with t the time of a token and c(m) that of a step of m tokens. What a level writes is that level's own text, so that
only neighbours count. The stack as a shortest path: arXiv 2510.19705, whose own expression for the latency is not the
source of this one.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_MODELS = 4
MIN_LENGTH, MAX_LENGTH = 2, 25


@dataclass(frozen=True, slots=True)
class StepTime:
    """What a step of a model takes: with one token, and what each further token adds, in any one unit."""

    single: float
    further: float

    def of(self, num_tokens: int) -> float:
        return self.single + self.further * (num_tokens - 1)


@dataclass(frozen=True, slots=True)
class Stack:
    """Models by index, the target last; how many tokens each but the last is asked for at a time; time per token."""

    models: tuple[int, ...]
    lengths: tuple[int, ...]
    time_per_token: float


def expected_tokens(acceptance: float, num_draft: int) -> float:
    """Tokens that the verification of `num_draft` tokens brings, the verifier's own included."""
    return sum(acceptance**n for n in range(num_draft + 1))


def time_per_token(steps: Sequence[StepTime], acceptance: Sequence[float], lengths: Sequence[int]) -> float:
    """Of the last of the models with these step times, each of which has `lengths` tokens of the one before it verified
    with the chance `acceptance`: both have one entry less than `steps`."""
    time = steps[0].of(1)
    for step, chance, length in zip(steps[1:], acceptance, lengths, strict=True):
        time = (length * time + step.of(length + 1)) / expected_tokens(chance, length)
    return time


def best_lengths(
    models: tuple[int, ...],
    steps: Sequence[StepTime],
    acceptance: Mapping[tuple[int, int], float],
    longest: Sequence[int],
) -> Stack:
    """The fastest stack of these models. acceptance: by (lower, upper) model; longest: tokens that each model verifies
    at most, MAX_LENGTH or fewer."""
    pairs = list(itertools.pairwise(models))
    chances = [acceptance[pair] for pair in pairs]
    ranges = [range(min(MIN_LENGTH, longest[upper]), min(MAX_LENGTH, longest[upper]) + 1) for _, upper in pairs]
    used = [steps[model] for model in models]
    timed = ((time_per_token(used, chances, lengths), lengths) for lengths in itertools.product(*ranges))
    time, lengths = min(timed)
    return Stack(models, lengths, time)


def best_stack(steps: Sequence[StepTime], acceptance: Mapping[tuple[int, int], float], longest: Sequence[int]) -> Stack:
    """The fastest of all stacks of up to MAX_MODELS models that end with the last one, which is the target. Those with
    a pair that `acceptance` does not have are left out."""
    *lower, target = range(len(steps))
    stacks = [
        best_lengths((*chosen, target), steps, acceptance, longest)
        for count in range(min(len(lower), MAX_MODELS - 1) + 1)
        for chosen in itertools.combinations(lower, count)
        if all(pair in acceptance for pair in itertools.pairwise((*chosen, target)))
    ]
    return min(stacks, key=lambda stack: stack.time_per_token)
