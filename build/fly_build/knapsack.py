"""Which blocks of a target a draft made of the target itself skips, as a knapsack over their times.

It knows hidden states, what runs a block on them, and times in any one unit; it knows no models, texts or files.
Source: KnapSpec (arXiv 2602.20217); the cap of the ratio and the layers that are always kept are its authors' code.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

MAX_RATIO = 5
LEAST_COSINE = 0.5
MAX_DRAFT_LENGTH = 10


class Blocks(Protocol):
    def run(self, block: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., H] after the block, of those before it."""
        ...


@dataclass(frozen=True)
class BlockTimes:
    """What the parts of a step of one token take at some context: one attention, one MLP, the vocabulary projection and
    what else every step has. further_token: what each further token of a step adds, in steps of one token."""

    attention: float
    mlp: float
    head: float = 0.0
    further_token: float = 0.0

    def step(self, num_attentions: int, num_mlps: int) -> float:
        return num_attentions * self.attention + num_mlps * self.mlp + self.head

    def weights(self) -> tuple[int, int]:
        """Of an attention and an MLP, as whole numbers: the lighter one is 1."""
        lighter, heavier = sorted((self.attention, self.mlp))
        ratio = MAX_RATIO if heavier >= MAX_RATIO * lighter else max(1, round(heavier / lighter))
        return (ratio, 1) if self.attention >= self.mlp else (1, ratio)


@dataclass(frozen=True)
class Candidate:
    """Blocks to skip, in order, and the hidden states [..., H] after the last block without them."""

    skipped: tuple[int, ...]
    hidden: torch.Tensor


@dataclass(frozen=True)
class Prospect:
    """What a draft promises: tokens in the time of one target step of one token, with the number of draft tokens a
    round that gives the most of them. Plain decoding has 1."""

    draft_length: int
    tokens_per_step_time: float


def always_kept(num_blocks: int) -> frozenset[int]:
    """The blocks of the first and of the last layer."""
    return frozenset((0, 1, num_blocks - 2, num_blocks - 1))


def candidates(
    blocks: Blocks, hidden: torch.Tensor, weights: Sequence[int], kept: Collection[int], budget: int
) -> list[Candidate]:
    """For each total weight of skipped blocks, 0 .. budget, the set whose hidden states stay nearest to the target's.

    hidden: [..., H] before block 0. weights: of each block, at least 1. kept: blocks that are never skipped. After each
    block, of the sets of one weight the one with the largest sum of cosines to the target's hidden states goes on, and
    none whose mean cosine is below 0.5. What was skipped earlier wins a tie, so that the result is always the same.
    """
    states = {0: Candidate((), hidden)}
    for block, weight in enumerate(weights):
        target = blocks.run(block, states[0].hidden)  # nothing was skipped on the way to it
        best: dict[int, tuple[float, Candidate]] = {0: (1.0, Candidate((), target))}
        for skipped_weight, state in sorted(states.items()):
            options = []
            if skipped_weight:
                options.append((skipped_weight, Candidate(state.skipped, blocks.run(block, state.hidden))))
            if block not in kept and skipped_weight + weight <= budget:
                options.append((skipped_weight + weight, Candidate((*state.skipped, block), state.hidden)))
            for total, option in options:
                cosine = mean_cosine(option.hidden, target)
                if cosine >= LEAST_COSINE and (total not in best or cosine > best[total][0]):
                    best[total] = cosine, option
        states = {total: option for total, (_, option) in best.items()}
    return [option for _, option in sorted(states.items())]


def mean_cosine(hidden: torch.Tensor, target: torch.Tensor) -> float:
    """Over all tokens, of hidden states [..., H]. For one number of tokens it orders as the sum does."""
    return float(torch.cosine_similarity(hidden.double(), target.double(), dim=-1).mean())


def prospect(agreement: float, skipped: Collection[int], num_blocks: int, times: BlockTimes) -> Prospect:
    """TPT(S, g) at its best g. agreement: how often the draft's next token is the target's."""
    num_layers = num_blocks // 2
    num_attentions = num_layers - sum(block % 2 == 0 for block in skipped)
    num_mlps = num_layers - sum(block % 2 == 1 for block in skipped)
    draft = times.step(num_attentions, num_mlps) / times.step(num_layers, num_layers)
    rated = []
    for length in range(1, MAX_DRAFT_LENGTH + 1):
        tokens = sum(agreement**n for n in range(length + 1))
        rated.append((tokens / (length * draft + 1 + length * times.further_token), -length))
    rate, length = max(rated)
    return Prospect(-length, rate)
