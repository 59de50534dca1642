"""Cactus: sampling with a bound on how far the emitted law may be from the target's.

A fixed draft token x, which lossless sampling accepts with its probability p, is accepted with a probability
gamma >= p; otherwise a token is drawn from what is left of the target's law. The emitted law h then has h(x) = gamma
and h(y) = p(y) (1 - gamma) / (1 - p) elsewhere, and KL(h || p) is that of two coins, gamma and p. Delta bounds it in
nats; 0 is lossless.

Source: Cactus (ICLR 2026, MANGA-UOFA/Cactus): gamma = p + sqrt(2 delta p (1 - p)), which keeps the bound up to
gamma = 1/2. Beyond, where it may not, gamma is lowered here to where the divergence is delta.

Lossless sampling draws the target's choice from its law and accepts x where it is the choice. So what is added is a
second number drawn for the position: a mismatch stands where it is below (gamma - p) / (1 - p). Greedy decoding has no
law to stay close to, and nothing is loosened there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from fly_trt.verification.policy import AcceptancePolicy, Evidence, HeadInfo, Verdict, decide_each, percent

DEFAULT_DELTA = 0.75
NUM_HALVINGS = 40  # of an interval in [0, 1]: down to 1e-12

Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CactusPolicy(AcceptancePolicy):
    """A sampled request's draft token stands with probability gamma instead of p, with KL(h || p) <= delta nats at each
    position; see the module."""

    delta: float = DEFAULT_DELTA

    name: ClassVar[str] = "cactus"
    settings: ClassVar[tuple[str, ...]] = ("cactus_delta",)
    needs_uniforms: ClassVar[bool] = True

    @classmethod
    def make(cls, settings: Mapping[str, Any], head: HeadInfo) -> Self:
        delta = settings["cactus_delta"]
        return cls(delta=DEFAULT_DELTA if delta is None else delta)

    @property
    def is_loose(self) -> bool:
        return self.delta > 0

    def why(self, evidence: Evidence, position: int) -> str:
        said = evidence.target
        if not len(said.uniforms):
            return "nothing is sampled, so only the target’s own choice stands"
        p = np.exp(said.draft_logprob[position : position + 1].astype(np.float64))
        gamma = float(acceptance_probability(p, self.delta)[0])
        likely, kept = (percent(math.log(share)) if share else "0 %" for share in (float(p[0]), gamma))
        return f"{likely} probable, kept with {kept}"

    def verdict(self, evidence: Evidence, stop_token_ids: frozenset[int]) -> Verdict:
        known, said = evidence.num_known, evidence.target
        if not len(said.uniforms):  # nothing is sampled
            return decide_each(evidence, evidence.matches)
        p = np.exp(said.draft_logprob[:known].astype(np.float64))
        gamma = acceptance_probability(p, self.delta)
        # u < (gamma - p) / (1 - p), without a division by 0 where p is 1
        is_drawn = said.uniforms[:known] * (1 - p) < gamma - p
        return decide_each(evidence, evidence.matches | is_drawn)


def acceptance_probability(p: Probabilities, delta: float) -> Probabilities:
    """gamma float64 [m] in [p, 1] for the draft tokens' probabilities p [m]: as published where that keeps
    KL(gamma || p) <= delta, and otherwise the largest that does."""
    gamma = np.minimum(1.0, p + np.sqrt(2 * delta * p * (1 - p)))
    is_beyond = _divergence(gamma, p) > delta
    if is_beyond.any():
        low, high = p[is_beyond], gamma[is_beyond]
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2
            keeps = _divergence(middle, p[is_beyond]) <= delta
            low, high = np.where(keeps, middle, low), np.where(keeps, high, middle)
        gamma[is_beyond] = low
    return gamma


def _divergence(gamma: Probabilities, p: Probabilities) -> Probabilities:
    """KL divergence in nats of a coin gamma from a coin p, with 0 ln 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        heads = np.where(gamma > 0, gamma * np.log(gamma / p), 0.0)
        tails = np.where(gamma < 1, (1 - gamma) * np.log((1 - gamma) / (1 - p)), 0.0)
    result: Probabilities = heads + tails
    return result
