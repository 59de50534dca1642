"""A result of tuning as a table for a terminal. It knows results; the sentences beside it are the verdict's own."""

from collections.abc import Callable

from rich import box
from rich.table import Table
from rich.text import Text

from fly_trt.tuning.result import DEFAULT, PLAIN, CandidateResult, SpeedRatio, TuningResult
from fly_trt.tuning.wording import factor, percent

NOTHING = "-"
NAME_WIDTH = 34  # columns of a terminal; a longer name goes on below
MOST_SEARCHED = 10  # that were not judged; JSON and the page have all


def as_table(result: TuningResult) -> Table:
    """A row for each candidate that was judged, and for the fastest of the others."""
    searched = [one for one in result.candidates if one.stage == "search"]
    shown = [one for one in result.candidates if one.stage == "judge"] + searched[:MOST_SEARCHED]
    more = len(result.candidates) - len(shown)
    notes = [f"and {more} that left the search"] if more else []
    if not result.was_complete:
        notes.append("the time was up before all that was planned had been measured")
    table = Table(
        title=heading(result),
        caption="\n".join(notes) or None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("candidate", max_width=NAME_WIDTH, overflow="fold")
    columns = [column for column in COLUMNS if any(column[1](one) != NOTHING for one in shown)]
    for name, _ in columns:
        table.add_column(name, justify="left" if name == "verdict" else "right")
    for one in shown:
        style = "bold" if one.candidate.name == result.verdict.chosen else None
        table.add_row(Text(name_of(one)), *(Text(figure(one)) for _, figure in columns), style=style)
    return table


def heading(result: TuningResult) -> str:
    settings = result.settings
    return (
        f"{settings.prompts}: {len(result.search_prompts)} prompts chose and {len(result.judge_prompts)} judged, by "
        f"{settings.judged_by}, seed {settings.seed}"
    )


def name_of(result: CandidateResult) -> str:
    """What can be broken between lines; of the engine's default also what it is."""
    candidate = result.candidate
    is_default = candidate.name == DEFAULT
    return f"{DEFAULT} ({candidate.drafter}+{candidate.policy})" if is_default else candidate.name.replace(",", ", ")


def kept(result: CandidateResult) -> str:
    """Of the target's quality."""
    if result.candidate.is_lossless:
        return NOTHING if result.candidate.name == PLAIN else "all"
    if result.target_quality == 0:
        return NOTHING
    return percent(result.quality / result.target_quality)


def lower_bound(result: CandidateResult) -> str:
    return NOTHING if result.retention is None else percent(result.retention.lower)


def speed(result: CandidateResult) -> str:
    return f"{result.tokens_per_second:.{0 if result.tokens_per_second >= 100 else 1}f}"


def prompts(result: CandidateResult) -> str:
    return f"{result.num_prompts}" if result.stage == "judge" else f"{result.num_prompts} (search)"


def _times(ratio: SpeedRatio | None) -> str:
    return NOTHING if ratio is None else factor(ratio.estimate)


def _loosened(result: CandidateResult) -> str:
    return NOTHING if result.candidate.is_lossless else f"{result.loosened_per_100:.1f}"


def perplexity(result: CandidateResult) -> str:
    return NOTHING if result.perplexity_ratio is None else f"{result.perplexity_ratio:.3f}"


COLUMNS: tuple[tuple[str, Callable[[CandidateResult], str]], ...] = (
    ("tokens/s", speed),
    ("times\nplain", lambda one: _times(one.over_plain)),
    ("times\ndefault", lambda one: _times(one.over_default)),
    ("quality", lambda one: percent(one.quality)),
    ("kept", kept),
    ("at\nleast", lower_bound),
    ("loose\n/ 100", _loosened),
    ("same\nanswers", lambda one: percent(one.same_answers)),
    ("ppl\nratio", perplexity),
    ("prompts", prompts),
    ("verdict", lambda one: one.verdict),
)
