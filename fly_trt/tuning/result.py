"""What tuning is about and what it found: candidates, single outcomes, and the result, which JSON can hold.

It knows plain values. How candidates are searched, run, scored and judged is told elsewhere; a report needs nothing but
what is here.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from fly_trt.errors import ConfigError

SCHEMA_VERSION = 1
PLAIN = "plain"  # the candidate that is the target's own greedy decoding: the baseline of quality and speed
DEFAULT = "default"  # the candidate that is the engine directory as it is

Stage = Literal["search", "judge"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting. settings: overrides of SpeculativeConfig. drafter, policy, preset: what they come to. is_lossless: a
    greedy answer is the target's own, by construction, so that no claim about its quality is needed."""

    name: str
    settings: Mapping[str, Any]
    drafter: str | None = None
    policy: str = "exact"
    preset: str | None = None
    is_lossless: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """One prompt answered once. prompt_index: among the texts of the file. repetition: those of all candidates are
    neighbours in time. seconds: from sending to the last token. num_loosened: tokens that the target did not choose.
    score: in 0..1. log_likelihood: of the answer under the target, in nats, where the judge reads it."""

    candidate: str
    prompt_index: int
    stage: Stage
    repetition: int
    num_tokens: int
    seconds: float
    num_loosened: int
    token_ids: Sequence[int]
    score: float
    log_likelihood: float | None = None


@dataclass(frozen=True, slots=True)
class RetentionBound:
    """A candidate's mean score relative to the target's, on the same prompts.

    estimate: as seen. lower: with `confidence` the true one is not below it, for all `num_looks` candidates at once.
    method: how it was found. num_lost, num_gained: prompts on which the candidate scored less and more than the target.
    num_prompts_needed: to claim the retention that was asked for, at the loss that was seen; num_prompts_without_loss:
    the same if no loss is seen. None where not even very many would do. mcnemar_p: exact, one-sided, of as many losses
    by chance; bootstrap_lower: of a paired bootstrap. Both are for the reader and decide nothing.
    """

    estimate: float
    lower: float
    confidence: float
    num_looks: int
    num_prompts: int
    num_lost: int
    num_gained: int
    num_prompts_without_loss: int | None
    num_prompts_needed: int | None
    method: str
    mcnemar_p: float | None = None
    bootstrap_lower: float | None = None


@dataclass(frozen=True, slots=True)
class SpeedRatio:
    """Tokens per second relative to another candidate's, on the same prompts: as seen, and a paired 90 % interval
    over the prompts."""

    estimate: float
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """What became of a candidate. stage: the last one that it took part in. num_prompts: that it answered there; all
    figures are of them. quality: mean score, target_quality: the target's. same_answers: share of the prompts with the
    target's own tokens. common_prefix: tokens before the first difference, of 1, mean over prompts.
    perplexity_ratio: over the target's own answers. retention: of finalists that are loose. verdict: in a few words."""

    candidate: Candidate
    stage: Stage
    num_prompts: int
    num_tokens: int
    tokens_per_second: float
    over_plain: SpeedRatio | None
    over_default: SpeedRatio | None
    quality: float
    target_quality: float
    loosened_per_100: float
    same_answers: float
    common_prefix: float
    perplexity_ratio: float | None
    retention: RetentionBound | None
    verdict: str = ""

    @property
    def speed(self) -> float:
        """Relative to plain decoding, as seen."""
        return 1.0 if self.over_plain is None else self.over_plain.estimate

    @property
    def is_faster_than_plain(self) -> bool:
        """Surely so."""
        return self.over_plain is not None and self.over_plain.lower > 1

    def qualifies(self, min_retention: float) -> bool:
        """Whether nothing has to be claimed of it, or the claim holds."""
        return self.candidate.is_lossless or (self.retention is not None and self.retention.lower >= min_retention)


@dataclass(frozen=True, slots=True)
class TuningSettings:
    """What was asked. prompts: the file. judged_by: checks, references, command or agreement. extra: what else the run
    was told, by name."""

    prompts: str
    prompts_sha256: str
    num_prompts: int
    judged_by: str
    min_retention: float
    confidence: float
    seed: int
    max_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)


VerdictKind = Literal["found", "default_stays", "too_few_prompts", "nothing_qualifies", "nothing_pays"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """chosen: the fastest candidate that qualifies, by name. sentences: what was found and what is claimed of it.

    kind: "found"; "default_stays", where the engine's own setting is the one; else plain decoding is, because
    "too_few_prompts" judge to claim anything of the faster ones, "nothing_qualifies" of them, or "nothing_pays".
    """

    kind: VerdictKind
    chosen: str
    sentences: Sequence[str]


@dataclass(frozen=True, slots=True)
class TuningResult:
    """All of a run. candidates: in the order of the report. search_prompts, judge_prompts: indices of the prompts that
    chose the finalists, and of those that judged them. engine, machine, versions: as fly-bench has them. was_complete:
    the search had the time that it wanted."""

    settings: TuningSettings
    candidates: Sequence[CandidateResult]
    verdict: Verdict
    search_prompts: Sequence[int]
    judge_prompts: Sequence[int]
    engine: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str
    seconds: float
    was_complete: bool = True
    schema_version: int = SCHEMA_VERSION

    @property
    def chosen(self) -> CandidateResult:
        return next(one for one in self.candidates if one.candidate.name == self.verdict.chosen)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ConfigError for what is no result of this version."""
        try:
            record = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"tuning result: not JSON ({error}): give what fly-tune --json wrote") from None
        version = record.get("schema_version") if isinstance(record, dict) else None
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"tuning result: schema_version {version!r}, expected {SCHEMA_VERSION}: give what fly-tune --json of "
                "this version wrote"
            )
        try:
            read: Self = _read(cls, record)
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"tuning result: {error}: give what fly-tune --json wrote, unchanged") from None
        return read


def _read(kind: Any, value: Any) -> Any:
    """A value of JSON as the dataclasses have it."""
    if get_origin(kind) in (Union, UnionType):
        inner = [one for one in get_args(kind) if one is not NoneType]
        return None if value is None else _read(inner[0], value)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{value!r}, expected an object")
        hints = get_type_hints(kind)
        if unknown := value.keys() - hints.keys():
            raise ValueError(f"unknown key {min(unknown)!r}")
        return kind(**{name: _read(hints[name], given) for name, given in value.items()})  # type: ignore[operator]
    if get_origin(kind) is Sequence:
        (inner_kind,) = get_args(kind)
        return [_read(inner_kind, one) for one in value]
    return value
