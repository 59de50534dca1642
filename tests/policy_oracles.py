"""The acceptance and draft-stop rules as their sources write them, one number at a time, in double precision.

They know one position, or one row of a draft, and nothing of the product. A rule that compares with a bound answers
True, False or None: None where the two are nearer than single precision tells apart. What is not a number is never
loosened. `x` is the draft token, `p` the target's probability of it, `q` the draft model's.
Sources: FLy arXiv 2511.22972 with the authors' code, AASD 2505.13204 (the formula at second hand), AdaSD 2512.11280 v1,
typical acceptance 2401.10774, AdaEDL 2410.18351 (at second hand), KnapSpec 2602.20217, Cactus (ICLR 2026).
"""

import math
from collections.abc import Iterator, Mapping, Sequence

Answer = bool | None
SINGLE_PRECISION = 1e-6
NUM_HALVINGS = 60


def at_least(value: float, bound: float) -> Answer:
    """value >= bound."""
    if math.isnan(value) or math.isnan(bound):
        return False
    if 0 < abs(value - bound) < SINGLE_PRECISION * max(abs(value), abs(bound)):
        return None
    return value >= bound


def less(value: float, bound: float) -> Answer:
    """value < bound."""
    if math.isnan(value) or math.isnan(bound):
        return False
    answer = at_least(value, bound)
    return None if answer is None else not answer


# --- rules of one position --------------------------------------------------------------------------------------------


def relaxed(x: int, p: float, p_max: float, top_ids: Sequence[int], top_n: int, delta: float) -> Answer:
    """x among the target's N most probable tokens and p(x) >= p_max - delta."""
    return at_least(p, p_max - delta) if x in list(top_ids)[:top_n] else False


def typical(p: float, entropy: float, epsilon: float, alpha: float) -> Answer:
    """p(x) >= min(epsilon, alpha e^-H), H of the whole vocabulary in nats."""
    if math.isnan(entropy):
        return False
    return at_least(p, min(epsilon, alpha * math.exp(-entropy)))


def conditional(p: float, p_max: float, entropy: float, alpha: float, beta: float, floor: float) -> Answer:
    """p(x) >= min(beta - alpha H, p_max), and no less than a floor, which is not the paper's."""
    if math.isnan(entropy) or math.isnan(p_max):
        return False
    return at_least(p, max(floor, min(beta - alpha * entropy, p_max)))


def margin(x: int, top_ids: Sequence[int], top_logprobs: Sequence[float], threshold: float) -> Answer:
    """x is the runner-up, and the most probable token is at most `threshold` nats above it."""
    if x != top_ids[1]:
        return False
    return at_least(threshold, top_logprobs[0] - top_logprobs[1])


def bernoulli_divergence(a: float, b: float) -> float:
    """KL(Bernoulli(a) || Bernoulli(b)) in nats, for b inside (0, 1)."""
    first = a * math.log(a / b) if a > 0 else 0.0
    second = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return first + second


def raised(p: float, delta: float) -> float:
    """Cactus' gamma: p + sqrt(2 delta p (1 - p)), lowered to where the divergence from p is delta."""
    if p in (0.0, 1.0):
        return p
    gamma = min(1.0, p + math.sqrt(2 * delta * p * (1 - p)))
    if bernoulli_divergence(gamma, p) <= delta:
        return gamma
    low, high = p, gamma
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if bernoulli_divergence(middle, p) <= delta else (low, middle)
    return low


def cactus(p: float, uniform: float, delta: float) -> Answer:
    """A token that was not drawn stands with the probability that lifts its own from p to gamma."""
    if math.isnan(p) or math.isnan(uniform) or p >= 1:
        return False
    return less(uniform, (raised(p, delta) - p) / (1 - p))


def raised_law(law: Sequence[float], x: int, delta: float) -> list[float]:
    """What is emitted where x was drafted: h(x) = gamma and h(y) = p(y) (1 - gamma) / (1 - p(x))."""
    gamma = raised(law[x], delta)
    return [gamma if y == x else share * (1 - gamma) / (1 - law[x]) for y, share in enumerate(law)]


# --- FLy --------------------------------------------------------------------------------------------------------------


def fly(
    matches: Sequence[bool], gates: Sequence[float], num_draft: int, theta: float, window: int, lookahead: int
) -> Iterator[Answer]:
    """A mismatch j of n is loosened iff gate_j >= theta, a_{j+1} .. a_{j+lookahead} all hold and j + window < n.
    matches: of the tokens that the draft has in the end, which may be fewer than n."""
    for j, gate in enumerate(gates[: len(matches)]):
        ahead = matches[j + 1 : j + 1 + lookahead]
        has_window = j + window < num_draft and len(ahead) == lookahead and all(ahead)
        yield at_least(gate, theta) if has_window else False


