"""Perplexity: its windows, and that engine and checkpoint are measured alike."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import perplexity
from fly_trt import FlyError
from perplexity import Losses, Window, round_rows, windows


@pytest.mark.parametrize("prefix", [[], [99]])
def test_every_token_counts_once_and_has_what_the_stride_leaves_before_it(prefix: list[int]) -> None:
    tokens = list(range(23))
    parts = list(windows(tokens, 8, 3, prefix))
    counted = [token for part in parts for token in part.tokens[len(part.tokens) - part.num_new :]]
    assert counted == (tokens if prefix else tokens[1:])
    for part in parts[1:]:
        assert part.tokens[: len(prefix)] == prefix
        assert len(part.tokens) - len(prefix) - part.num_new >= 8 - 3


def test_perplexity_is_that_of_the_tokens_that_count() -> None:
    parts = [Window([1, 2, 3], 2), Window([2, 3, 4], 1)]
    given = {(1, 2, 3): [math.log(0.5), math.log(0.25)], (2, 3, 4): [math.log(0.001), math.log(0.125)]}
    losses = perplexity.read(lambda tokens: given[tuple(tokens)], parts, lambda line: None)
    assert losses.perplexity().value == pytest.approx((2 * 4 * 8) ** (1 / 3))


def test_log_probabilities_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(FlyError, match="are not numbers"):
        perplexity.read(lambda tokens: [math.nan], [Window([1, 2], 1)], lambda line: None)


def test_the_standard_error_is_how_far_the_means_of_other_draws_lie_apart() -> None:
    """Windows of different lengths, of which each has a level of its own."""
    rng = np.random.default_rng(0)

    def draw() -> Losses:
        sizes = rng.integers(20, 60, 30)
        return Losses([size * rng.normal(3, 0.4) + rng.normal(0, size**0.5) for size in sizes], sizes.tolist())

    means = [draw().mean() for _ in range(2000)]
    spread = np.std([mean.value for mean in means])
    assert np.mean([mean.error for mean in means]) == pytest.approx(spread, rel=0.05)
    assert math.isnan(Losses([3.0], [2]).mean().error)


def test_what_two_engines_have_in_common_does_not_count_in_their_difference() -> None:
    rng = np.random.default_rng(1)
    counts, shared = [50] * 40, rng.normal(150, 30, 40)
    first = Losses(shared.tolist(), counts)
    own = rng.normal(0.5, 0.2, 40)
    second = Losses((shared + own).tolist(), counts)
    value, error = second.difference(first)
    assert value == pytest.approx(100 * math.expm1(own.mean() / 50))
    assert error == pytest.approx(100 * math.exp(own.mean() / 50) * own.std(ddof=1) / 40**0.5 / 50)
    assert error < 0.01 * 100 * first.mean().error
    assert first.difference(first) == (0, 0)


def test_engines_stand_beside_the_first_of_them() -> None:
    found = {"checkpoint": Losses([4.0, 5.0], [2, 2]), "a": Losses([4.2, 5.2], [2, 2]), "b": Losses([4.4, 5.6], [2, 2])}
    record = perplexity.as_record(SimpleNamespace(engine=[Path("a"), Path("b")]), found)
    assert (record["num_tokens"], record["num_windows"]) == (4, 2)
    assert ["percent_above_first_engine" in model for model in record["models"]] == [False, False, True]
    _, checkpoint, *_, b = perplexity.as_lines(record)
    assert checkpoint == "   9.488 +- 2.372   checkpoint"
    assert b.endswith("  b: +16.18 % +- 5.81 % to the first engine")
    one = perplexity.as_record(SimpleNamespace(engine=[]), {"checkpoint": Losses([2.0], [2])})
    assert one["models"] == [{"name": "checkpoint", "perplexity": pytest.approx(math.e), "perplexity_error": None}]
    assert list(perplexity.as_lines(one))[1] == "   2.718            checkpoint"


def test_rows_are_rounded_to_256_levels_with_zero_among_them() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 400) * torch.tensor([[1e-3], [1.0], [50.0], [1.0], [0.0]])
    weight[3] = weight[3].abs() + 1
    weight[:, 7] = 0
    rounded = round_rows(weight)
    spread = weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)
    assert ((rounded - weight).abs().amax(1) <= spread / 255 * 1.001).all()
    assert (rounded[:, 7] == 0).all()
    assert max(len(row.unique()) for row in rounded) <= 256


def test_an_engine_is_as_good_as_its_checkpoint_and_int8_is_near(
    demo_engine: Path, demo_int8_engine: Path, tmp_path: Path
) -> None:
    pair = Path(__file__).parents[1] / "assets" / "pair"
    text = tmp_path / "text.txt"
    text.write_text((pair / "eval.jsonl").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    args = SimpleNamespace(
        text=text,
        checkpoint=pair / "target",
        engine=[demo_engine, demo_int8_engine],
        weight_only=True,
        num_tokens=300,
        window=64,
        stride=32,
    )
    found = perplexity.measure(args, lambda line: None).values()
    plain, weight_only, float32, int8 = (losses.perplexity().value for losses in found)
    assert plain > 1
    assert float32 == pytest.approx(plain, rel=1e-4)
    assert weight_only != plain
    assert weight_only == pytest.approx(plain, rel=0.05)
    assert int8 != float32
    assert int8 == pytest.approx(plain, rel=0.2)
