"""FLy's acceptance rule for one row, in NumPy: the definition that the engines' head is tested against.

It is also what decides on the host when the engine cannot: for sampled or processed choices, for stop tokens that only
the request has, and for a round whose draft is verified in several steps.
Source: arXiv 2511.22972, sections 3.2 (entropy gate) and 3.3 (deferred window), in the variants of `PRESETS`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy.typing as npt

from fly_trt.errors import ConfigError
from fly_trt.tokens import FloatArray, IntArray
from fly_trt.verification.policy import AcceptancePolicy, Evidence, HeadInfo, Verdict


@dataclass(frozen=True, slots=True)
class FlyPolicy(AcceptancePolicy):
    """A mismatching draft token j of n is loosened iff the gate's entropy at j is >= `entropy_threshold` (nats), draft
    and target agree on the `lookahead` tokens after j, and j + max(window, lookahead) < n.

    The gate is the entropy of the `k` largest probabilities, not renormalised, or with `use_full_entropy` that of the
    whole vocabulary. A threshold of +inf means exact match. The paper's ablations are settings: a window of 0 loosens
    whatever the gate lets pass, a threshold of 0 whatever the window does.
    """

    name: ClassVar[str] = "fly"
    settings: ClassVar[tuple[str, ...]] = ("preset", "fly_entropy_threshold", "fly_window_size", "fly_entropy_top_k")
    is_decided_by_head: ClassVar[bool] = True

    @classmethod
    def make(cls, settings: Mapping[str, Any], head: HeadInfo) -> Self:
        policy = fly_policy(
            settings["preset"] or DEFAULT_PRESET,
            head.vocab_size,
            entropy_threshold=settings["fly_entropy_threshold"],
            window=settings["fly_window_size"],
        )
        return cls(policy.entropy_threshold, policy.use_full_entropy, policy.window, policy.lookahead)

    @property
    def is_loose(self) -> bool:
        return math.isfinite(self.entropy_threshold)

    @property
    def has_windows(self) -> bool:
        return self.is_loose and self.lookahead > 0

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        draft, choices = evidence.draft, evidence.choices
        length, has_ended = evidence.num_draft, evidence.has_ended
        return accept(draft, choices, self._gate(evidence), self, stop_token_ids, length, has_ended=has_ended)

    def opens_window(self, evidence: Evidence, position: int, stop_token_ids: frozenset[int]) -> bool:
        draft, choices, gate = evidence.draft, evidence.choices, self._gate(evidence)
        return opens_window(position, evidence.num_draft, draft, choices, gate, self, stop_token_ids)

    @property
    def gate(self) -> float | None:
        return self.entropy_threshold if self.is_loose else None

    def why(self, evidence: Evidence, position: int) -> str:
        """The entropy beside the gate and, over it, what became of the window."""
        entropy = float(self._gate(evidence)[position])
        if not self.is_loose:
            return "only the target’s own choice stands"
        if not entropy >= self.entropy_threshold:
            return f"{entropy:.2f} nats, under the gate of {self.entropy_threshold:.2f}"
        over = f"{entropy:.2f} nats, over the gate of {self.entropy_threshold:.2f}"
        least = max(self.window, self.lookahead)
        if position + least >= evidence.num_draft:
            return f"{over}; the draft has fewer than {least} tokens after it"
        if not self.lookahead:
            return over
        ahead = evidence.matches[position + 1 : position + 1 + self.lookahead]
        if ahead.all() and len(ahead) < self.lookahead:
            return f"{over}; the draft ended before its window of {self.lookahead}"
        num_agreed = self.lookahead if ahead.all() else int(ahead.argmin())
        return f"{over}; {num_agreed} of {self.lookahead} agree after it"

    def _gate(self, evidence: Evidence) -> FloatArray:
        return evidence.target.entropy if self.use_full_entropy else evidence.target.entropy_topk


DEFAULT_PRESET = "reference"
PRESETS: dict[str, FlyPolicy] = {
    # The authors' program, which produced the published speedups: the window counts the mismatch itself.
    "reference": FlyPolicy(entropy_threshold=0.3, use_full_entropy=False, window=6, lookahead=5),
    # The text of arXiv 2511.22972: the threshold is a fraction of the largest possible entropy, ln(vocabulary).
    "paper": FlyPolicy(entropy_threshold=0.3, use_full_entropy=True, window=6, lookahead=6),
    # vLLM's rejection_sample_method="fly".
    "vllm": FlyPolicy(entropy_threshold=0.3, use_full_entropy=False, window=6, lookahead=6),
}


def fly_policy(
    preset: str, vocab_size: int, *, entropy_threshold: float | None = None, window: int | None = None
) -> FlyPolicy:
    """The preset with its threshold or window replaced; the unit of the threshold and the relation of lookahead to
    window stay the preset's: under `paper` a threshold is a fraction of ln(vocab_size)."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    policy = PRESETS[preset]
    if window is not None:
        policy = replace(policy, window=window, lookahead=max(0, window - policy.window + policy.lookahead))
    threshold = policy.entropy_threshold if entropy_threshold is None else entropy_threshold
    unit = math.log(vocab_size) if policy.use_full_entropy else 1.0
    return replace(policy, entropy_threshold=threshold * unit)


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
    """Decides how many draft tokens of a round stand, by the policy's four numbers.

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
