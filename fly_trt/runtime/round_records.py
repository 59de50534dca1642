"""What is told of a round: its counts, for every request, and how its tokens came to be, for those that want a trace.
It reads rounds and changes nothing.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fly_trt.outputs import RoundCounts, RoundTrace, TokenKind, TokenTrace
from fly_trt.runtime.rounds import Round, RoundCosts
from fly_trt.verification import Decision, DraftSource, Verdict, explain, num_agreeing

SOURCE_NAMES = [source.name.lower() for source in DraftSource]
TOP_TOKENS = 5  # of a position that is traced, at most


def round_counts(round_: Round, num_emitted: int) -> RoundCounts:
    """Of a round that is decided, of which the first `num_emitted` tokens were emitted: draft tokens, and the target's
    own."""
    evidence, num_kept = round_.evidence, min(num_emitted, round_.num_committed)
    num_verified, num_loosened = evidence.num_known, evidence.num_loosened(num_kept)
    return RoundCounts(
        num_verified,
        num_kept,
        num_loosened,
        _by_source(evidence.sources[:num_verified]),
        _by_source(evidence.sources[:num_kept]),
        num_kept - evidence.num_exact(num_kept) if num_loosened else 0,
        _refusal(round_, num_emitted),
    )


def round_trace(round_: Round, number: int, num_kept: int, asked: str) -> RoundTrace:
    """Of a round that is decided, of which `num_kept` draft tokens were emitted. asked: the request's rule."""
    evidence, costs = round_.evidence, round_.costs or RoundCosts()
    return RoundTrace(
        number,
        evidence.num_known,
        num_kept,
        evidence.num_loosened(num_kept),
        asked,
        round_.policy.name,
        round_.draft[round_.num_committed :].tolist(),
        costs.num_steps,
        costs.num_rows,
        costs.draft_seconds,
        costs.verification_seconds,
    )


def token_traces(
    round_: Round,
    verdict: Verdict,
    num_tokens: int,
    number: int,
    *,
    of_vocabulary: bool,
    text: Callable[[int], str],
) -> list[TokenTrace]:
    """How the first `num_tokens` tokens came to be that a verdict adds to what is committed. number: the round's.
    of_vocabulary: whether the entropy is that of the whole vocabulary. text: of a token."""
    evidence, first = round_.evidence, round_.num_committed
    said = evidence.target
    gate = said.entropy if of_vocabulary else said.entropy_topk
    traces = []
    for at in range(first, first + num_tokens):
        entropy, kind = float(gate[at]), _kind(round_, verdict, at)
        guard = _guard(round_, at) if kind == "correction" else None
        waits = kind == "loosened" or (kind == "correction" and guard is None)  # a guard does not wait for a window
        decision = Decision(kind, round_.policy, evidence, at, round_.exact_because, round_.is_limited, guard)
        traces.append(
            TokenTrace(
                kind,
                SOURCE_NAMES[evidence.sources[at]] if kind in ("matched", "loosened") else None,
                number,
                entropy if math.isfinite(entropy) else None,
                int(evidence.choices[at]),
                rejected=int(evidence.draft[at]) if kind == "correction" else None,
                reason=explain(decision, round_.limits, text),
                gate=round_.policy.gate,
                num_agreed=_num_agreeing(round_, at) if waits else None,
                guard=guard,
                top=_top(round_, at) if round_.needs_top else None,
            )
        )
    return traces


def _kind(round_: Round, verdict: Verdict, at: int) -> TokenKind:
    if at < verdict.num_accepted:
        return "matched" if round_.evidence.matches[at] else "loosened"
    if at < round_.evidence.num_known:
        return "correction"
    return "bonus" if at else "plain"


def _num_agreeing(round_: Round, at: int) -> int | None:
    return num_agreeing(round_.policy, round_.evidence, at, round_.limits.never_loosened)


def _refusal(round_: Round, num_emitted: int) -> str | None:
    """The guard that turned down a loosening, if one did, and its place was reached."""
    at, evidence = round_.num_committed, round_.evidence
    if round_.limits.guards is None or not at < min(num_emitted, evidence.num_known) or evidence.matches[at]:
        return None
    return _guard(round_, at)


def _guard(round_: Round, at: int) -> str | None:
    """The guard that turned down what the policy would have loosened there, or had opened its window for: whether that
    fails as well shows only where a step is long."""
    evidence, limits = round_.evidence, round_.limits
    if not (round_.is_limited or round_.policy.opens_window(evidence, at, limits.never_loosened)):
        return None
    return limits.guard_that_forbids(evidence, at)


def _top(round_: Round, at: int) -> list[tuple[int, float]] | None:
    """The target's most probable tokens there; None where the logits are not numbers, or no token is left."""
    said = round_.evidence.target
    ids, logprobs = said.top_ids[at, :TOP_TOKENS].tolist(), said.top_logprobs[at, :TOP_TOKENS].tolist()
    return [(token, value) for token, value in zip(ids, logprobs, strict=True) if math.isfinite(value)] or None


def _by_source(sources: npt.NDArray[np.uint8]) -> dict[str, int]:
    """How many tokens there are of each source."""
    if not len(sources):
        return {}
    if (sources == sources[0]).all():
        return {SOURCE_NAMES[sources[0]]: len(sources)}
    return {SOURCE_NAMES[source]: count for source, count in enumerate(np.bincount(sources).tolist()) if count}
