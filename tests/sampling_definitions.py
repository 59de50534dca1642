"""Processed scores and distributions as the parameters are defined, one token at a time."""

import math
from collections import Counter
from typing import Any

import numpy as np


def random_scores(rng: np.random.Generator, m: int, vocab_size: int, spread: float = 2.0) -> np.ndarray:
    return (rng.normal(size=(m, vocab_size)) * spread).astype(np.float32)


def processed_row(logits: np.ndarray, prompt: list[int], output: list[int], settings: dict[str, Any]) -> list[float]:
    """The scores after `output`, one token of the vocabulary after the other, as the parameters are defined."""
    scores = []
    for token, logit in enumerate(logits.tolist()):
        score = logit + settings.get("logit_bias", {}).get(token, 0.0)
        repetition = settings.get("repetition_penalty", 1.0)
        if token in prompt or token in output:
            score = score / repetition if score > 0 else score * repetition
        score -= settings.get("frequency_penalty", 0.0) * output.count(token)
        score -= settings.get("presence_penalty", 0.0) * (token in output)
        if len(output) < settings.get("min_tokens", 0) and token in settings.get("end_token_ids", ()):
            score = -math.inf
        for *beginning, last in settings.get("bad_words", ()):
            if token == last and output[len(output) - len(beginning) :] == beginning:
                score = -math.inf
        scores.append(score)
    return scores


def truncated_softmax(
    scores: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """One row by the definition: all tokens in order, cut one by one."""
    weights = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    order = [token for token in order if weights[token] >= min_p]
    order = order[:top_k] if top_k > 0 else order
    total, mass, kept = sum(weights[order]), 0.0, []
    for token in order:
        kept.append(token)
        mass += weights[token]
        if mass >= top_p * total:
            break
    probabilities = np.zeros(len(scores))
    probabilities[kept] = weights[kept] / mass
    return probabilities


def follows(counts: Counter[int], law: np.ndarray) -> bool:
    """Pearson's chi-square test at p = 0.01: whether counts of tokens may have been drawn from `law`."""
    num = counts.total()
    observed = np.array([counts[token] for token in range(len(law))])
    if observed[law == 0].any():
        return False
    rare = law * num < 5  # too few for the approximation: counted together
    expected = np.append(law[~rare] * num, law[rare].sum() * num)
    observed = np.append(observed[~rare], observed[rare].sum())
    possible = expected > 0
    statistic = float((((observed - expected)[possible] ** 2) / expected[possible]).sum())
    freedom = np.count_nonzero(possible) - 1
    # Wilson and Hilferty 1931: the cube root of chi-square / freedom is nearly normal; 2.326 is the normal's 99 %.
    variance = 2 / (9 * freedom)
    return statistic < freedom * (1 - variance + 2.326 * math.sqrt(variance)) ** 3
