"""FLy's acceptance rule for one row, in NumPy: the definition that the engines' head is tested against.

It is also what decides on the host when a request has stop tokens of its own, which the engine does not know.
Source: arXiv 2511.22972, sections 3.2 (entropy gate) and 3.3 (deferred window), in the variants of `policy.py`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fly_trt.engines.base import AcceptancePolicy, IntArray


@dataclass(frozen=True, slots=True)
class Verdict:
    """`num_accepted` draft tokens stand, then comes `next_token`, the target's argmax after them."""

    num_accepted: int
    next_token: int


def accept(
    draft: IntArray, argmax: IntArray, gate: npt.NDArray[Any], policy: AcceptancePolicy, stop_token_ids: frozenset[int]
) -> Verdict:
    """Decides how many of n draft tokens stand.

    draft int64 [n]; argmax int64 [n + 1], the target's choice at each draft position and after the last one;
    gate float [n] or longer, the entropy that the policy names, in nats. Stop tokens are never loosened, neither when
    the draft proposes one nor when the target wants one.
    """
    n = len(draft)
    matches = draft == argmax[:n]
    num_accepted = 0
    for j in range(n):
        if not matches[j] and not _is_loosened(j, draft, argmax, matches, gate, policy, stop_token_ids):
            break
        num_accepted += 1
    return Verdict(num_accepted, int(argmax[num_accepted]))


def _is_loosened(
    j: int,
    draft: IntArray,
    argmax: IntArray,
    matches: npt.NDArray[np.bool_],
    gate: npt.NDArray[Any],
    policy: AcceptancePolicy,
    stop_token_ids: frozenset[int],
) -> bool:
    uncertain = bool(gate[j] >= policy.entropy_threshold)
    has_room = j + max(policy.window, policy.lookahead) < len(draft)
    agrees_ahead = bool(matches[j + 1 : j + 1 + policy.lookahead].all())
    stops = int(draft[j]) in stop_token_ids or int(argmax[j]) in stop_token_ids
    return uncertain and has_room and agrees_ahead and not stops


def count_loosened(draft: IntArray, argmax: IntArray, num_accepted: int) -> int:
    """How many of the accepted draft tokens differ from the target's argmax."""
    return int(np.count_nonzero(draft[:num_accepted] != argmax[:num_accepted]))
