"""What a run of fly-tune measured, line by line in a file, so that one that was killed at any moment goes on there.

A line is whole or not there: the last one of a killed process is cut off. It knows the records of a run and who made
them; it decides nothing.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fly_trt.errors import ConfigError, one_line
from fly_trt.files import lock_file
from fly_trt.tuning.result import Outcome

FORMAT = "fly-tune 1"


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Which candidates answer which prompts next. name: "search 0", "search 1", ..., "judge"; a plan ends where the
    next one begins."""

    name: str
    candidates: Sequence[str]
    prompts: Sequence[int]


class Store:
    """The plans and outcomes of one run, in memory and in the file `path`, or in memory alone.

    identity: what the measurements depend on, by name. Raises ConfigError for a file of another run, which it names,
    for one that another process writes, and for what is no such file; OSError where it cannot be written.
    elapsed: seconds that the run took so far, over all processes.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.plans: dict[str, Plan] = {}
        self.elapsed = 0.0
        self.is_finished = False
        self.was_continued = False
        self._outcomes: dict[tuple[str, int], list[Outcome]] = {}
        self._file = None
        identity = json.loads(json.dumps(identity))
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            if not lock_file(self._file.fileno()):
                raise ConfigError(f"{path}: another fly-tune writes it: wait for it, or give another --state")
            self._read(path, identity)
        except BaseException:
            self._file.close()
            raise

    def add_plan(self, plan: Plan) -> None:
        self.plans[plan.name] = plan
        self._write({"plan": dataclasses.asdict(plan)})

    def has(self, plan: str, block: int) -> bool:
        """Whether this block of a plan's prompts was measured."""
        return (plan, block) in self._outcomes

    def outcomes(self) -> list[Outcome]:
        return [outcome for block in self.blocks(self.plans) for outcome in block]

    def add_outcomes(self, plan: str, block: int, outcomes: Sequence[Outcome], elapsed: float) -> None:
        self._outcomes[plan, block] = list(outcomes)
        self.elapsed = elapsed
        names = [one.name for one in dataclasses.fields(Outcome)]
        records = [{name: getattr(outcome, name) for name in names} for outcome in outcomes]  # asdict copies all tokens
        self._write({"measured": plan, "block": block, "elapsed": elapsed, "outcomes": records})

    def finish(self) -> None:
        """Nothing is left to be measured."""
        if not self.is_finished:
            self.is_finished = True
            self._write({"finished": True})

    def blocks(self, plans: Iterable[str]) -> list[list[Outcome]]:
        """What was measured of these plans, in their order."""
        wanted = {name: place for place, name in enumerate(plans)}
        keys = sorted((key for key in self._outcomes if key[0] in wanted), key=lambda key: (wanted[key[0]], key[1]))
        return [self._outcomes[key] for key in keys]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path, identity: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            begun = json.dumps({"format": FORMAT})[:-1].encode()
            if not begun.startswith(content[: len(begun)]):
                raise ConfigError(f"{path}: not a state of fly-tune: give another --state")
            self._file.truncate(0)
            self._write({"format": FORMAT, "identity": identity})
            return
        try:
            records = [json.loads(line) for line in whole.splitlines()]
            _check_header(path, records[0], identity)
            for record in records[1:]:
                self._take(record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: not a state of fly-tune ({one_line(error)}): give another --state") from None
        self._file.truncate(len(whole))
        self.was_continued = len(records) > 1

    def _take(self, record: Mapping[str, Any]) -> None:
        if "plan" in record:
            plan = Plan(**record["plan"])
            self.plans[plan.name] = plan
        elif "measured" in record:
            found = [Outcome(**outcome) for outcome in record["outcomes"]]
            self._outcomes[record["measured"], record["block"]] = found
            self.elapsed = float(record["elapsed"])
        else:
            self.is_finished = record["finished"]

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()


def _check_header(path: Path, header: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise ConfigError(f"{path}: not a state of this fly-tune: give another --state")
    for name, value in identity.items():
        if (held := header["identity"].get(name)) != value:
            held, value = _differing(held, value)
            raise ConfigError(
                f"{path}: a run with another {name} ({_short(held)}, now {_short(value)}): give another --state, or "
                "remove the file to begin again"
            )


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two objects what they do not share, which a short text may have room for."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one, other
    shared = {key for key in one.keys() & other.keys() if one[key] == other[key]}
    first, second = ({key: value for key, value in each.items() if key not in shared} for each in (one, other))
    return first, second


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
