"""Where the Pareto chart has its points, lines and ticks: speed to the right, what is kept of the quality upwards.

It knows results and gives numbers in an SVG's user units; how things look is the page's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fly_trt.tuning.report import kept, lower_bound
from fly_trt.tuning.result import DEFAULT, PLAIN, CandidateResult, TuningResult
from fly_trt.tuning.wording import factor

WIDTH, HEIGHT = 800, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 28, 48  # margins
NUM_TICKS = 6
LOWEST = 0.5  # of what is kept: points below are drawn at the edge


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Point:
    """kind: "chosen", "judged" or "searched". name: beside it, of those that a reader looks for. low: where its lower
    bound lies, None without one. is_below: it is drawn at the edge, since it lies below. says: all of it in words."""

    x: float
    y: float
    kind: str
    number: int
    name: str
    low: float | None
    is_below: bool
    says: str


@dataclass(frozen=True, slots=True)
class Chart:
    """front: an SVG path along the candidates that no other one beats in both. asked_at: the retention asked for;
    plain_at: the speed of plain decoding."""

    points: Sequence[Point]
    front: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    asked_at: float
    plain_at: float
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def make_chart(result: TuningResult) -> Chart:
    """Searched points are behind judged ones; each has its candidate's number in the result."""
    shares = [retention(one) for one in result.candidates]
    speeds = [one.speed for one in result.candidates]
    asked = result.settings.min_retention
    bounds = [one.retention.lower for one in result.candidates if one.retention is not None]
    lowest = min(
        [asked, *bounds, *(share for share, one in zip(shares, result.candidates, strict=True) if one.stage == "judge")]
    )
    room = max(1 - max(LOWEST, lowest), 1 - asked)
    y_range = (max(LOWEST, lowest) - 0.1 * room, max(1.0, *shares) + 0.1 * room)
    x_range = (min(1.0, *speeds) - 0.1, max(1.0, *speeds) + 0.15)

    def x(speed: float) -> float:
        return round(LEFT + (speed - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT), 1)

    def y(share: float) -> float:
        inside = min(max(share, y_range[0]), y_range[1])
        return round(TOP + (y_range[1] - inside) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM), 1)

    points = [
        Point(
            x=x(one.speed),
            y=y(share),
            kind=_kind(one, result.verdict.chosen),
            number=number,
            name=one.candidate.name if one.candidate.name in (PLAIN, DEFAULT, result.verdict.chosen) else "",
            low=None if one.retention is None else y(one.retention.lower),
            is_below=share < y_range[0],
            says=describe(one),
        )
        for number, (one, share) in enumerate(zip(result.candidates, shares, strict=True))
    ]
    judged = [
        (x(one.speed), y(share)) for one, share in zip(result.candidates, shares, strict=True) if one.stage == "judge"
    ]
    order = ("searched", "judged", "chosen")
    return Chart(
        points=sorted(points, key=lambda point: order.index(point.kind)),
        front=_front(judged),
        x_ticks=[Tick(x(value), f"{value:g}x") for value in ticks(*x_range)],
        y_ticks=[
            Tick(y(value), f"{100 * value:g} %") for value in ticks(*y_range) if value <= 1 + 1e-9 or max(shares) > 1
        ],
        asked_at=y(asked),
        plain_at=x(1.0),
    )


def retention(result: CandidateResult) -> float:
    """As seen, of its stage; of a target that gets nothing right all is kept."""
    if result.candidate.is_lossless or result.target_quality == 0:
        return 1.0
    return result.quality / result.target_quality


def describe(result: CandidateResult) -> str:
    """A candidate in one line."""
    low = lower_bound(result)
    bound = f", at least {low}" if result.retention is not None else ""
    quality = f", keeps {kept(result)}{bound}" if result.candidate.name != PLAIN else ""
    return f"{result.candidate.name}: {factor(result.speed)} plain decoding{quality}; {result.verdict}"


def ticks(low: float, high: float) -> list[float]:
    """Round values within a range, about NUM_TICKS of them."""
    rough = (high - low) / NUM_TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _kind(result: CandidateResult, chosen: str) -> str:
    if result.candidate.name == chosen:
        return "chosen"
    return "judged" if result.stage == "judge" else "searched"


def _front(points: Sequence[tuple[float, float]]) -> str:
    """Steps from the best quality to the greatest speed; y grows downwards."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    best.reverse()
    if not best:
        return ""
    steps = "".join(f" H{one[0]:g} V{other[1]:g} H{other[0]:g}" for one, other in pairwise(best))
    return f"M{best[0][0]:g} {best[0][1]:g}{steps}"
