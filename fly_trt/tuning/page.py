"""A result of tuning as one HTML page that needs nothing else: no network, no second file, and to be read no script.

The page is drawn here; its script sorts the table and shows what the mouse or the keyboard points at. A
Content-Security-Policy in it lets nothing else run. The same result gives the same bytes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fly_trt.files import new_file
from fly_trt.inspection.page import content_policy
from fly_trt.tuning.chart import make_chart, retention
from fly_trt.tuning.quality import KINDS
from fly_trt.tuning.report import NOTHING, heading, kept, perplexity, speed
from fly_trt.tuning.result import CandidateResult, SpeedRatio, TuningResult
from fly_trt.tuning.wording import factor, percent

FOLDER = Path(__file__).parent / "page"
STAGES = {"judge": "prompts that did not choose it", "search": "prompts that chose"}
TITLES = {
    "found": "A faster setting was found",
    "default_stays": "The engine's default is the fastest that qualifies",
    "too_few_prompts": "Too few prompts to claim anything faster",
    "nothing_qualifies": "Nothing faster keeps enough",
    "nothing_pays": "No speculation surely pays here",
}


def write_page(result: TuningResult, path: Path) -> None:
    """The file appears whole or not at all."""
    with new_file(path) as file:
        file.write_text(make_page(result), encoding="utf-8")


def make_page(result: TuningResult) -> str:
    """The page, to be written as UTF-8."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    rows = [{name: cell(one) for name, cell in COLUMNS.items()} for one in result.candidates]
    templates = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    return templates.get_template("page.html").render(
        policy=content_policy(script, style),
        style=Markup(style),
        script=Markup(script),
        title=TITLES[result.verdict.kind],
        result=result,
        heading=heading(result),
        chosen_settings=_settings(result.chosen.candidate.settings),
        chart=make_chart(result),
        columns=[name for name in COLUMNS if any(row[name].text != NOTHING for row in rows)],
        rows=list(zip(result.candidates, rows, strict=True)),
        evidence=_evidence(result),
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """text: what is read. value: what is sorted by, None for the text. says: of it, where one points at it."""

    text: str
    value: float | None = None
    says: str = ""


# Columns that are empty in every row are left out.
COLUMNS: Mapping[str, Callable[[CandidateResult], Cell]] = {
    "Candidate": lambda one: Cell(one.candidate.name.replace(",", ", "), None, _settings(one.candidate.settings)),
    "Verdict": lambda one: Cell(one.verdict),
    "Drafter": lambda one: Cell(one.candidate.drafter or NOTHING),
    "Policy": lambda one: Cell(one.candidate.policy),
    "Tokens/s": lambda one: Cell(speed(one), one.tokens_per_second, f"{one.num_tokens:,} tokens"),
    "Times plain": lambda one: _ratio(one.over_plain),
    "Times default": lambda one: _ratio(one.over_default),
    "Quality": lambda one: Cell(percent(one.quality), one.quality, f"the target's: {percent(one.target_quality)}"),
    "Kept": lambda one: Cell(kept(one), retention(one), _changes(one)),
    "At least": lambda one: _bound(one),
    "Loose per 100": lambda one: Cell(f"{one.loosened_per_100:.1f}", one.loosened_per_100),
    "Same answers": lambda one: Cell(
        percent(one.same_answers), one.same_answers, f"common prefix: {percent(one.common_prefix)}"
    ),
    "Perplexity ratio": lambda one: Cell(perplexity(one), one.perplexity_ratio or 0.0),
    "Prompts": lambda one: Cell(f"{one.num_prompts}", float(one.num_prompts), STAGES[one.stage]),
}


def _ratio(ratio: SpeedRatio | None) -> Cell:
    if ratio is None:
        return Cell(NOTHING, 0.0)
    interval = f"90 % interval {factor(ratio.lower)} to {factor(ratio.upper)}"
    return Cell(factor(ratio.estimate), ratio.estimate, interval)


def _changes(result: CandidateResult) -> str:
    bound = result.retention
    return "" if bound is None else f"{bound.num_lost} prompts scored lower, {bound.num_gained} higher"


def _bound(result: CandidateResult) -> Cell:
    bound = result.retention
    if bound is None:
        is_lossless = result.candidate.is_lossless
        return Cell(NOTHING, float(is_lossless), "the target's own tokens, by construction" if is_lossless else "")
    said = [f"{bound.method} bound, confidence {percent(bound.confidence)}, {bound.num_looks} judged at once"]
    if bound.mcnemar_p is not None:
        said.append(f"McNemar p {bound.mcnemar_p:.3g}")
    if bound.bootstrap_lower is not None:
        said.append(f"paired bootstrap {percent(bound.bootstrap_lower)}")
    if bound.num_prompts_needed is not None:
        said.append(f"{bound.num_prompts_needed:,} prompts like these would claim what was asked for")
    return Cell(percent(bound.lower), bound.lower, "; ".join(said))


def _evidence(result: TuningResult) -> list[tuple[str, str]]:
    """Names and values; nested ones have their names joined, and those that say nothing are left out."""
    settings = result.settings
    told: dict[str, Any] = {
        "Prompts": settings.prompts,
        "SHA-256 of the prompts": settings.prompts_sha256,
        "Judged by": f"{settings.judged_by}: {KINDS[settings.judged_by].quality}",
        "Prompts that chose": f"{len(result.search_prompts)}: {_ranges(result.search_prompts)}",
        "Prompts that judged": f"{len(result.judge_prompts)}: {_ranges(result.judge_prompts)}",
        "Asked for": f"at least {percent(settings.min_retention)} kept, confidence {percent(settings.confidence)}",
        "Seed": settings.seed,
        "Tokens of an answer at most": settings.max_tokens,
        "Search": "complete" if result.was_complete else "cut short by the budget",
        "Date": result.date,
        "Took": f"{result.seconds / 60:.1f} min",
        "Asked": settings.extra,
        "Engine": result.engine,
        "Machine": result.machine,
        "Version of": result.versions,
    }
    return [(name, value) for key, given in told.items() for name, value in _flat(key, given)]


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name} {key}", inner)
    elif isinstance(value, (list, tuple)):
        yield from _flat(name, ", ".join(map(str, value)))
    elif value not in (None, ""):
        yield name, str(value)


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending, runs of neighbours shortened: 0-3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low}-{high}" if high > low else str(low) for low, high in runs)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in settings.items()) or "as built"
