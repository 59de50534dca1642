"""What an audit is: which finished requests are read again by the target, what it may cost, and what comes of one.

An audit asks the target alone how probable it finds what a loose request emitted, beside its own greedy choices, and
for a part of them what its exact text would have been. This module has the words for it, shared by whoever makes audits
and whoever judges them; it runs no engine and knows no requests.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from fly_trt.checks import check_at_least, is_number
from fly_trt.errors import ConfigError
from fly_trt.runtime.breaker import DEFAULT_SETTING
from fly_trt.tokens import NO_TOKENS, IntArray

LeftOut = Literal[
    "exact", "sampled", "structured", "changed_scores", "aborted", "failed", "too_long", "dropped", "faulty"
]
"""Why a request that was drawn has no audit: its policy is exact, or the breaker made it so; it sampled; a grammar, or
penalties, biases, bad words or min_tokens, changed the target's own choices; it was aborted or ended with an error; it
has more than max_tokens; others took its place in the queue, or it was begun too often; the target's numbers for it
were none, or the step that read it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig:
    """fraction: of finished requests, those that are drawn, by a hash of `seed` and their number. exact_fraction: of
    these, those whose exact text is made as well. share: of the time in steps, at most, that audits take while requests
    run; 0 means that they only run when nothing else does. max_tokens: prompt and output of a request that is audited,
    at most. max_queue_size: requests that wait for their audit; of more, one at random is dropped."""

    fraction: float = 0.0
    exact_fraction: float = 0.1
    share: float = 0.05
    seed: int = 0
    max_tokens: int = 16_384
    max_queue_size: int = 256

    def __post_init__(self) -> None:
        for name, most in (("fraction", 1.0), ("exact_fraction", 1.0), ("share", 0.5)):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value <= most):
                raise ConfigError(f"audit_{name} {value!r}: expected a number from 0 to {most:g}")
        for name, least in (("seed", 0), ("max_tokens", 2), ("max_queue_size", 1)):
            check_at_least(f"audit_{name}", getattr(self, name), least)

    def draws(self, number: int) -> bool:
        """Whether the finished request of this number is audited."""
        return _uniform(self.seed, "audit", number) < self.fraction

    def draws_exact(self, number: int) -> bool:
        """Whether the exact text is made too, of a request that is audited."""
        return _uniform(self.seed, "exact", number) < self.exact_fraction

    def draws_place(self, number: int, num_places: int) -> int:
        """Which of so many places is dropped when this request finds the queue full."""
        return int(_uniform(self.seed, "drop", number) * num_places)


@dataclass(frozen=True, slots=True)
class ExactComparison:
    """The target's exact greedy output for the same prompt and the same ends: its number of tokens, the first position
    of the output at which the two differ (None where they do not; the shorter one's length where it is the beginning of
    the other), and the tokens, int64 [num_tokens]."""

    num_tokens: int
    parted_at: int | None
    token_ids: IntArray = field(default_factory=lambda: NO_TOKENS, repr=False, compare=False)

    @property
    def is_same(self) -> bool:
        return self.parted_at is None


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditResult:
    """One audited sequence; `index` numbers those of one request, `acceptance` is the name of its policy and `setting`
    that of its whole setting, see Breaker.

    log_likelihood, best_log_likelihood: sums over the output's num_tokens, in nats, of ln p of the token and of the
    target's most probable one, each given the prompt and the output before it. num_differing: tokens that are not the
    most probable one; the exact text parts from the output at the first of them, at the position parted_at of it.
    num_loosened: what the request counted when it ran. seconds: engine time that the audit took. finished_at: when the
    request ended, as time.time().
    """

    request_id: str
    index: int = 0
    acceptance: str
    setting: str = DEFAULT_SETTING
    num_prompt_tokens: int
    num_tokens: int
    num_loosened: int
    finished_at: float
    num_differing: int = 0
    parted_at: int | None = None
    log_likelihood: float = 0.0
    best_log_likelihood: float = 0.0
    seconds: float = 0.0
    exact: ExactComparison | None = None
    prompt_token_ids: IntArray = field(default_factory=lambda: NO_TOKENS, repr=False, compare=False)
    token_ids: IntArray = field(default_factory=lambda: NO_TOKENS, repr=False, compare=False)

    @property
    def quality(self) -> float:
        """In (0, 1]: the geometric mean over the output's tokens of p(token) / p(most probable token)."""
        return math.exp(min(0.0, self.log_likelihood - self.best_log_likelihood) / max(1, self.num_tokens))


OnResult = Callable[[AuditResult], None]
"""Takes each result in the engine thread."""


@dataclass(slots=True)
class AuditCounts:
    """What became of the drawn requests; the engine thread counts, any thread reads. seconds: engine time of audits,
    also of those that came to nothing; seconds_beside: of them, while requests ran."""

    num_finished: int = 0
    num_drawn: int = 0
    num_audited: int = 0
    num_waiting: int = 0
    seconds: float = 0.0
    seconds_beside: float = 0.0
    left_out: Counter[LeftOut] = field(default_factory=Counter)


def _uniform(seed: int, purpose: str, number: int) -> float:
    """In [0, 1), the same for the same arguments on every machine."""
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
