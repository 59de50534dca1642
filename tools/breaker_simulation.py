"""How often the circuit breaker trips a good setting, and how soon a bad one, by simulation of its own arithmetic.

usage: tools/breaker_simulation.py [--min-quality 0.98] [--error-rate 0.01] [--seeds 100] [--audits 100000]
       [--recorded FILE.json]

Prints for good settings, whose mean quality is what `good_quality` says or more, in how many of the seeds they were
tripped within so many audits, and for bad ones after how many audits: median, 99th percentile of the seeds, and the
number that `audits_to_trip` promises for 99 of 100. FILE has lists of qualities by the setting's name, drawn from with
replacement; tests/assets/qualities.json are those of answers of the demo pairs and of the real one.

A stream of qualities is judged here as a whole, some hundred times as fast as `QualityWatch` does it audit by audit;
tests/tools/test_breaker_simulation.py holds the two together.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fly_trt.runtime.breaker import DEFAULT_ERROR_RATE, DEFAULT_MIN_QUALITY
from fly_trt.runtime.quality import (
    CONFIDENCE,
    SHARES,
    Verdict,
    audits_to_judge,
    audits_to_trip,
    drop_capital,
    good_quality,
)

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]
"""Qualities of so many answers."""

LOST = -1e3  # what is left of a bet that lost everything, in nats
AT_ONCE = 2048  # audits


def first_verdict(qualities: Floats, min_quality: float, error_rate: float) -> tuple[int, Verdict] | None:
    """After how many audits there is a verdict, and which; None where there is none. qualities: float64 [audits]."""
    dropped = _first_drop(qualities, min_quality, error_rate)
    unproven = _first_unproven(qualities[:dropped], min_quality, error_rate)
    if unproven is not None:
        return unproven, "unproven"
    return None if dropped is None else (dropped, "dropped")


def _first_drop(qualities: Floats, mean: float, error_rate: float) -> int | None:
    """The sum over all starts of the capital since then is one prefix product times a sum of inverse ones."""
    limit = math.log(len(SHARES) * drop_capital(error_rate))
    carried = np.full(len(SHARES), -np.inf)  # the logarithm of that sum
    for start in range(0, len(qualities), AT_ONCE):
        grown = np.cumsum(_log_bet((1 - qualities[start : start + AT_ONCE]) / (1 - mean)), axis=0)
        before = np.vstack([np.zeros(len(SHARES)), grown[:-1]])
        new = np.logaddexp.accumulate(-before, axis=0)
        log_capital = grown + np.logaddexp(carried, new)
        over = np.flatnonzero(_log_sum(log_capital) >= limit)
        if len(over):
            return start + int(over[0]) + 1
        carried = log_capital[-1]
    return None


def _first_unproven(qualities: Floats, mean: float, error_rate: float) -> int | None:
    length = audits_to_judge(mean, error_rate)
    limit = math.log(len(SHARES) / (1 - CONFIDENCE))
    starts = sorted([*range(0, len(qualities), length), *range(length // 2, len(qualities), length)])
    for start in starts:
        period = qualities[start : start + length]
        if len(period) < length:
            break
        log_capital = np.cumsum(_log_bet(period / mean), axis=0)
        if _log_sum(log_capital).max() < limit:
            return start + length
    return None


def _log_sum(log_capital: Floats) -> Floats:
    """[audits]: of all shares."""
    most = log_capital.max(axis=1, keepdims=True)
    total: Floats = most[:, 0] + np.log(np.exp(log_capital - most).sum(axis=1))
    return total


def _log_bet(gains: Floats) -> Floats:
    """[audits, shares]: what each share of a capital makes of it, in nats."""
    with np.errstate(divide="ignore"):
        bets: Floats = np.maximum(np.log1p(SHARES * (gains[:, None] - 1)), LOST)
    return bets


def good_settings(min_quality: float) -> dict[str, Draw]:
    """By name, from easy to the worst that there is of this mean."""
    good = good_quality(min_quality)
    loss = 1 - good
    return {
        "always 1": lambda rng, size: np.ones(size),
        "nearly always 1": lambda rng, size: np.where(rng.random(size) < 0.97, 1.0, rng.uniform(0.7, 1.0, size)),
        "always at the margin": lambda rng, size: np.full(size, good),
        "spread about the margin": lambda rng, size: rng.beta(20 * good, 20 * loss, size),
        "1, or at min_quality": lambda rng, size: np.where(rng.random(size) < 0.75, 1.0, min_quality),
        "a tenth is bad": lambda rng, size: np.where(rng.random(size) < 0.1, max(0.0, 1 - 10 * loss), 1.0),
        "1, or 0 at the margin": lambda rng, size: (rng.random(size) < good).astype(float),
    }


def bad_settings(min_quality: float) -> dict[str, tuple[float, Draw]]:
    """By name, with the mean."""
    settings: dict[str, tuple[float, Draw]] = {
        "always 0.80": (0.80, lambda rng, size: np.full(size, 0.80)),
        "spread about 0.85": (0.85, lambda rng, size: rng.beta(5 * 0.85, 5 * 0.15, size)),
        "half is 1, half 0.5": (0.75, lambda rng, size: np.where(rng.random(size) < 0.5, 1.0, 0.5)),
        "1, or 0: 0.80": (0.80, lambda rng, size: (rng.random(size) < 0.80).astype(float)),
        "1, or 0: 0.50": (0.50, lambda rng, size: (rng.random(size) < 0.50).astype(float)),
    }
    return {name: (mean, draw) for name, (mean, draw) in settings.items() if mean < min_quality}


def recorded(file: Path) -> dict[str, Floats]:
    return {name: np.array(values, float) for name, values in json.loads(file.read_text()).items()}


def drawn_from(values: Floats) -> Draw:
    return lambda rng, size: rng.choice(values, size)


def verdicts(
    draw: Draw, num_seeds: int, num_audits: int, min_quality: float, error_rate: float
) -> list[tuple[int, Verdict] | None]:
    """Of each seed."""
    streams = (draw(np.random.default_rng(seed), num_audits) for seed in range(num_seeds))
    return [first_verdict(stream, min_quality, error_rate) for stream in streams]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--min-quality", type=float, default=DEFAULT_MIN_QUALITY)
    parser.add_argument("--error-rate", type=float, default=DEFAULT_ERROR_RATE)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--audits", type=int, default=100_000)
    parser.add_argument("--recorded", type=Path)
    args = parser.parse_args()
    least, rate = args.min_quality, args.error_rate
    settings = {} if args.recorded is None else recorded(args.recorded)
    good = good_settings(least)
    good |= {name: drawn_from(each) for name, each in settings.items() if each.mean() >= good_quality(least)}
    bad = bad_settings(least)
    bad |= {name: (each.mean(), drawn_from(each)) for name, each in settings.items() if each.mean() < least}
    print(f"min_quality {least:g}, good from {good_quality(least):g} on, error rate {rate:g} in 100,000 audits")
    print(f"a period has {audits_to_judge(least, rate)} audits\n")
    print(f"{'good':<36} tripped, of {args.seeds} seeds with {args.audits:,} audits")
    for name, draw in good.items():
        found = verdicts(draw, args.seeds, args.audits, least, rate)
        print(f"{name:<36} {sum(each is not None for each in found)}", flush=True)
    print(f"\n{'bad':<36} {'mean':>6} {'median':>8} {'99 %':>8} {'promised':>9}")
    for name, (mean, draw) in bad.items():
        promised = audits_to_trip(mean, least, rate)
        found = verdicts(draw, args.seeds, 20 * promised, least, rate)
        counts = [each[0] if each is not None else math.inf for each in found]
        median, most = np.quantile(counts, (0.5, 0.99), method="higher")
        print(f"{name:<36} {mean:>6.3f} {median:>8.0f} {most:>8.0f} {promised:>9}", flush=True)
    between = {name: each.mean() for name, each in settings.items() if least <= each.mean() < good_quality(least)}
    if between:
        print("\nneither good nor bad, so that nothing is promised:", ", ".join(between))


if __name__ == "__main__":
    main()