FLY_PRESETS = {"reference": (False, 1), "paper": (True, 0), "vllm": (False, 0)}  # full entropy; window - lookahead


def fly_numbers(preset: str, vocab_size: int, theta: float, window: int) -> tuple[bool, float, int, int]:
    """Whether the gate is the full entropy, theta in nats, window and lookahead."""
    is_full, shorter = FLY_PRESETS[preset]
    return is_full, theta * (math.log(vocab_size) if is_full else 1), window, max(0, window - shorter)


# --- AdaSD ------------------------------------------------------------------------------------------------------------


def divergence_share(p: float, q: float) -> float:
    """One token's part of the Jensen-Shannon divergence, base 2."""
    middle = (p + q) / 2
    return sum(value * math.log2(value / middle) / 2 for value in (p, q) if value > 0)


def distance(p: Sequence[float], q: Sequence[float]) -> float:
    """d = sqrt(H((p + q) / 2) - (H(p) + H(q)) / 2), base 2, so in [0, 1]."""
    return math.sqrt(max(0.0, sum(map(divergence_share, p, q))))


def nearest(low: float, high: float, value: float) -> float:
    return min(max(value, low), high)


def distance_bound(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """A lower bound of `distance` from what both sides name: probabilities of tokens, the most probable of each side.

    Every named token is a cell. A side that does not name it gives it at most its smallest named probability and at
    most what it has left; of that range the value nearest to the other side's is taken. The rest is one cell, whose two
    masses are ranges: from what is left if each token that only the other side names has the most it can, to all that
    is left.
    """
    left = [max(0.0, 1.0 - sum(side.values())) for side in (p, q)]
    most = [min(min(side.values()), rest) for side, rest in zip((p, q), left, strict=True)]
    total = 0.0
    for token in {*p, *q}:
        ours, theirs = p.get(token), q.get(token)
        ours = nearest(0.0, most[0], q[token]) if ours is None else ours
        theirs = nearest(0.0, most[1], p[token]) if theirs is None else theirs
        total += divergence_share(ours, theirs)
    least = [
        max(0.0, rest - upper * len(other.keys() - side.keys()))
        for side, other, rest, upper in ((p, q, left[0], most[0]), (q, p, left[1], most[1]))
    ]
    ours = nearest(least[0], left[0], least[1])
    theirs = nearest(least[1], left[1], ours)
    total += divergence_share(ours, theirs)
    return math.sqrt(max(0.0, total))


class Adaptive:
    """T_V = (mean d of matches + mean d of mismatches) / 2, at most `max_distance`; a mismatch stands iff d < T_V. A
    distance that is not a number belongs to neither group."""

    def __init__(self, max_distance: float) -> None:
        self.max_distance = max_distance
        self.matches: list[float] = []
        self.mismatches: list[float] = []

    @property
    def threshold(self) -> float:
        if not self.matches or not self.mismatches:
            return -math.inf
        means = [math.fsum(group) / len(group) for group in (self.matches, self.mismatches)]
        return min(self.max_distance, sum(means) / 2)

    def stands(self, distance: float) -> Answer:
        return less(distance, self.threshold)

    def observe(self, matches: Sequence[bool], distances: Sequence[float], num_accepted: int) -> None:
        """At the end of a round: the positions up to and including the first that does not stand, by agreement."""
        for match, distance in list(zip(matches, distances, strict=True))[: num_accepted + 1]:
            if not math.isnan(distance):
                (self.matches if match else self.mismatches).append(distance)


class UnguardedAdaptive(Adaptive):
    """The paper's groups: by what was accepted, so that the rule feeds itself."""

    def observe(self, matches: Sequence[bool], distances: Sequence[float], num_accepted: int) -> None:
        super().observe([j < num_accepted for j in range(len(matches))], distances, num_accepted)


# --- draft stops ------------------------------------------------------------------------------------------------------


def adasd_stop(entropy: float, rejected: Sequence[float]) -> Answer:
    """The entropy exceeds T_G, the mean of the rejected draft tokens' entropies, +inf before the first."""
    return less(math.fsum(rejected) / len(rejected), entropy) if rejected else False


def confidence_stop(logprob: float, threshold: float = 0.7) -> Answer:
    return less(math.exp(logprob), threshold)


def adaedl_stop(entropy: float, threshold: float = 0.2) -> Answer:
    """1 - sqrt(gamma H) under the threshold, gamma 0.5."""
    return less(1 - math.sqrt(0.5 * entropy), threshold)
