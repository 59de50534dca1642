"""Which blocks are skipped: the knapsack against all subsets, the weights of blocks, and what a draft promises."""

from collections.abc import Iterator, Sequence
from itertools import chain, combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_build.knapsack import BlockTimes, always_kept, candidates, mean_cosine, prospect

FIRST = 10.0


class Orthogonal:
    """Block i adds its own amount along an axis of its own. The cosine of a subset's hidden states to those of all is
    then the quotient of their lengths, so that for each weight the best subset has the largest sum of squares."""

    def __init__(self, amounts: Sequence[float]) -> None:
        self.amounts = amounts
        self.hidden = torch.zeros(2, 3, len(amounts) + 1)
        self.hidden[..., -1] = FIRST

    def run(self, block: int, hidden: torch.Tensor) -> torch.Tensor:
        after = hidden.clone()
        after[..., block] += self.amounts[block]
        return after

    def without(self, skipped: Sequence[int]) -> torch.Tensor:
        hidden = self.hidden
        for block in range(len(self.amounts)):
            hidden = hidden if block in skipped else self.run(block, hidden)
        return hidden


def subsets(blocks: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(blocks, size) for size in range(len(blocks) + 1))


@examples(40)
@given(st.data())
def test_the_best_subset_of_each_weight_is_found(data: st.DataObject) -> None:
    num_blocks = data.draw(st.sampled_from([6, 8, 10]))
    blocks = Orthogonal(
        data.draw(st.lists(st.sampled_from([0.5, 1, 2, 3, 5]), min_size=num_blocks, max_size=num_blocks))
    )
    weights = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    weight_of = [weights[block % 2] for block in range(num_blocks)]
    budget, kept = sum(weights) * num_blocks // 4, always_kept(num_blocks)
    target = blocks.without(())
    best: dict[int, float] = {}
    for subset in subsets([block for block in range(num_blocks) if block not in kept]):
        if (weight := sum(weight_of[block] for block in subset)) <= budget:
            best[weight] = max(best.get(weight, 0.0), mean_cosine(blocks.without(subset), target))
    found = candidates(blocks, blocks.hidden, weight_of, kept, budget)
    assert [sum(weight_of[block] for block in one.skipped) for one in found] == sorted(best)
    for one, cosine in zip(found, map(best.get, sorted(best)), strict=True):
        assert torch.equal(one.hidden, blocks.without(one.skipped))
        assert mean_cosine(one.hidden, target) == pytest.approx(cosine)
        assert kept.isdisjoint(one.skipped)
    again = candidates(blocks, blocks.hidden, weight_of, kept, budget)
    assert [one.skipped for one in again] == [one.skipped for one in found]


def test_what_leaves_the_target_behind_is_dropped() -> None:
    amounts = [1.0] * 8
    amounts[3] = 100.0  # without it the hidden states point elsewhere
    blocks = Orthogonal(amounts)
    found = candidates(blocks, blocks.hidden, [1] * 8, always_kept(8), 4)
    assert all(3 not in one.skipped for one in found)
    assert [len(one.skipped) for one in found] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("attention", "mlp", "weights"),
    [(1.0, 1.0, (1, 1)), (2.6, 1.0, (3, 1)), (1.0, 2.4, (1, 2)), (90.0, 1.0, (5, 1)), (0.0, 1.0, (1, 5))],
)
def test_the_weights_are_the_ratio_of_the_times_at_most_5(
    attention: float, mlp: float, weights: tuple[int, int]
) -> None:
    assert BlockTimes(attention, mlp).weights() == weights


@examples(40)
@given(st.floats(0, 0.99), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 3))
def test_a_draft_promises_the_papers_tokens_per_time(
    agreement: float, attention: float, mlp: float, head: float
) -> None:
    skipped, num_layers = (2, 3, 4), 5
    draft = 3 * attention + 4 * mlp + head
    target = 5 * attention + 5 * mlp + head
    lengths = range(1, 11)
    rates = [
        target * (1 - agreement ** (g + 1)) / (1 - agreement) / (g * draft + target)  # TPT(S, g) in target steps
        for g in lengths
    ]
    found = prospect(agreement, skipped, 2 * num_layers, BlockTimes(attention, mlp, head))
    assert found.tokens_per_step_time == pytest.approx(max(rates))
    assert rates[found.draft_length - 1] == pytest.approx(max(rates))


def test_verified_tokens_cost_something_too() -> None:
    free, dear = (prospect(0.9, (2,), 8, BlockTimes(1.0, 1.0, further_token=cost)) for cost in (0.0, 0.5))
    assert dear.tokens_per_step_time < free.tokens_per_step_time
    certain = prospect(1.0, (2, 3, 4, 5), 8, BlockTimes(1.0, 1.0))
    assert certain.draft_length == 10
    assert certain.tokens_per_step_time == pytest.approx(11 / 6)
