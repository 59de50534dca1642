"""From a table of outcomes to a verdict: what each candidate costs and brings, and the fastest one that qualifies.

It is a function of the table alone, so that the same outcomes, measured or simulated, have the same verdict. A
candidate qualifies where its tokens are the target's own by construction, or where the lower bound of what it keeps, on
prompts that did not choose it, is at least the retention that was asked for. It must surely be faster than plain
decoding.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from fly_trt.drafting.base import common_prefix
from fly_trt.tuning.quality import KINDS
from fly_trt.tuning.result import (
    DEFAULT,
    PLAIN,
    Candidate,
    CandidateResult,
    Outcome,
    RetentionBound,
    SpeedRatio,
    Stage,
    Verdict,
    VerdictKind,
)
from fly_trt.tuning.statistics import Scores, retention_bound, speed_ratio
from fly_trt.tuning.wording import Wording

NUM_RESAMPLES = 2000  # of a candidate's bootstrap


@dataclass(frozen=True, slots=True)
class Rules:
    """How outcomes are judged. kind: a judge's. num_resamples: of a candidate's bootstrap, of `seed`."""

    kind: str
    min_retention: float = 0.99
    confidence: float = 0.95
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES


@dataclass(frozen=True, slots=True)
class _Answers:
    """One candidate in one stage, by prompt in ascending order. Over the repetitions of a prompt, seconds, tokens and
    loosened tokens are sums and scores are means."""

    prompts: Sequence[int]
    seconds: Scores
    tokens: Scores
    loosened: Scores
    scores: Scores
    log_likelihoods: Scores  # NaN where they were not read
    token_ids: Sequence[Sequence[int]]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "_Answers":
        ordered = sorted(outcomes, key=lambda one: (one.prompt_index, one.repetition))
        by_prompt = [(index, list(group)) for index, group in groupby(ordered, key=lambda one: one.prompt_index)]
        groups = [group for _, group in by_prompt]
        return cls(
            prompts=[index for index, _ in by_prompt],
            seconds=np.array([sum(one.seconds for one in group) for group in groups]),
            tokens=np.array([sum(one.num_tokens for one in group) for group in groups], float),
            loosened=np.array([sum(one.num_loosened for one in group) for group in groups], float),
            scores=np.array([sum(one.score for one in group) / len(group) for group in groups]),
            log_likelihoods=np.array([_or_nan(group[0].log_likelihood) for group in groups]),
            token_ids=[group[0].token_ids for group in groups],
        )

    def on(self, prompts: Sequence[int]) -> "_Answers":
        """Of these alone, all of which it has."""
        place = {index: number for number, index in enumerate(self.prompts)}
        rows = [place[index] for index in prompts]
        return _Answers(
            prompts=prompts,
            seconds=self.seconds[rows],
            tokens=self.tokens[rows],
            loosened=self.loosened[rows],
            scores=self.scores[rows],
            log_likelihoods=self.log_likelihoods[rows],
            token_ids=[self.token_ids[row] for row in rows],
        )


def conclude(
    candidates: Sequence[Candidate],
    outcomes: Sequence[Outcome],
    rules: Rules,
    blocks: Sequence[Sequence[int]] = (),
) -> tuple[list[CandidateResult], Verdict]:
    """All candidates that answered anything, judged ones first and the faster before the slower, and the verdict.

    Among the candidates are PLAIN, which answered every prompt that another one did, and perhaps DEFAULT. Outcomes may
    come in any order. Two candidates are compared on the prompts that both answered in the stage. blocks: prompts that
    each candidate answered in one go, no prompt in two of them: a slow moment has hit all of a block, whose speeds are
    one observation. A prompt that is in none is one by itself.
    """
    block_of = {index: block[0] for block in blocks for index in block}
    table = _by_candidate_and_stage(outcomes)
    num_looks = sum((one.name, "judge") in table and not one.is_lossless for one in candidates)
    answered = {name for name, _ in table}
    results = [_result(one, table, rules, num_looks, block_of) for one in candidates if one.name in answered]
    results.sort(key=lambda one: (one.stage != "judge", -one.speed))
    kind, chosen = _choose(results, rules)
    num_that_chose = len(table[PLAIN, "search"].prompts) if (PLAIN, "search") in table else 0
    wording = Wording(rules.kind, rules.min_retention, num_that_chose, kind, chosen, results)
    told = [dataclasses.replace(one, verdict=wording.of_candidate(one)) for one in results]
    return told, Verdict(kind, chosen, wording.sentences())


def _choose(results: Sequence[CandidateResult], rules: Rules) -> tuple[VerdictKind, str]:
    judged = [one for one in results if one.stage == "judge" and one.candidate.name != PLAIN]
    paying = [one for one in judged if one.is_faster_than_plain]
    able = [one for one in paying if one.qualifies(rules.min_retention)]
    if able:
        best = max(able, key=lambda one: one.speed)
        default = next((one for one in judged if one.candidate.name == DEFAULT), None)
        # One whose speed varies so much that it is not surely faster than plain decoding stays where it looks fastest.
        stays = default is not None and (
            default in able or (default.qualifies(rules.min_retention) and default.speed >= best.speed)
        )
        if stays and not (best.over_default is not None and best.over_default.lower > 1):
            return "default_stays", DEFAULT
        return "found", best.candidate.name
    bounds = [one.retention for one in paying if one.retention is not None]
    if any(bound.num_prompts_needed is not None and bound.estimate >= rules.min_retention for bound in bounds):
        return "too_few_prompts", PLAIN
    return ("nothing_qualifies" if paying else "nothing_pays"), PLAIN


def _by_candidate_and_stage(outcomes: Sequence[Outcome]) -> dict[tuple[str, Stage], _Answers]:
    found: dict[tuple[str, Stage], list[Outcome]] = {}
    for one in outcomes:
        found.setdefault((one.candidate, one.stage), []).append(one)
    return {key: _Answers.of(group) for key, group in found.items()}


def _result(
    candidate: Candidate,
    table: Mapping[tuple[str, Stage], _Answers],
    rules: Rules,
    num_looks: int,
    block_of: Mapping[int, int],
) -> CandidateResult:
    stage: Stage = "judge" if (candidate.name, "judge") in table else "search"
    own = table[candidate.name, stage]
    plain = table[PLAIN, stage].on(own.prompts)
    default = table.get((DEFAULT, stage))
    bound: RetentionBound | None = None
    if stage == "judge" and not candidate.is_lossless and plain.scores.any():
        bound = retention_bound(
            plain.scores,
            own.scores,
            min_retention=rules.min_retention,
            confidence=rules.confidence,
            num_looks=num_looks,
            is_binary=KINDS[rules.kind].is_binary,
            num_resamples=rules.num_resamples,
            seed=rules.seed,
        )
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(own.token_ids, plain.token_ids, strict=True)]
    return CandidateResult(
        candidate=candidate,
        stage=stage,
        num_prompts=len(own.prompts),
        num_tokens=int(own.tokens.sum()),
        tokens_per_second=float(own.tokens.sum() / own.seconds.sum()),
        over_plain=None if candidate.name == PLAIN else _faster(own, plain, block_of),
        over_default=None if default is None or candidate.name == DEFAULT else _faster(own, default, block_of),
        quality=float(own.scores.mean()),
        target_quality=float(plain.scores.mean()),
        loosened_per_100=float(100 * own.loosened.sum() / own.tokens.sum()),
        same_answers=float(np.mean([np.array_equal(a, b) for a, b in pairs])),
        common_prefix=float(np.mean([common_prefix(a, b) / max(len(a), len(b), 1) for a, b in pairs])),
        perplexity_ratio=_perplexity_ratio(own, plain),
        retention=bound,
    )


def _faster(own: _Answers, other: _Answers, block_of: Mapping[int, int]) -> SpeedRatio | None:
    shared = sorted(set(own.prompts) & set(other.prompts))
    if not shared:
        return None
    own, other = own.on(shared), other.on(shared)
    _, block = np.unique([block_of.get(index, index) for index in shared], return_inverse=True)
    samples = (own.seconds, own.tokens, other.seconds, other.tokens)
    return speed_ratio(*(np.bincount(block, sample).astype(float) for sample in samples))


def _perplexity_ratio(own: _Answers, plain: _Answers) -> float | None:
    nll, of = (-one.log_likelihoods.sum() / max(1, sum(map(len, one.token_ids))) for one in (own, plain))
    return None if math.isnan(nll - of) else math.exp(nll - of)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
