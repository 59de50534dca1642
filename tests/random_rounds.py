"""Random rounds, and what must hold of a verdict on one.

Drafts are of two toy distributions that are near each other, and what a head says of them.

Scores lie on a coarse grid, so that ties are frequent; some tokens are impossible. Drafts of 0 to 8 tokens of all
sources, mostly the target's choices or its runners-up; some have ended before the length that was asked for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fly_trt.verification import (
    POLICIES,
    AcceptancePolicy,
    DraftScores,
    DraftSource,
    Evidence,
    HeadInfo,
    Limits,
    Positions,
    Verdict,
)
from policy_oracles import Answer

VOCAB_SIZE = 12
TOP_K = 4
MAX_DRAFT = 8
STOPS = frozenset({0})
HEAD = HeadInfo(vocab_size=VOCAB_SIZE, entropy_top_k=TOP_K, has_top_tokens=True)
NOTHING_SAID = 0.01  # of the positions: their logits are not numbers


def log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def entropy_of(logprobs: np.ndarray) -> np.ndarray:
    shares = np.exp(logprobs)
    return -(shares * np.where(shares > 0, logprobs, 0)).sum(axis=-1)


def top_of(logprobs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most probable tokens of each row, ties to the lower token, and their log-probabilities."""
    ids = np.argsort(-logprobs, axis=-1, kind="stable")[..., :k]
    return ids, np.take_along_axis(logprobs, ids, axis=-1)


def of_draft(logprobs: np.ndarray, draft: np.ndarray) -> np.ndarray:
    return np.take_along_axis(logprobs, draft[..., None], axis=-1)[..., 0]


def random_rounds(seed: int, num: int, *, is_sampled: bool = False, k: int = TOP_K) -> Iterator[Evidence]:
    """Whole rounds. Greedy ones have no uniforms and their choices are argmax; sampled ones draw."""
    rng = np.random.default_rng(seed)
    m = MAX_DRAFT + 1
    spread = rng.choice([0.0, 0.5, 2.0, 6.0], (num, m, 1))
    scores = np.round(rng.normal(size=(num, m, VOCAB_SIZE)) * spread * 4) / 4
    noise = np.round(rng.normal(size=scores.shape) * rng.choice([0.0, 0.5, 2.0], (num, m, 1)) * 4) / 4
    impossible = rng.random(scores.shape) < 0.1
    impossible[..., 0] = False
    target = log_softmax(np.where(impossible, -np.inf, scores))
    theirs = log_softmax(np.where(impossible & (rng.random(scores.shape) < 0.5), -np.inf, scores + noise))

    order, _ = top_of(target, VOCAB_SIZE)
    choices = order[..., 0].copy()
    if is_sampled:
        choices = (np.exp(target).cumsum(axis=-1) < rng.random((num, m, 1))).sum(axis=-1).clip(max=VOCAB_SIZE - 1)
    kind = rng.choice(4, (num, m), p=[0.5, 0.2, 0.2, 0.1])
    favourites = top_of(theirs, 1)[0][..., 0]
    draft = np.choose(kind, [choices, order[..., 1], favourites, rng.integers(VOCAB_SIZE, size=(num, m))])

    top_ids, top_logprobs = top_of(target, k)
    their_ids, their_logprobs = top_of(theirs, k)
    draft_logprob = of_draft(target, draft)
    # Not promised where the draft token is the choice.
    draft_logprob[(draft == choices) & (rng.random((num, m)) < 0.3)] = np.nan
    arrays = {
        "choices": choices,
        "entropy": entropy_of(target),
        "entropy_topk": entropy_of(top_of(target, 3)[1]),
        "argmax_logprob": target.max(axis=-1),
        "draft_logprob": draft_logprob,
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
        "uniforms": rng.random((num, m)) if is_sampled else np.full((num, m), np.nan),
    }
    says_nothing = rng.random((num, m)) < NOTHING_SAID
    for name in arrays.keys() - {"uniforms"}:
        is_id = arrays[name].dtype == np.int64
        arrays[name][says_nothing] = -1 if is_id else np.nan
        arrays[name] = arrays[name].astype(np.int64 if is_id else np.float32)
    source = rng.choice([*DraftSource], (num, m), p=[0.6, 0.3, 0.05, 0.05]).astype(np.uint8)
    said = [entropy_of(theirs), of_draft(theirs, draft), their_ids, their_logprobs]
    for array in said:
        array[source != DraftSource.MODEL] = -1 if array.dtype == np.int64 else np.nan
    said_of_draft = DraftScores(*(array if array.dtype == np.int64 else array.astype(np.float32) for array in said))

    lengths = rng.integers(0, MAX_DRAFT + 1, num)
    missing = np.where(rng.random(num) < 0.2, rng.integers(0, 4, num), 0)
    for i, n in enumerate(lengths.tolist()):
        d = max(0, n - int(missing[i]))
        yield Evidence(
            n,
            has_ended=d < n,
            draft=draft[i, :d],
            sources=source[i, :d],
            scores=DraftScores(*(array[i, :d] for array in said_of_draft)),
            target=Positions(**{name: array[i, : d + 1] for name, array in arrays.items()}),
        )


def beginning(evidence: Evidence, num_drafted: int, num_verified: int) -> Evidence:
    """What was known when so much of the draft existed and so many positions were verified."""
    d, v = num_drafted, num_verified
    return replace(
        evidence,
        has_ended=evidence.has_ended and d == len(evidence.draft),
        draft=evidence.draft[:d],
        sources=evidence.sources[:d],
        scores=DraftScores(*(array[:d] for array in evidence.scores)),
        target=Positions(*(array[:v] for array in evidence.target)),
    )


# --- policies and verdicts --------------------------------------------------------------------------------------------


def make(name: str, **settings: Any) -> AcceptancePolicy:
    nothing_given = {setting: None for policy in POLICIES.values() for setting in policy.settings}
    assert settings.keys() <= nothing_given.keys()
    return POLICIES[name].make(nothing_given | settings, HEAD)


def decide(policy: AcceptancePolicy, evidence: Evidence) -> Verdict:
    return Limits(STOPS).apply(policy.verdict(evidence, STOPS), evidence)


def is_guarded(evidence: Evidence, j: int) -> bool:
    """Whether draft token j is never loosened, whatever the policy says."""
    is_stop = {int(evidence.draft[j]), int(evidence.choices[j])} & STOPS
    is_impossible = evidence.target.draft_logprob[j] == -math.inf
    return bool(is_stop) or bool(is_impossible) or evidence.sources[j] in (DraftSource.CORPUS, DraftSource.GRAMMAR)


def stands(evidence: Evidence, rule: Sequence[Answer]) -> list[Answer]:
    return [
        True if match else False if is_guarded(evidence, j) else rule[j]
        for j, match in enumerate((evidence.draft == evidence.choices[: len(evidence.draft)]).tolist())
    ]


def assert_follows(verdict: Verdict, evidence: Evidence, answers: Sequence[Answer]) -> None:
    """Of a whole round: the draft tokens stand up to the first that does not, then comes the target's choice."""
    a = verdict.num_accepted
    seen = (evidence, answers, verdict)
    assert all(answer is not False for answer in answers[:a]), seen
    assert a == len(answers) or answers[a] is not True, seen
    assert verdict.next_token == evidence.choices[a], seen
