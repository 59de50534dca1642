"""The benchmark as a picture: tokens per second of each mode, and how many draft tokens its rounds emitted."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fly_trt.benchmark.results import Row
from fly_trt.errors import ConfigError
from fly_trt.files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
INCHES = (11.0, 3.6)  # of one load
FEW_MODES = 6  # whose names stand side by side


def check_plot(path: Path) -> None:
    """Raises ConfigError for a file that `write_plot` cannot write, so that nobody measures for an hour first."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot {path}: expected a file name that ends in {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plot: matplotlib is not installed: pip install 'fly-trt[bench]'") from None


def write_plot(rows: list[Row], title: str, path: Path) -> None:
    """Writes PNG or SVG, by the suffix of `path`; the file appears whole or not at all."""
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loads = list(dict.fromkeys(row.load for row in rows))
    figure = Figure(figsize=(INCHES[0], INCHES[1] * len(loads)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    modes = list(dict.fromkeys(row.mode for row in rows))
    colours = {mode: f"C{index}" for index, mode in enumerate(modes)}
    for load, (speeds, lengths) in zip(loads, figure.subplots(len(loads), 2, squeeze=False), strict=True):
        own = [row for row in rows if row.load == load]
        _draw_speeds(speeds, own, colours)
        speeds.set_title(str(load))
        _draw_lengths(lengths, own, colours)
    with new_file(path) as file, rc_context({"svg.hashsalt": "fly-trt"}):
        figure.savefig(file, format=path.suffix.lower()[1:], dpi=144)


def _draw_speeds(axes: "Axes", rows: list[Row], colours: dict[str, str]) -> None:
    """Medians as bars, the range over the rounds as spread bars."""
    speeds: list[Any] = [row.tokens_per_second for row in rows]
    medians = [speed.median for speed in speeds]
    below = [speed.median - speed.min for speed in speeds]
    above = [speed.max - speed.median for speed in speeds]
    names = [row.mode for row in rows]
    bars = axes.bar(names, medians, yerr=[below, above], capsize=4, color=[colours[name] for name in names])
    axes.bar_label(bars, fmt="%.4g", label_type="center", color="white")
    axes.set_ylabel("output tokens/s")
    axes.tick_params(axis="x", labelrotation=15 if len(rows) <= FEW_MODES else 90)


def _draw_lengths(axes: "Axes", rows: list[Row], colours: dict[str, str]) -> None:
    """Share of the rounds by acceptance length: the draft tokens that a round emitted, and the target's own."""
    drawn = [row for row in rows if sum(row.acceptance_histogram)]
    for index, row in enumerate(drawn):
        total = sum(row.acceptance_histogram)
        places = [
            length + 1 + (index - (len(drawn) - 1) / 2) * 0.8 / len(drawn)
            for length in range(len(row.acceptance_histogram))
        ]
        shares = [count / total for count in row.acceptance_histogram]
        axes.bar(places, shares, width=0.8 / len(drawn), color=colours[row.mode], label=row.mode)
    axes.set_xlabel("acceptance length")
    axes.set_ylabel("share of speculation rounds")
    if drawn:
        axes.legend()
