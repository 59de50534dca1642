"""FLy's acceptance rule for one row, in NumPy: the definition that the engines' head is tested against.

It is also what decides on the host when the engine cannot: for sampled or processed choices, for stop tokens that only
the request has, and for a round whose draft is verified in several steps.
Source: arXiv 2511.22972, sections 3.2 (entropy gate) and 3.3 (deferred window), in the variants of `policy.py`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fly_trt.engines.base import AcceptancePolicy, IntArray


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
) -> Verdict:
    """Decides how many draft tokens of a round stand.

    draft int64 [d], the draft or its beginning; choices int64 [v], the target's choice (argmax or sample) at each draft
    position and after the last one, or the beginning of them; gate float [v] or longer, the entropy that the policy
    names, in nats; num_draft n, the length of the whole draft, when d < n or v < n + 1. A verdict on a beginning never
    differs from the one on the whole: it accepts what is certain and leaves next_token open. Stop tokens are never
    loosened, neither when the draft proposes one nor when the target wants one.
    """
    length = len(draft) if num_draft is None else num_draft
    known = min(len(draft), len(choices))
    matches = draft[:known] == choices[:known]
    for j in range(known):
        if matches[j]:
            continue
        loosened = _is_loosened(j, length, draft, choices, matches, gate, policy, stop_token_ids)
        if loosened is None:
            return Verdict(j, None)
        if not loosened:
            return Verdict(j, int(choices[j]))
    if known == length < len(choices):
        return Verdict(length, int(choices[length]))
    return Verdict(known, None)


def _is_loosened(
    j: int,
    length: int,
    draft: IntArray,
    choices: IntArray,
    matches: npt.NDArray[np.bool_],
    gate: npt.NDArray[Any],
    policy: AcceptancePolicy,
    stop_token_ids: frozenset[int],
) -> bool | None:
    """Whether the mismatch at j stands; None when that depends on positions that are not known yet."""
    if not gate[j] >= policy.entropy_threshold or j + max(policy.window, policy.lookahead) >= length:
        return False
    if int(draft[j]) in stop_token_ids or int(choices[j]) in stop_token_ids:
        return False
    ahead = matches[j + 1 : j + 1 + policy.lookahead]
    if not ahead.all():
        return False
    return True if len(ahead) == policy.lookahead else None


def count_loosened(draft: IntArray, choices: IntArray, num_accepted: int) -> int:
    """How many of the accepted draft tokens differ from the target's choice."""
    return int(np.count_nonzero(draft[:num_accepted] != choices[:num_accepted]))
