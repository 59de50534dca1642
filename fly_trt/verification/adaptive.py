"""AdaSD's verification (arXiv 2512.11280, version 1), on a bound: a draft token stands where the two models' laws are
close, by a threshold that each sequence learns for itself.

The published rule accepts where the Jensen-Shannon distance d of the target's and the draft's law is below T, halfway
between the mean distance of accepted and of rejected tokens. It needs both laws in full. Here d is a lower bound of
that distance, from what both heads say of their k most probable tokens: `named_distance`. It never exceeds the distance
itself, so that it is the more permissive one of the two; with k = 3 it sees what the models disagree on, since whatever
one of them finds probable is named.

The published threshold is fed by its own decisions: what it lets pass counts as accepted, and raises it. Here the two
means are those of positions where draft and target agree and where they differ, whatever was decided; so T depends on
the texts alone. It also has an upper limit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from fly_trt.tokens import FloatArray, IntArray
from fly_trt.verification.policy import AcceptancePolicy, DraftSource, Evidence, HeadInfo, Verdict, decide_each

DEFAULT_MAX_DISTANCE = 0.5

Masses = npt.NDArray[np.float64]


@dataclass(slots=True)
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, values: Masses) -> None:
        self.total += float(values.sum())
        self.count += len(values)

    @property
    def value(self) -> float:
        return self.total / self.count


@dataclass(slots=True)
class _Learnt:
    """Distances where draft and target agreed, and where they differed."""

    agreed: _Mean = field(default_factory=_Mean)
    differed: _Mean = field(default_factory=_Mean)


@dataclass(frozen=True, slots=True)
class AdaptivePolicy(AcceptancePolicy):
    """A draft model's token stands iff it is the target's choice or d < min(T, max_distance), where T is the mean of
    the sequence's mean distance where draft and target agreed and its mean distance where they differed; nothing is
    loosened before there was one of each. Copies have no law, so they are never loosened."""

    max_distance: float = DEFAULT_MAX_DISTANCE
    learnt: _Learnt = field(default_factory=_Learnt, compare=False, repr=False)

    name: ClassVar[str] = "adaptive"
    settings: ClassVar[tuple[str, ...]] = ("adaptive_max_distance",)
    needs_top: ClassVar[bool] = True
    needs_draft_scores: ClassVar[bool] = True

    @classmethod
    def make(cls, settings: Mapping[str, Any], head: HeadInfo) -> Self:
        limit = settings["adaptive_max_distance"]
        return cls(max_distance=DEFAULT_MAX_DISTANCE if limit is None else limit)

    def for_request(self) -> "AdaptivePolicy":
        return replace(self, learnt=_Learnt())

    @property
    def loosens(self) -> frozenset[DraftSource]:
        return frozenset((DraftSource.MODEL,))

    @property
    def threshold(self) -> float:
        """The distance below which a mismatch stands; 0 while nothing was learnt."""
        agreed, differed = self.learnt.agreed, self.learnt.differed
        if not agreed.count or not differed.count:
            return 0.0
        return min((agreed.value + differed.value) / 2, self.max_distance)

    def why(self, evidence: Evidence, position: int) -> str:
        distance, threshold = _distances(evidence, position + 1)[position], self.threshold
        if math.isnan(distance):
            return "no draft model chose it, so its distance is not known"
        if not threshold:
            return f"distance {distance:.2f}, and no threshold is learnt yet"
        side = "under" if distance < threshold else "over"
        return f"distance {distance:.2f}, {side} the threshold of {threshold:.2f}"

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        threshold = self.threshold
        if not threshold:
            return decide_each(evidence, evidence.matches)
        return decide_each(evidence, evidence.matches | (_distances(evidence, evidence.num_known) < threshold))

    def observe(self, evidence: Evidence, num_accepted: int) -> None:
        seen = min(num_accepted + 1, evidence.num_known)
        distances, agrees = _distances(evidence, seen), evidence.matches[:seen]
        is_known = ~np.isnan(distances)
        self.learnt.agreed.add(distances[agrees & is_known])
        self.learnt.differed.add(distances[~agrees & is_known])


def _distances(evidence: Evidence, count: int) -> Masses:
    """float64 [count]: `named_distance` at the first positions; NaN where no draft model chose the token."""
    said, scores = evidence.target, evidence.scores
    result = np.full(count, np.nan)
    scored = min(count, len(scores.top_ids) if scores.top_ids.shape[1] else 0)  # not of a drafter that gives none
    for j in np.flatnonzero(evidence.sources[:scored] == DraftSource.MODEL):
        result[j] = named_distance(said.top_ids[j], said.top_logprobs[j], scores.top_ids[j], scores.top_logprobs[j])
    return result


def named_distance(
    target_ids: IntArray, target_logprobs: FloatArray, draft_ids: IntArray, draft_logprobs: FloatArray
) -> float:
    """A lower bound of the Jensen-Shannon distance (base 2, so from 0 to 1) of two laws of which the k most probable
    tokens are known, ids int64 [k] with natural log-probabilities float32 [k]. NaN where these are not numbers.

    Every token that either side names is a cell, all others together are one more: merging tokens never raises the
    divergence. Where a side does not name a token its mass is between 0 and that of its least probable named token, and
    at most what its named ones leave; each cell counts with the masses within those bounds that are closest, since a
    cell's share of the divergence only falls as its masses come closer.
    """
    p, q = np.exp(target_logprobs.astype(np.float64)), np.exp(draft_logprobs.astype(np.float64))
    if np.isnan(p).any() or np.isnan(q).any():
        return float("nan")
    p_by_id, q_by_id = dict(zip(target_ids.tolist(), p, strict=True)), dict(zip(draft_ids.tolist(), q, strict=True))
    p_left, q_left = max(0.0, 1 - p.sum()), max(0.0, 1 - q.sum())
    p_most, q_most = min(p.min(), p_left), min(q.min(), q_left)
    cells = []
    for token in p_by_id.keys() | q_by_id.keys():
        mass = p_by_id.get(token), q_by_id.get(token)
        here = min(p_most, mass[1]) if mass[0] is None else mass[0]
        there = min(q_most, mass[0]) if mass[1] is None else mass[1]
        cells.append((here, there))
    p_others, q_others = len(q_by_id.keys() - p_by_id.keys()), len(p_by_id.keys() - q_by_id.keys())
    p_least, q_least = max(0.0, p_left - p_others * p_most), max(0.0, q_left - q_others * q_most)
    here = min(max(p_least, q_least), p_left)
    cells.append((here, min(max(here, q_least), q_left)))
    divergence = sum(_share(here, there) for here, there in cells)
    return float(np.sqrt(min(1.0, max(0.0, divergence))))


def _share(p: float, q: float) -> float:
    """A cell's share of the Jensen-Shannon divergence, in bits."""
    middle = (p + q) / 2
    of_p = p * np.log2(p / middle) if p > 0 else 0.0
    of_q = q * np.log2(q / middle) if q > 0 else 0.0
    return float(of_p + of_q) / 2
