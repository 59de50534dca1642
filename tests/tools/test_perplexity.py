"""Perplexity: its windows, and that engine and checkpoint are measured alike."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import perplexity
from perplexity import Window, round_rows, windows


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
    found = perplexity.perplexity(lambda tokens: given[tuple(tokens)], parts, lambda line: None)
    assert found == pytest.approx((2 * 4 * 8) ** (1 / 3))


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
    plain, weight_only, float32, int8 = perplexity.measure(args, lambda line: None).values()
    assert plain > 1
    assert float32 == pytest.approx(plain, rel=1e-4)
    assert weight_only != plain
    assert weight_only == pytest.approx(plain, rel=0.05)
    assert int8 != float32
    assert int8 == pytest.approx(plain, rel=0.2)
