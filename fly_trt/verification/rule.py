"""FLy's acceptance rule for one row, in NumPy: the definition that the engines' head is tested against.

It is also what decides on the host when the engine cannot: for sampled or processed choices, for stop tokens that only
the request has, and for a round whose draft is verified in several steps.
Source: arXiv 2511.22972, sections 3.2 (entropy gate) and 3.3 (deferred window), in the variants of `policy.py`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fly_trt.tokens import IntArray
from fly_trt.verification.policy import AcceptancePolicy


@dataclass(frozen=True, slots=True)
class Verdict:
    """`num_accepted` draft tokens stand, then comes `next_token`, the target's choice after them; None as long as what
    was verified does not decide what follows."""

    num_accepted: int
    next_token: int | None


def accept(
    draft: IntArray,
    choices: IntArray,
    gate: npt.NDArray[Any],
    policy: AcceptancePolicy,
    stop_token_ids: frozenset[int],
    num_draft: int | None = None,
    *,
    has_ended: bool = False,
) -> Verdict:
    """Decides how many draft tokens of a round stand.

    draft int64 [d], the draft or its beginning; choices int64 [v], the target's choice (argmax or sample) at each draft
    position and after the last one, or the beginning of them; gate float [v] or longer, the entropy that the policy
    names, in nats; num_draft n, the length of the whole draft, when d < n or v < n + 1. A verdict on a beginning never
    differs from the one on the whole: it accepts what is certain and leaves next_token open. Stop tokens are never
    loosened, neither when the draft proposes one nor when the target wants one. has_ended: the draft has no more than d
    tokens, although a round of n was asked for: a window that reaches beyond them does not stand.
    """
    length = len(draft) if num_draft is None else num_draft
    end = len(draft) if has_ended else length
    known = min(len(draft), len(choices))
    matches = draft[:known] == choices[:known]
    for j in range(known):
        if matches[j]:
            continue
        ahead = matches[j + 1 : j + 1 + policy.lookahead]
        stands = opens_window(j, length, draft, choices, gate, policy, stop_token_ids) and bool(ahead.all())
        if not stands or j + policy.lookahead >= end:
            return Verdict(j, int(choices[j]))
        if len(ahead) < policy.lookahead:
            return Verdict(j, None)
    if known == end < len(choices):
        return Verdict(end, int(choices[end]))
    return Verdict(known, None)


def opens_window(
    j: int,
    num_draft: int,
    draft: IntArray,
    choices: IntArray,
    gate: npt.NDArray[Any],
    policy: AcceptancePolicy,
    stop_token_ids: frozenset[int],
) -> bool:
    """Whether the mismatch at position j of a round of num_draft tokens stands if draft and choices agree on the
    `lookahead` tokens after it; the arrays are `accept`'s."""
    if not gate[j] >= policy.entropy_threshold or j + max(policy.window, policy.lookahead) >= num_draft:
        return False
    return int(draft[j]) not in stop_token_ids and int(choices[j]) not in stop_token_ids


def count_loosened(draft: IntArray, choices: IntArray, num_accepted: int) -> int:
    """How many of the accepted draft tokens differ from the target's choice."""
    return int(np.count_nonzero(draft[:num_accepted] != choices[:num_accepted]))
